#!/usr/bin/env bash
# The tests, in the same environment as the demo; the ten slowest are printed. --fast leaves out those marked slow and
# the type checker: minutes on two cores. Other arguments go to pytest: bash scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
selected=() fast=no
for argument in "$@"; do
    if [ "$argument" = --fast ]; then fast=yes selected+=(-m "not slow"); else selected+=("$argument"); fi
done
ruff check .
ruff format --check .
if [ "$fast" = yes ]; then :
elif pyright --version > /dev/null 2>&1; then pyright; else echo "pyright cannot be started here: types are not checked"; fi
# One thread each: the tests' tensors are too small for more, and the processes share the cores.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --maxprocesses 4 --durations=10 "${selected[@]}"
