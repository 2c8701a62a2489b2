#!/bin/sh
# The paper's ablation: FCN_pooling, FullNet, FullNet + varCE, and the last without weight maps, each with every seed,
# for equal steps and for equal minutes. Table and picture: $OUT/ablation.md and .png. Started again, it goes on.
#   DATA_DIR=data/MultiOrgan MINUTES=30 SEEDS='1 2' sh scripts/run_ablation.sh [--growth-rate 8 ...]
# Arguments go to scripts/ablation.py, what it does not know to train.py.
. "$(dirname "$0")/setup.sh"
exec python scripts/ablation.py --data-dir "${DATA_DIR:-./data/MultiOrgan}" --out "${OUT:-./experiments/ablation}" \
    --minutes "${MINUTES:-30}" --seeds ${SEEDS:-1 2} "$@"
