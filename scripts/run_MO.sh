#!/bin/sh
# Train on MultiOrgan, then test on the test sets that are there. Arguments go to train.py:
#   sh scripts/run_MO.sh --batch-size 4
# DATA_DIR: the prepared data. SAVE_DIR: the run folder, by default the next free ./experiments/MultiOrgan/N.
dataset=MultiOrgan test_sets='test_same test_diff' label_set=test
. "$(dirname "$0")/train_and_test.sh"
