#!/usr/bin/env bash
# Fills a folder with what a GPU machine without a network lacks: wheels, and the demo model cut into parts.
#   bash launch/collect_wheels.sh --python 3.12 --torch 2.11+cu130 --out DIR [--part-size 60M] [--present FILE] [--no-model]
# launch/README.md says what lies there, and how it is put to use. PYTHON=... is an interpreter of that version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
[ -x .venv/bin/python ] || source launch/setup.sh ""
exec .venv/bin/python launch/collect_wheels.py "$@"
