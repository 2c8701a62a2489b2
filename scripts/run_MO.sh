#!/bin/sh
# Train on MultiOrgan, then test on both test sets. Arguments go to train.py: sh scripts/run_MO.sh --batch-size 4
# DATA_DIR: the prepared data. SAVE_DIR: the run folder, by default the next free ./experiments/MultiOrgan/N.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
DATA_DIR=${DATA_DIR:-./data/MultiOrgan}
case " $* " in *' --help '* | *' -h '*) exec python train.py --help ;; esac

# the run folder is settled here, so that what is tested is what was trained
set -- --dataset MultiOrgan --data-dir "$DATA_DIR" ${SAVE_DIR:+--save-dir "$SAVE_DIR"} "$@"
SAVE_DIR=$(python -c 'from options import Options; from utils import run_script
run_script(lambda: print(Options().parse().train["save_dir"]))' "$@")
python train.py "$@" --save-dir "$SAVE_DIR"

for images in test_same test_diff; do
    [ -d "$DATA_DIR/images/$images" ] || { echo "no $DATA_DIR/images/$images: not tested"; continue; }
    python test.py --dataset MultiOrgan --model-path "$SAVE_DIR/checkpoints/checkpoint_best.pth.tar" \
        --save-dir "$SAVE_DIR/best" --img-dir "$DATA_DIR/images/$images" --label-dir "$DATA_DIR/labels_instance/test"
done
