# Sourced by demo.sh and test.sh: from the repository's root, makes .venv once, installs the requirements into it
# whenever they change, and activates it. PYTHON names another interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PYTHON="${PYTHON:-python3}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: PYTHON: Python 3.11 or newer is needed, but '$PYTHON' is $("$PYTHON" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
if [ ! -x .venv/bin/python ]; then
    "$PYTHON" -m venv .venv || { echo "error: .venv cannot be made; on Debian: apt install python3-venv" >&2; exit 2; }
fi
wanted="$(cat requirements.txt requirements-extras.txt)"
if [ "$wanted" != "$(cat .venv/installed-requirements.txt 2>/dev/null)" ]; then
    echo "installing requirements.txt and requirements-extras.txt into .venv (some GB the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt \
        || { echo "error: the requirements could not be installed; see pip's message above" >&2; exit 2; }
    echo "$wanted" > .venv/installed-requirements.txt
fi
# shellcheck disable=SC1091
source .venv/bin/activate
python scripts/check_environment.py || exit 2
export PYTHONUNBUFFERED=1
