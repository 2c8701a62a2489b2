#!/bin/sh
# Set up .venv and run the whole test suite, as many tests at a time as there are CPUs; arguments go to pytest.
. "$(dirname "$0")/setup.sh"
python -m pytest tests -q -n auto --dist worksteal "$@"
