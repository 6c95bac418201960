#!/usr/bin/env bash
# What only time or force shows: memory over time, kills in the middle of saving, limits on memory;
# all at once, as they mostly wait. Needs the environment of `make build`.
#
#   tests/building/endure.sh [SECONDS]    of the soak, 90 by default
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$PWD/.venv/bin/python
logs=build/endure-logs
mkdir -p "$logs"

# run NAME ARGUMENTS...
run() {
  "$python" "tests/building/$1.py" "${@:2}" >"$logs/$1" 2>&1 || { cat "$logs/$1"; return 1; }
  grep "^$1:" "$logs/$1"
}
run soak --seconds "${1:-90}" --plot "$logs/memory.png" &
jobs=($!)
run kills --kills 3 &
jobs+=($!)
run limits &
jobs+=($!)
status=0
for job in "${jobs[@]}"; do wait "$job" || status=1; done
exit $status
