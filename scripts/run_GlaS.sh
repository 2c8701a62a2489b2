#!/bin/sh
# Train on GlaS, then test on the test sets that are there. Arguments go to train.py:
#   sh scripts/run_GlaS.sh --batch-size 4
# DATA_DIR: the prepared data. SAVE_DIR: the run folder, by default the next free ./experiments/GlaS/N.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
case " $* " in *' --help '* | *' -h '*) exec python train.py --help ;; esac

# what is tested is what was trained: run folder and data as train.py takes them
set -- --dataset GlaS --data-dir "${DATA_DIR:-./data/GlaS}" ${SAVE_DIR:+--save-dir "$SAVE_DIR"} "$@"
option() {
    name=$1
    shift
    python -c 'import sys; from options import Options; from utils import run_script
run_script(lambda: print(Options().parse(sys.argv[2:]).train[sys.argv[1]]))' "$name" "$@"
}
SAVE_DIR=$(option save_dir "$@")
DATA_DIR=$(option data_dir "$@")
[ -d "$DATA_DIR/images/testA" ] || [ -d "$DATA_DIR/images/testB" ] || {
    echo "error: neither images/testA nor images/testB in $DATA_DIR; run prepare_data.py, or set DATA_DIR" >&2
    exit 2; }
python train.py "$@" --save-dir "$SAVE_DIR"

for images in testA testB; do
    [ -d "$DATA_DIR/images/$images" ] || { echo "no $DATA_DIR/images/$images: not tested"; continue; }
    python test.py --dataset GlaS --model-path "$SAVE_DIR/checkpoints/checkpoint_best.pth.tar" \
        --save-dir "$SAVE_DIR/best" --img-dir "$DATA_DIR/images/$images" --label-dir "$DATA_DIR/labels_instance/$images"
done
