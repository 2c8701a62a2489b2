"""Tests import the scripts of the folder above, from wherever pytest is started."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)        # the networks here are tiny: threads would only wait for each other
