# Sourced by run_MO.sh and run_GlaS.sh with their arguments, which go to train.py: train, then test on those of
# $test_sets that are there. dataset: as for --dataset. label_set: the folder of their labels in labels_instance, by
# default that of the images' name.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH            # Scripts on Windows (Git Bash)
case " $* " in *' --help '* | *' -h '*) exec python train.py --help ;; esac

# what is tested is what was trained: run folder and data as train.py takes them
set -- --dataset "$dataset" --data-dir "${DATA_DIR:-./data/$dataset}" ${SAVE_DIR:+--save-dir "$SAVE_DIR"} "$@"
folders=$(python -c 'from options import Options; from support.script import run_script
run_script(lambda: print("{save_dir}\n{data_dir}".format(**Options().parse().train)))' "$@")
{ IFS= read -r SAVE_DIR; IFS= read -r DATA_DIR; } <<EOF
$folders
EOF
python train.py "$@" --save-dir "$SAVE_DIR"

for images in $test_sets; do
    [ -d "$DATA_DIR/images/$images" ] || { echo "no $DATA_DIR/images/$images: not tested"; continue; }
    python test.py --dataset "$dataset" --model-path "$SAVE_DIR/checkpoints/checkpoint_best.pth.tar" \
        --save-dir "$SAVE_DIR/best" --img-dir "$DATA_DIR/images/$images" \
        --label-dir "$DATA_DIR/labels_instance/${label_set:-$images}"
done
