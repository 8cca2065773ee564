#!/usr/bin/env bash
# fastgen against the committee's loop and two other engines on this machine's CPU, in turn, and one table.
#   bash launch/bench_cpu.sh [--rounds N] [--cores 0,1] [--peers openvino,vllm] [overrides]
# The first time it makes an environment for each of the others (some GB; in $HARNESS_CACHE/peers). Nothing else should
# run meanwhile. For instance:
#   bash launch/bench_cpu.sh dataset=asc24 dataset.path=FILE dataset.num_samples=200 generation.max_output_len=256
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh ""
export DS_ACCELERATOR=cpu
exec .venv/bin/python launch/bench_cpu.py "$@"
