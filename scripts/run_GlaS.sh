#!/bin/sh
# Train on GlaS, then test on the test sets that are there. Arguments go to train.py:
#   sh scripts/run_GlaS.sh --batch-size 4
# DATA_DIR: the prepared data. SAVE_DIR: the run folder, by default the next free ./experiments/GlaS/N.
dataset=GlaS test_sets='testA testB' label_set=
. "$(dirname "$0")/train_and_test.sh"
