#!/usr/bin/env bash
# The tests, in the same environment as the demo. Arguments go to pytest: bash scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ruff check .
ruff format --check .
python -m pytest "$@"
