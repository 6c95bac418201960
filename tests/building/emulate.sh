#!/usr/bin/env bash
# Tests the CUDA kernels without a GPU (cc/sim): all tests of tests/emulated against the reference,
# the mutation suite, the memory that kernels move and one call of every kernel under the race
# detector, and the same calls under AddressSanitizer and UndefinedBehaviorSanitizer. Then the PTX of
# the kernels, interpreted (tests/ptx): that of the library where `make build` has made the kernels;
# otherwise, with PERFORMER_CUDA=ON, it is compiled here, which takes minutes. Needs the environment of
# `make build`.
#
#   tests/building/emulate.sh                 everything
#   tests/building/emulate.sh ARGUMENTS...    only the plain build, pytest with these arguments; with
#                                             the interpreter, if they name tests/ptx
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$PWD/.venv/bin/python
cuda=${PERFORMER_CUDA:-AUTO}
export PERFORMER_CUDA=OFF PATH=$PWD/.venv/bin:$PATH PERFORMER_DISABLE_LIBRARY=1
logs=build/emulate-logs
mkdir -p "$logs"

# make_targets FOLDER "TARGETS" OPTIONS...
make_targets() {
  local log=$logs/${1##*/}-build targets
  read -ra targets <<<"$2"
  # Chained, because nothing stops at an error before `||`.
  cmake -S . -B "$1" -GNinja -DPython_EXECUTABLE="$python" \
    -DPERFORMER_TENSORFLOW=OFF -DPERFORMER_BINDINGS=OFF "${@:3}" >"$log" &&
    cmake --build "$1" --parallel "$(nproc)" --target "${targets[@]}" >>"$log" ||
    { cat "$log"; return 1; }
}
# build FOLDER OPTIONS...
build() {
  make_targets "$1" "performer_emulated performer_probes" -DPERFORMER_EMULATION=ON "${@:2}"
}
# The interpreter, in build/ptx. Returns 1 where there is no PTX to interpret.
build_interpreter() {
  local library options=(-DPERFORMER_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=90-virtual)
  options+=(-DPERFORMER_CUDA_LIBRARY=)
  library=$(find build/editable-* -maxdepth 1 -name libperformer_cuda.a 2>/dev/null | head -1)
  if [[ -n $library && -z $(find cc/core cc/cuda -type f -newer "$library") ]]; then
    options=(-DPERFORMER_CUDA=OFF "-DPERFORMER_CUDA_LIBRARY=$PWD/$library")
  elif [[ $cuda != ON ]]; then
    return 1
  fi
  make_targets build/ptx performer_ptx -DPERFORMER_PTX=ON "${options[@]}" || exit 1
}
# tests FOLDER ARGUMENTS...: in place of the shell.
tests() {
  export PYTHONPATH=$1/emulated:build/ptx/ptx:python
  exec "$python" -m pytest -q -p no:cacheprovider "${@:2}"
}

if (($# > 0)); then
  build build/emulated
  if [[ $* == *tests/ptx* ]]; then
    build_interpreter || { echo "no PTX: build the kernels first, or set PERFORMER_CUDA=ON"; exit 1; }
  fi
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
interpreted() { tests build/emulated --numprocesses=2 --dist=worksteal tests/ptx; }
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
interpreter=yes
build_interpreter || interpreter=no
[[ $interpreter == no ]] || start interpreted

status=0
finish() {
  echo "-- $2"
  if wait "$1"; then tail -1 "$logs/$3"; else cat "$logs/$3"; status=1; fi
}
finish "${jobs[0]}" "race detector, mutations" races
finish "${jobs[1]}" "AddressSanitizer, UndefinedBehaviorSanitizer" sanitizers
finish "${jobs[2]}" "against the reference" plain
if [[ $interpreter == yes ]]; then
  finish "${jobs[3]}" "PTX, interpreted" interpreted
else
  echo "-- PTX, interpreted: left out, as no kernels are built here (PERFORMER_CUDA=ON)"
fi
trap - EXIT
exit $status
