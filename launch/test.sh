#!/usr/bin/env bash
# From a fresh clone to a tested one: environment, DeepSpeed-MII, lint, types, tests.
#   bash launch/test.sh            every module, and a real launch of each kind: minutes
#   bash launch/test.sh --all      every case: what CI runs, 20 to 30 minutes on two cores
#   bash launch/test.sh --full     with all repetitions of the tests marked endurance: an hour or two
# Further arguments are pytest's: bash launch/test.sh -k scheduler
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh test
PYTHON=.venv/bin/python bash launch/install_mii.sh
# Python keeps what it compiles, or each of the hundreds of processes that tests start compiles the harness anew.
unset PYTHONDONTWRITEBYTECODE
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
# Beside the tests: the first time it takes half a minute, of one core.
.venv/bin/mypy &
types=$!
# Three tests at a time: some wait for processes that they started; four on two cores took longer. One thread each, or
# they wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
status=0
.venv/bin/python -m pytest -n 3 --dist worksteal "$@" || status=$?
wait "$types" || { echo "error: types: mypy has found errors (above); put them right" >&2; exit 1; }
exit "$status"
