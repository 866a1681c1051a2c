#!/usr/bin/env bash
# The tests, in the same environment as the demo; the ten slowest are printed. --fast runs only those that take less than
# 5 s each. Other arguments go to pytest: bash scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
selected=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then selected+=(-m "not slow"); else selected+=("$argument"); fi
done
ruff check .
ruff format --check .
if pyright --version > /dev/null 2>&1; then pyright; else echo "pyright cannot be started here: types are not checked"; fi
# One thread each: the tests' tensors are too small for more, and the processes share the cores.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 --durations=10 "${selected[@]}"
