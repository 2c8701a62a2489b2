# Sourced by the other scripts, or run to install only: go to the project's folder, make .venv there once, install
# requirements.txt into it.
# Needs Python 3.10 or later; PYTHON=/path/to/python3 chooses one.
set -eu
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PWD/.venv/Scripts:$PATH                         # Scripts on Windows (Git Bash)
if [ ! -x .venv/bin/python ] && [ ! -x .venv/Scripts/python.exe ]; then
    python=${PYTHON:-}
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        [ -n "$python" ] && break
        if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
        then python=$name; fi
    done
    [ -n "$python" ] || { echo 'error: no Python 3.10 or later was found; install one, or set PYTHON' >&2; exit 2; }
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv || { rm -rf .venv
        echo "error: $python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
        exit 2; }
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
    echo 'installing requirements.txt into .venv (on Linux PyTorch with CUDA, several GB; CPU-only: see README)'
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
