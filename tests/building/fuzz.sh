#!/usr/bin/env bash
# Random calls: of the core under AddressSanitizer and UndefinedBehaviorSanitizer, and of the
# TensorFlow operators. Needs the environment of `make build`.
#
#   tests/building/fuzz.sh                               both at the same time, for a minute, the same
#                                                        calls every time
#   tests/building/fuzz.sh core --count 1000000          that many calls of the core
#   tests/building/fuzz.sh operators --count 100000      or of the operators; other arguments: fuzz.py
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python

fuzz() {
  case $1 in
    core) with_asan "$python" tests/building/fuzz.py "$@" ;;
    *) TF_CPP_MIN_LOG_LEVEL=3 "$python" tests/building/fuzz.py "$@" ;;
  esac
}

[[ ${1:-core} == core ]] && source tests/building/asan.sh >/dev/null
if (($# > 0)); then
  fuzz "$@"
  exit
fi
fuzz operators --seconds 55 --seed 1 &
operators=$!
fuzz core --seconds 55 --seed 1
wait "$operators"
