"""Tests import the scripts of the folder above, from wherever pytest is started."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
os.environ.setdefault('OMP_NUM_THREADS', '1')     # of the programs that tests start: the networks here are tiny, and
                                                  # threads would only wait for each other


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)                      # whatever the test before has set
