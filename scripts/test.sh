#!/usr/bin/env bash
# The tests, in the same environment as the demo. Arguments go to pytest: bash scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
# One thread each: the tests' tensors are too small for more, and the processes share the cores.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 "$@"
