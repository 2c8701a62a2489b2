#!/bin/sh
# The whole method on a small built-in data set, from nothing but Python: set up .venv, make images, prepare, train a
# reduced FullNet, test, test again without labels, compare with Otsu's threshold. About 4 minutes on 2 CPU cores.
# `--short` runs the same commands on less data and for one epoch, to see that they work; its scores mean nothing.
out=demo images='' epochs=20
case "${1:-}" in
    '') ;;
    --short) out=demo/short images='--train 1 --val 1 --test 1 --size 256' epochs=1 ;;
    *) echo 'usage: sh scripts/run_demo.sh [--short]' >&2; exit 2 ;;
esac
. "$(dirname "$0")/setup.sh"
run() { echo "\$ $*"; "$@"; }

run python scripts/make_demo_data.py $out/raw $images
run python prepare_data.py --raw-dir $out/raw --data-dir $out/data
run python weight_map.py --label-dir $out/data/labels_instance/test --save-dir $out/weight_maps_test
run python train.py --data-dir $out/data --save-dir $out/run --overwrite True --n-layers 4 --growth-rate 8 \
    --epochs $epochs --batch-size 4 --input-size 160 --val-overlap 32 --lr 0.003 --lr-schedule onecycle \
    --val-every $epochs --log-interval 1000
run python test.py --model-path $out/run/checkpoints/checkpoint_best.pth.tar --save-dir $out/results \
    --img-dir $out/data/images/test_same --label-dir $out/data/labels_instance/test
run python test.py --model-path $out/run/checkpoints/checkpoint_best.pth.tar --save-dir $out/results_without_labels \
    --img-dir $out/data/images/val_full --label-dir '' --tta none
echo
echo "Scores on the held-out images, from $out/results/test_same_test_result.txt:"
run python scripts/demo_report.py --data-dir $out/data --result-dir $out/results --out $out/overview.png
echo "Pictures: $out/overview.png (all stages of one image), $out/results/test_same_segmentation/*_seg_colored.png,"
echo "$out/results/test_same_prob_maps/, $out/results_without_labels/, $out/run/learning_curve.png"
