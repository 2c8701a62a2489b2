#!/bin/sh
# What --color-norm is worth: the published AJI on two val images as MoNuSeg distributes them, without and with it.
# sh scripts/score_raw_images.sh TIFFS [OPTIONS of test.py, such as --tta none]
# TIFFS: folder with TCGA-AR-A1AS-01Z-00-DX1.tif and TCGA-50-5931-01Z-00-DX1.tif. DATA_DIR: the prepared data, for the
# labels. SAVE_DIR: where the results go [./experiments/raw_images]. MODEL: weights, by default test.py's.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH            # Scripts on Windows (Git Bash)
DATA_DIR=${DATA_DIR:-./data/MultiOrgan}
SAVE_DIR=${SAVE_DIR:-./experiments/raw_images}
[ $# -gt 0 ] || { echo 'usage: sh scripts/score_raw_images.sh TIFFS [OPTIONS of test.py]' >&2; exit 2; }
tiffs=$1
shift

mkdir -p "$SAVE_DIR/raw"
for name in Breast_TCGA-AR-A1AS-01Z-00-DX1 Liver_TCGA-50-5931-01Z-00-DX1; do
    cp "$tiffs/${name#*_}.tif" "$SAVE_DIR/raw/$name.tif" || exit 2          # labels have the organ in their name
done
for color_norm in False True; do
    python test.py ${MODEL:+--model-path "$MODEL"} --img-dir "$SAVE_DIR/raw" --color-norm $color_norm \
        --label-dir "$DATA_DIR/labels_instance/val_full" --save-dir "$SAVE_DIR/color_norm_$color_norm" "$@" >&2
done
for color_norm in False True; do
    awk -v with="--color-norm $color_norm" -F '\t' '/^Metrics|^$/ { next } { print with, $1, "AJI", $NF }' \
        "$SAVE_DIR/color_norm_$color_norm/raw_test_result.txt"
done
