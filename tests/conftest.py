"""Tests import the scripts of the folder above, from wherever pytest is started."""
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]

settings.register_profile('same examples in every run', derandomize=True, deadline=None)
settings.load_profile('same examples in every run')

# the networks here are tiny: threads would only wait for each other
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'               # of the programs that tests start


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Each test starts with one thread, whatever the one before set, and draws the same random networks in any order."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
