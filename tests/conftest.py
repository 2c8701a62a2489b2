"""Tests import the scripts of the folder above, from wherever pytest is started."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
torch.set_num_threads(1)        # the networks here are tiny: threads would only wait for each other
