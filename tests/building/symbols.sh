#!/usr/bin/env bash
# Checks what the built libraries show to others and to each other; see CMakeLists.txt. Needs an
# editable build (`make build`) of the Python it is told, .venv's or PYTHON.
set -euo pipefail
cd "$(dirname "$0")/../.."

status=0
fail() {
  printf '%s\n' "$1" >&2
  status=1
}
# grep to which finding nothing is no error.
search() { grep "$@" || [[ $? == 1 ]]; }

facts=$("${PYTHON:-.venv/bin/python}" tests/building/built.py)
{ read -ra libraries; read -r objects; read -ra isas; } <<<"$facts"

# Only the module's entry is exported, and no CUDA call is left to the stubs in TensorFlow's library.
exported=$(nm -D --defined-only --format=just-symbols "${libraries[@]}" |
  search -vE '^(PyInit__core|python/.*:|)$')
[[ -z $exported ]] || fail "exported: $exported"
cuda=$(nm -D --undefined-only --format=just-symbols "${libraries[@]}" |
  search -E '^(__)?cu(da)?[A-Z]')
[[ -z $cuda ]] || fail "CUDA symbols to be found elsewhere: $cuda"

# A function that a kernel file shares with other files (an inline or template function outside the
# namespace of its instruction set) may be linked from the AVX-512 copy and reached on any processor.
for isa in "${isas[@]}"; do
  for accumulator in float double; do
    for file in kernels near_far/kernels; do
      object=$objects/performer_kernels_${isa}_$accumulator.dir/cc/cpu/kernels/$file.cc.o
      shared=$(nm -C --defined-only "$object" | search -E ' [TWVuBDR] ' | search -v "::$isa::")
      [[ -z $shared ]] || fail "$object shares: $shared"
    done
  done
done

((status == 0)) && echo "symbols: as they should be"
exit $status
