#!/bin/sh
# The recipe of pretrained/FullNet_MultiOrgan.pth.tar, from the authors' MultiOrgan files: prepare, train in five
# stages, score on the val images, export, and record what verify_pretrained.sh expects.
# Started again, it goes on where it stopped. Arguments go to train.py: sh scripts/train_pretrained.sh --workers 1
# RAW_DIR: the files as downloaded. DATA_DIR, DATA_500: where they are prepared, in patches of 250 and of 500 pixels.
# SAVE_DIR: run folders. INIT_FROM: weights to start from; by default none. OUT: the file of weights, by default that
# which comes with the code: it is replaced, and so are the .json, the .jpg and the facts in the .md beside it.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH            # Scripts on Windows (Git Bash)
RAW_DIR=${RAW_DIR:-./raw/MultiOrgan}
DATA_DIR=${DATA_DIR:-./data/MultiOrgan}
DATA_500=${DATA_500:-./data/MultiOrgan_500}
SAVE_DIR=${SAVE_DIR:-./experiments/pretrained}
OUT=${OUT:-./pretrained/FullNet_MultiOrgan.pth.tar}
INIT_FROM=${INIT_FROM:-}
EPOCHS_1=${EPOCHS_1:-36}               # of 48 steps: 192 patches in batches of 4
EPOCHS_2=${EPOCHS_2:-34}               # the same
EPOCHS_3=${EPOCHS_3:-72}               # of 16 steps: 48 patches in batches of 3
EPOCHS_4=${EPOCHS_4:-96}               # the same
EPOCHS_5=${EPOCHS_5:-246}              # of 12 steps: 48 patches in batches of 4
SCORES=${SCORES:-none full}            # --tta with which the weights are scored
BEST='--tta none --inside-threshold 0.3 --h-maxima 0.2 --min-area 10'      # --preset best: of study_post_processing.py

# prepare FOLDER OPTIONS: unless that is done
prepare() {
    folder=$1
    shift
    [ -f "$folder/mean_std.npy" ] ||          # written last
        python prepare_data.py --dataset MultiOrgan --raw-dir "$RAW_DIR" --data-dir "$folder" "$@"
}

# train STAGE OPTIONS: a run, or the rest of it if it has a checkpoint
train() {
    run=$SAVE_DIR/$1 latest=$SAVE_DIR/$1/checkpoints/checkpoint.pth.tar
    shift
    set -- --dataset MultiOrgan --save-dir "$run" --lr 0.002 --ema-decay 0.99 --clip-grad 5 --amp True "$@"
    if [ -f "$latest" ]; then set -- "$@" --checkpoint-path "$latest"; else set -- "$@" --overwrite True; fi
    python train.py "$@"
}

prepare "$DATA_DIR"
prepare "$DATA_500" --patch-size 500

# 1. small crops, mild augmentation, a constant rate; the averaged weights are validated
small='--input-size 144 --val-overlap 32 --batch-size 4
       --transform.train.random_affine 0.15 --transform.train.random_elastic 6 8'
train stage1 --data-dir "$DATA_DIR" --epochs "$EPOCHS_1" $small --warmup-epochs 0.5 --val-every 10 \
    ${INIT_FROM:+--init-from "$INIT_FROM"} "$@"

# 2. the same, while the rate falls to 0
train stage2 --data-dir "$DATA_DIR" --epochs "$EPOCHS_2" $small --lr-schedule cosine --warmup-epochs 0.2 \
    --val-every 17 --init-from "$SAVE_DIR/stage1/checkpoints/checkpoint.pth.tar" "$@"

# 3. crops and augmentation as published, from larger patches, which leave fewer of their pixels empty
large='--input-size 208 --val-overlap 80 --batch-size 3 --lr-schedule cosine --warmup-epochs 1'
train stage3 --data-dir "$DATA_500" --epochs "$EPOCHS_3" $large --val-every 36 \
    --init-from "$SAVE_DIR/stage2/checkpoints/checkpoint.pth.tar" "$@"

# 4. once more, the rate falling from its start again
train stage4 --data-dir "$DATA_500" --epochs "$EPOCHS_4" $large --val-every 48 \
    --init-from "$SAVE_DIR/stage3/checkpoints/checkpoint.pth.tar" "$@"
python scripts/update_batch_norm.py --model-path "$SAVE_DIR/stage4/checkpoints/checkpoint.pth.tar" \
    --data-dir "$DATA_500" --out "$SAVE_DIR/stage4/checkpoints/checkpoint_batch_norm.pth.tar"

# 5. colours that vary; this stage was trained on a GPU, in three minutes
train stage5 --data-dir "$DATA_500" --epochs "$EPOCHS_5" $large --batch-size 4 --warmup-epochs 4 --val-every 80 \
    --lr 0.001 --ema-decay 0.999 --transform.train.random_stain 0.5 0.06 0.2 \
    --init-from "$SAVE_DIR/stage4/checkpoints/checkpoint_batch_norm.pth.tar" "$@"
weights=$SAVE_DIR/stage5/checkpoints/checkpoint.pth.tar

# 6. scores on the whole val images, the file, and what others are to find with it
set --
for scored in $SCORES best; do
    case $scored in best) options=$BEST ;; *) options="--tta $scored" ;; esac
    python test.py --dataset MultiOrgan --model-path "$weights" --amp True $options \
        --img-dir "$DATA_DIR/images/val_full" --label-dir "$DATA_DIR/labels_instance/val_full" \
        --save-dir "$SAVE_DIR/scores_$scored"
    set -- "$@" "$SAVE_DIR/scores_$scored"
done
python scripts/export_pretrained.py --run "$SAVE_DIR/stage5" --checkpoint latest --data-dir "$DATA_500" \
    --licence 'CC BY-NC-SA 4.0, the licence of the MoNuSeg images (Kumar et al., IEEE TMI 2017): non-commercial use,
attribution, share alike; see pretrained/LICENSE' \
    --scores "$@" --best "$SAVE_DIR/scores_best" --out "$OUT"
python scripts/verify_pretrained.py --weights "$OUT" --write
