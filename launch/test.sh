#!/usr/bin/env bash
# From a fresh clone to a tested one: environment, DeepSpeed-MII, lint, types, the whole test suite.
#   bash launch/test.sh [pytest arguments]        for instance: bash launch/test.sh -k scheduler
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh test
PYTHON=.venv/bin/python bash launch/install_mii.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two files of tests at a time: most of the time goes into starting ranks. One thread each, or they wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
