#!/bin/sh
# The recipe of pretrained/FullNet_MultiOrgan.pth.tar, from the authors' MultiOrgan files: prepare, train in two stages,
# score on the val images, export, and record what verify_pretrained.sh expects. Started again, it goes on where it
# stopped. Arguments go to train.py: sh scripts/train_pretrained.sh --workers 1
# RAW_DIR: the files as downloaded. DATA_DIR: where they are prepared. SAVE_DIR: run folders. OUT: the file of weights.
# INIT_FROM: weights to start from; by default none.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH=$PWD/.venv/bin:$PATH
RAW_DIR=${RAW_DIR:-./raw/MultiOrgan}
DATA_DIR=${DATA_DIR:-./data/MultiOrgan}
SAVE_DIR=${SAVE_DIR:-./experiments/pretrained}
OUT=${OUT:-./pretrained/FullNet_MultiOrgan.pth.tar}
INIT_FROM=${INIT_FROM:-}
EPOCHS_1=${EPOCHS_1:-200}              # of 48 steps: 192 patches in batches of 4
EPOCHS_2=${EPOCHS_2:-40}               # of 96 steps: in batches of 2
SCORES=${SCORES:-none full}            # test-time augmentation with which the weights are scored

# train STAGE OPTIONS: a run, or the rest of it if it has a checkpoint
train() {
    run=$SAVE_DIR/$1 latest=$SAVE_DIR/$1/checkpoints/checkpoint.pth.tar
    shift
    set -- --dataset MultiOrgan --data-dir "$DATA_DIR" --save-dir "$run" "$@"
    if [ -f "$latest" ]; then set -- "$@" --checkpoint-path "$latest"; else set -- "$@" --overwrite True; fi
    python train.py "$@"
}

[ -f "$DATA_DIR/mean_std.npy" ] ||        # written last
    python prepare_data.py --dataset MultiOrgan --raw-dir "$RAW_DIR" --data-dir "$DATA_DIR"

# 1. small crops, a constant rate; the averaged weights are validated
train stage1 --epochs "$EPOCHS_1" --input-size 144 --val-overlap 32 --batch-size 4 --lr 0.002 --warmup-epochs 0.5 \
    --ema-decay 0.99 --clip-grad 5 --transform.train.random_affine 0.15 --transform.train.random_elastic 6 8 \
    --amp True --val-every 10 ${INIT_FROM:+--init-from "$INIT_FROM"} "$@"

# 2. crops of the published size, the rate falls to 0
train stage2 --epochs "$EPOCHS_2" --input-size 208 --val-overlap 80 --batch-size 2 --lr 0.001 --lr-schedule cosine \
    --ema-decay 0.99 --clip-grad 5 --transform.train.random_affine 0.15 --transform.train.random_elastic 6 8 \
    --amp True --val-every 5 --init-from "$SAVE_DIR/stage1/checkpoints/checkpoint_best.pth.tar" "$@"

# 3. scores on the whole val images, the file, and what others are to find with it
set --
for tta in $SCORES; do
    python test.py --dataset MultiOrgan --model-path "$SAVE_DIR/stage2/checkpoints/checkpoint_best.pth.tar" \
        --img-dir "$DATA_DIR/images/val_full" --label-dir "$DATA_DIR/labels_instance/val_full" \
        --tta "$tta" --save-dir "$SAVE_DIR/scores_$tta"
    set -- "$@" "$SAVE_DIR/scores_$tta"
done
python scripts/export_pretrained.py --run "$SAVE_DIR/stage2" --data-dir "$DATA_DIR" --scores "$@" --out "$OUT"
python scripts/verify_pretrained.py --weights "$OUT" --write
