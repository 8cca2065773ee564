#!/usr/bin/env bash
# Installs the wheel in a container: bash install.sh SOURCE PLACE
# SOURCE has one wheel, constraints.txt and constraints-mii.txt; PLACE becomes a virtual environment.
set -euo pipefail
source=$1 place=$2

wheels=("$source"/*.whl)
if [ "${#wheels[@]}" -ne 1 ] || [ ! -f "${wheels[0]}" ]; then
  echo "error: $source: needs one wheel: pip wheel --no-deps -w dist ." >&2
  exit 2
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update
# Python.h and a compiler for kernels that are made when first used; ssh for launches over several machines.
apt-get install -y --no-install-recommends g++ git numactl openssh-client python3 python3-dev python3-venv

python3 -m venv "$place"
"$place/bin/python" -m pip install --no-cache-dir --disable-pip-version-check \
  -c "$source/constraints.txt" -c "$source/constraints-mii.txt" "${wheels[0]}[kernels,mlflow,slurm]"
