#!/usr/bin/env bash
# Runs the tests with the versions of launch/constraints-other.txt (Python 3.12, torch 2.11, ...), in an environment of
# their own, which is made the first time (some 8 GB: it has a CUDA build of torch).
#   bash launch/other_versions.sh                         .venv-other, the default tier
#   bash launch/other_versions.sh DIR -k scheduler        the environment in DIR; what follows is pytest's
# PYTHON=... chooses the interpreter, default python3.12.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

directory=.venv-other
case "${1:-}" in "" | -*) ;; *) directory=$1; shift ;; esac
log=.venv-setup.other.log
names=$(sed -nE 's/^([A-Za-z0-9_.-]+)==.*/\1/p' launch/constraints-other.txt | paste -sd '|')
constraints=$(cat launch/constraints-other.txt; grep -viE "^($names)==" launch/constraints.txt)
stamp=$(cat setup.cfg launch/constraints-mii.txt <(echo "$constraints") <(pwd) | sha256sum | cut -d' ' -f1)

if [ "$(cat "$directory/installed" 2>/dev/null)" != "$stamp" ]; then
  # Where pyenv answers to the name, it must be told which.
  python=$(PYENV_VERSION=${PYENV_VERSION:-3.12} "${PYTHON:-python3.12}" -c 'import sys; print(sys.executable)' 2>/dev/null) ||
    fail "PYTHON: no such interpreter: ${PYTHON:-python3.12}; install it or set PYTHON"
  echo "setting up $directory with $("$python" --version) (once; several minutes, log in $log)" >&2
  {
    [ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
    echo "$constraints" >"$directory/constraints.txt"
    "$directory/bin/python" -m pip install --disable-pip-version-check -c "$directory/constraints.txt" -e ".[test]"
  } >"$log" 2>&1 ||
    fail "set-up: $directory could not be filled: $(tail -n 1 "$log") (see $log); put that right and run again"
  PYTHON=$directory/bin/python bash launch/install_mii.sh
  echo "$stamp" >"$directory/installed"
fi
# One thread each, as in test.sh.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$directory/bin/python" -m pytest -n 3 --dist worksteal "$@"
