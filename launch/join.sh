#!/usr/bin/env bash
# Checks all that launch/collect_wheels.sh wrote beside this file, and joins the demo model from its parts:
#   bash join.sh TARGET_MODEL_DIR
# The files may have come in any order and on several trips. The second time it finds the model there.
set -euo pipefail
export LC_ALL=C

fail() { echo "error: $*" >&2; exit 2; }

[ $# = 1 ] || fail "usage: bash join.sh TARGET_MODEL_DIR"
mkdir -p "$1" 2>/dev/null || fail "TARGET_MODEL_DIR: $1 cannot be made; name a directory that can be written"
target=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")"
[ -f SHA256SUMS ] || fail "not there: $PWD/SHA256SUMS; carry the whole folder"
whole=model/model.safetensors # listed, though only its parts lie here
carried=$(grep -v "  $whole\$" SHA256SUMS)
model=$(grep "  model/" SHA256SUMS | grep -v "\.part\$" | sed "s|  model/|  |") || true # none with --no-model

missing=$(while read -r _ name; do [ -f "$name" ] || echo "$name"; done <<<"$carried")
[ -z "$missing" ] || fail "not there: ${missing//$'\n'/ }; carry that to $PWD"
damaged=$(sha256sum --check --quiet 2>/dev/null <<<"$carried" | sed "s/: FAILED.*//") || true
[ -z "$damaged" ] || fail "damaged: ${damaged//$'\n'/ }; carry that to $PWD again"

if [ -z "$model" ]; then
  echo "the wheels are complete; the demo model did not come with them"
  exit 0
fi
there() { (cd "$1" && sha256sum --check --status 2>/dev/null <<<"$model"); }
if there "$target"; then
  echo "$target is complete"
  exit 0
fi
# Joined beside what may be there, so that nobody finds half a file.
joining=$(mktemp -d "$target/.joining-XXXXXX")
trap 'rm -rf "$joining"' EXIT
mapfile -t parts < <(sed -n "s|.*  \(model/.*\.part\)\$|\1|p" SHA256SUMS | sort)
cat "${parts[@]}" >"$joining/${whole#model/}" || fail "TARGET_MODEL_DIR: $target cannot be written; is its disk full?"
while read -r _ name; do
  [ "model/$name" = "$whole" ] || cp "model/$name" "$joining/"
done <<<"$model"
there "$joining" || fail "model: its parts are whole, but not what was cut; run launch/collect_wheels.sh again"
mv -f "$joining"/* "$target/"
echo "$target is complete"
