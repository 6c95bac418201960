#!/usr/bin/env bash
# Tests the CUDA kernels without a GPU (cc/sim): all tests of tests/emulated against the reference,
# the mutation suite, the memory that kernels move and one call of every kernel under the race
# detector, and the same calls under AddressSanitizer and UndefinedBehaviorSanitizer. Needs the
# environment of `make build`.
#
#   tests/building/emulate.sh                 everything
#   tests/building/emulate.sh ARGUMENTS...    only the plain build, pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$PWD/.venv/bin/python
export PERFORMER_CUDA=OFF PATH=$PWD/.venv/bin:$PATH PERFORMER_DISABLE_LIBRARY=1
logs=build/emulate-logs
mkdir -p "$logs"

# build FOLDER OPTIONS...
build() {
  local log=$logs/${1##*/}-build
  # Chained, because nothing stops at an error before `||`.
  cmake -S . -B "$1" -GNinja -DPython_EXECUTABLE="$python" -DPERFORMER_EMULATION=ON \
    -DPERFORMER_TENSORFLOW=OFF -DPERFORMER_BINDINGS=OFF "${@:2}" >"$log" &&
    cmake --build "$1" --parallel "$(nproc)" --target performer_emulated performer_probes \
      >>"$log" || { cat "$log"; return 1; }
}
# tests FOLDER ARGUMENTS...: in place of the shell.
tests() {
  export PYTHONPATH=$1/emulated:python
  exec "$python" -m pytest -q -p no:cacheprovider "${@:2}"
}

if (($# > 0)); then
  build build/emulated
  tests build/emulated "$@"
fi

races() { tests build/races tests/emulated/test_{emulator,memory,mutations,traffic}.py; }
sanitizers() {
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    tests build/asan-emulated --capture=sys tests/emulated/test_{emulator,memory}.py
}
# The other two have run the tests of memory, with more to see.
plain() {
  tests build/emulated --numprocesses=2 --dist=worksteal \
    --ignore tests/emulated/test_memory.py tests/emulated tests/gpu/test_ptx.py
}
# Tests go on while the next build is made; those that take one core begin, so that the cores are
# busy to the end.
jobs=()
trap 'kill "${jobs[@]}" 2>/dev/null || true' EXIT
start() {
  "$1" >"$logs/$1" 2>&1 &
  jobs+=($!)
}
build build/races -DPERFORMER_RACES=ON
start races
build build/asan-emulated "-DPERFORMER_SANITIZE=address;undefined"
start sanitizers
build build/emulated
start plain

status=0
finish() {
  echo "-- $2"
  if wait "$1"; then tail -1 "$logs/$3"; else cat "$logs/$3"; status=1; fi
}
finish "${jobs[0]}" "race detector, mutations" races
finish "${jobs[1]}" "AddressSanitizer, UndefinedBehaviorSanitizer" sanitizers
finish "${jobs[2]}" "against the reference" plain
trap - EXIT
exit $status
