#!/usr/bin/env bash
# From a fresh clone to a result: environment, demo model, the main job on this machine's CPU, a summary.
#   bash launch/run.sh [overrides]        for instance: bash launch/run.sh dataset.num_samples=16
# DS_ACCELERATOR=cuda runs it on a GPU instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh "" # without an argument it would be given ours
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
exec .venv/bin/python harness/main.py "$@"
