#!/bin/sh
# The paper's experiment in one command, for a machine with a GPU: prepare, train, test, and a table beside the paper's.
#   sh scripts/reproduce.sh MultiOrgan|GlaS [MINUTES] [OPTIONS of train.py, such as --batch-size 4]
# Started again, it goes on where it stopped, and keeps what is finished. Nothing is installed: .venv is used if it is
# there, else python3 or python. `sh scripts/reproduce.sh --help` says more.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3 || command -v python) || {
    echo 'error: no .venv, python3 or python was found; install Python 3.10 or later' >&2; exit 2; }
exec "$python" scripts/reproduce.py "$@"
