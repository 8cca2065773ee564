#!/usr/bin/env bash
# Installs DeepSpeed-MII for engine=mii, in the versions of launch/constraints-mii.txt and without the dependencies
# it declares: torch, transformers and deepspeed stay as they are. The second time it finds it done.
#   bash launch/install_mii.sh                    into .venv, which is made if it is not there
#   PYTHON=python3 bash launch/install_mii.sh     into that interpreter's environment, only what is missing there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

if [ -n "${PYTHON:-}" ]; then
  python=$(command -v "$PYTHON") || fail "PYTHON: no such interpreter: $PYTHON; give one that has torch, or unset it"
else
  # shellcheck source=launch/setup.sh
  [ -x .venv/bin/python ] || source launch/setup.sh ""
  python=.venv/bin/python
fi
log=.venv-setup.mii.log

# Prints what is to be installed, a line each.
wanted() {
  "$python" - <<'CODE'
import importlib.metadata
import os
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable} has no torch ({error})")
own = os.path.realpath(sys.prefix) == os.path.realpath(".venv")
for line in open("launch/constraints-mii.txt", encoding="utf-8"):
    name, _, version = line.strip().partition("==")
    if not version or (name == "deepspeed-kernels" and torch.version.cuda is None):
        continue  # the prebuilt half of DeepSpeed's CUDA kernels
    try:
        there = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        there = None
    # Another environment may need its own versions of what is there for others as well.
    if there is None or (there != version and (own or name == "deepspeed-mii")):
        print(f"{name}=={version}")
CODE
}

missing=$(wanted 2>"$log") || fail "set-up: $(tail -n 1 "$log"); run bash launch/run.sh first, or set PYTHON"
if [ -n "$missing" ]; then
  mapfile -t packages <<<"$missing"
  echo "installing ${packages[*]} (log in $log)" >&2
  if [ "$("$python" -c 'import sys; print(sys.prefix)')" = "$PWD/.venv" ]; then
    packages+=(-c launch/constraints.txt)
  fi
  "$python" -m pip install --disable-pip-version-check --no-deps "${packages[@]}" >"$log" 2>&1 ||
    fail "set-up: DeepSpeed-MII could not be installed: $(grep -m 1 -i error "$log") (see $log); put that right and run again"
fi
# The last line alone: DeepSpeed may write a note of its own before it.
"$python" -c 'import mii, mii.batching; print(f"deepspeed-mii {mii.__version__.strip()} is ready")' 2>"$log" | tail -n 1 ||
  fail "set-up: DeepSpeed-MII does not import: $(tail -n 1 "$log") (see $log); put that right and run again"
