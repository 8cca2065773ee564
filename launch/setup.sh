#!/usr/bin/env bash
# Makes .venv with the exact packages of launch/constraints.txt; the second time it finds it done.
# Sourced by run.sh and test.sh:   source launch/setup.sh [extra]
# PYTHON=... chooses the interpreter (3.11 or newer).

fail() { echo "error: $*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "PYTHON: no Python 3.11 or newer among: ${PYTHON:-python3 python3.11 python3.12 python3.13}; install one or set PYTHON"
}

install_packages() {
  local extra=$1 stamp=$2 python
  python=$(find_python) || exit 2
  command -v g++ >/dev/null || echo "note: no g++: fastgen then computes with PyTorch, which is slower" >&2
  echo "setting up .venv with $("$python" --version) (once; 1 to 3 minutes, log in .venv-setup.log)" >&2
  {
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check -c launch/constraints.txt -e ".${extra:+[$extra]}"
  } >.venv-setup.log 2>&1 || {
    tail -n 5 .venv-setup.log >&2
    fail "set-up: the packages could not be installed (see .venv-setup.log); put that right and run again"
  }
  install_kernels
  echo "$stamp" >".venv/installed${extra:+-$extra}"
}

# The prebuilt half of DeepSpeed's ragged kernels, where torch computes with CUDA; all else works without it.
install_kernels() {
  .venv/bin/python -c 'import sys; from harness.machine import device; sys.exit(device.torch_cuda_version() is None)' || return 0
  .venv/bin/python -m pip install --disable-pip-version-check -c launch/constraints.txt -c launch/constraints-mii.txt \
    -e ".[kernels]" >>.venv-setup.log 2>&1 ||
    echo "note: deepspeed-kernels could not be installed (see .venv-setup.log): engine.kernels=deepspeed will not be there" >&2
}

set_up() {
  local extra=${1:-} stamp
  # What was installed follows from these files, and from where the checkout lies.
  stamp=$(cat setup.cfg launch/constraints.txt launch/setup.sh <(pwd) | sha256sum | cut -d' ' -f1)
  exec 9>.venv-setup.lock
  if command -v flock >/dev/null; then flock 9; fi # two launches at once: the second waits
  if [ ! -x .venv/bin/python ] || [ "$(cat ".venv/installed${extra:+-$extra}" 2>/dev/null)" != "$stamp" ]; then
    install_packages "$extra" "$stamp"
  fi
  exec 9>&-
}

set_up "$@"
