#!/usr/bin/env bash
# Proves and measures on a machine with CUDA GPUs, and no network, what the harness claims: stages, a table, an archive.
#   bash launch/gpu_acceptance.sh                 all stages that are not done; --help has the options
#   bash launch/gpu_acceptance.sh --rehearse      the same without a GPU: the CPU, stand-ins, tiny sizes
# ACCEPTANCE_WHEELS=DIR: what launch/collect_wheels.sh made. The packages go into .venv-acceptance, which sees those of
#   PYTHON (python3), and the demo model to where the harness looks for it. Without it: .venv, made if it is not there.
# ACCEPTANCE_KERNELS=FILE: kernels.tar.gz of an earlier start on such a machine.
# launch/acceptance/README.md has the rest.
set -euo pipefail
ACCEPTANCE_STARTED=${ACCEPTANCE_STARTED:-$(date +%s)}
export ACCEPTANCE_STARTED
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

# Makes an environment that sees the packages of the interpreter $1, and installs the wheels of $2 into it.
install_wheels() {
  local python=.venv-acceptance/bin/python own
  rm -rf .venv-acceptance &&
    # Neither ensurepip nor an index need be there: pip is the interpreter's own.
    "$1" -m venv --without-pip --system-site-packages .venv-acceptance &&
    own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') &&
    # Where the interpreter belongs to an environment itself, that one's packages are not the system's.
    "$1" -c 'import site, sysconfig; print(*{sysconfig.get_path("purelib"): 0, sysconfig.get_path("platlib"): 0,
      **dict.fromkeys(site.getsitepackages())}, sep="\n")' >"$own/parent.pth" &&
    { "$python" -m pip --version || "$python" -m ensurepip; } &&
    "$python" -m pip install --disable-pip-version-check --no-index --no-deps "$2"/wheels/*.whl &&
    # Compiled kernels that were brought along are newer than their sources then, and ninja leaves them.
    find .venv-acceptance/lib -type f ! -name '*.py*' -exec touch -d 2020-01-01 {} +
}

# Puts the demo model to where the harness looks for it and makes the environment; the second time it finds it done.
from_wheels() {
  local base=$1 wheels=$2 model stamp log=.venv-setup.acceptance.log
  [ -f "$wheels/SHA256SUMS" ] ||
    fail "ACCEPTANCE_WHEELS: $wheels has no SHA256SUMS; give a folder that launch/collect_wheels.sh made"
  model=$(PYTHONPATH=$PWD "$base" -c 'from harness.models import demo; print(demo.cache_root() / demo.NAME)' 2>&1) ||
    fail "PYTHON: $base: ${model##*$'\n'}; give one of 3.11 or newer"
  bash "$wheels/join.sh" "$model" || fail "ACCEPTANCE_WHEELS: $wheels is not whole (see above); copy it again"
  stamp="$(sha256sum <"$wheels/SHA256SUMS") $base $("$base" --version) $PWD"
  exec 9>.venv-setup.acceptance.lock
  if command -v flock >/dev/null; then flock 9; fi # two at once: the second waits
  if [ "$(cat .venv-acceptance/installed 2>/dev/null)" != "$stamp" ]; then
    echo "setting up .venv-acceptance with $("$base" --version) (once; log in $log)" >&2
    install_wheels "$base" "$wheels" >"$log" 2>&1 ||
      fail "set-up: the wheels could not be installed: $(tail -n 1 "$log") (see $log)"
    echo "$stamp" >.venv-acceptance/installed
  fi
  exec 9>&-
}

case " $* " in
*" --rehearse "*)
  source launch/setup.sh test
  .venv/bin/python -c 'import importlib.metadata as m; m.version("deepspeed-mii")' 2>/dev/null ||
    PYTHON=.venv/bin/python bash launch/install_mii.sh
  python=.venv/bin/python
  ;;
*)
  if [ -n "${ACCEPTANCE_WHEELS:-}" ]; then
    # The environment that is made of it, first on PATH perhaps, is not the interpreter to make it of.
    base=$(PATH=${PATH//"$PWD/.venv-acceptance/bin:"/} command -v "${PYTHON:-python3}") ||
      fail "PYTHON: no such interpreter: ${PYTHON:-python3}; give the one with torch"
    from_wheels "$base" "$ACCEPTANCE_WHEELS"
    python=.venv-acceptance/bin/python
    PATH=$PATH:$(dirname "$base") # ninja and the like
  else
    if [ ! -x .venv/bin/python ]; then
      source launch/setup.sh ""
      bash launch/install_mii.sh || echo "note: no DeepSpeed-MII: stage mii will say so" >&2
    fi
    python=.venv/bin/python
  fi
  ;;
esac
export PATH="$PWD/$(dirname "$python"):$PATH"
export PYTHONPATH="$PWD:$PWD/launch:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m acceptance "$@"
