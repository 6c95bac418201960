#!/usr/bin/env bash
# Tests the CUDA kernels without a GPU (cc/sim): all tests of tests/emulated against the reference,
# the mutation suite and one call of every kernel under the race detector, and the same calls under
# AddressSanitizer and UndefinedBehaviorSanitizer. Needs the environment of `make build`.
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
  # Chained, because nothing stops at an error in what `run` calls.
  cmake -S . -B "$1" -GNinja -DPython_EXECUTABLE="$python" -DPERFORMER_EMULATION=ON \
    -DPERFORMER_TENSORFLOW=OFF -DPERFORMER_BINDINGS=OFF "${@:2}" >/dev/null &&
    cmake --build "$1" --parallel "$(nproc)" --target performer_emulated performer_probes >/dev/null
}
# tests FOLDER ARGUMENTS...
tests() {
  PYTHONPATH=$1/emulated:python "$python" -m pytest -q -p no:cacheprovider "${@:2}"
}

if (($# > 0)); then
  build build/emulated
  tests build/emulated "$@"
  exit
fi

races() {
  build build/races -DPERFORMER_RACES=ON &&
    tests build/races tests/emulated/test_{emulator,memory,mutations}.py
}
sanitizers() {
  build build/asan-emulated "-DPERFORMER_SANITIZE=address;undefined" &&
    LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)" \
      ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
      tests build/asan-emulated --capture=sys tests/emulated/test_{emulator,memory}.py
}
# Tests run on one core, so two of the three go on at a time.
run() {
  echo "-- $2"
  ("$1") >"$logs/$1" 2>&1 || { cat "$logs/$1"; exit 1; }
  tail -1 "$logs/$1"
}
plain() {
  build build/emulated &&
    tests build/emulated tests/emulated tests/gpu/test_ptx.py
}
run plain "against the reference" &
plain_job=$!
run races "race detector, mutations"
run sanitizers "AddressSanitizer, UndefinedBehaviorSanitizer"
wait "$plain_job"
