#!/bin/sh
# Does the trained network that comes with the code work here as it did where it was made? Minutes on 2 CPU cores.
# sh scripts/verify_pretrained.sh [DATA_DIR]: with a data folder prepared by prepare_data.py its val scores, too.
. "$(dirname "$0")/setup.sh"
exec python scripts/verify_pretrained.py "$@"
