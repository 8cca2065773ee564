#!/usr/bin/env bash
# Makes results/reference/sample anew: the runs of the shipped prompts that README.md quotes, on this machine's CPU.
#   bash launch/reference.sh         about 8 minutes; nothing else should run meanwhile
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh ""
export DS_ACCELERATOR=cpu
results=results/reference/sample
rm -rf "$results"
.venv/bin/python harness/main.py repeat=3 results_dir="$results"
.venv/bin/python harness/main.py -m engine.token_budget=64,128,256 results_dir="$results"
.venv/bin/python harness/main.py -m engine.kernels=torch parallel.dp=1,2 results_dir="$results"
.venv/bin/python harness/main.py engine=baseline results_dir="$results"
rm -rf "$results"/.multirun "$results"/*.lock
exec .venv/bin/python -m harness.compare "$results"
