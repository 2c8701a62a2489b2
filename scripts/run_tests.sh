#!/bin/sh
# Set up .venv and run the whole test suite; arguments go to pytest.
. "$(dirname "$0")/setup.sh"
python -m pytest tests -q "$@"
