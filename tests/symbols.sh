#!/usr/bin/env bash
# Checks what the built libraries show to others and to each other; see CMakeLists.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
fail() {
  printf '%s\n' "$1" >&2
  status=1
}

# Only the module's entry is exported, and no CUDA call is left to the stubs in TensorFlow's library.
exported=$(nm -D --defined-only --format=just-symbols python/performer/_*.so |
  grep -vE '^(PyInit__core|python/.*:|)$' || true)
[[ -z $exported ]] || fail "exported: $exported"
cuda=$(nm -D --undefined-only --format=just-symbols python/performer/_ops.so python/performer/_core.*.so |
  grep -E '^(__)?cu(da)?[A-Z]' || true)
[[ -z $cuda ]] || fail "CUDA symbols to be found elsewhere: $cuda"

# A function that a kernel file shares with other files (an inline or template function outside the
# namespace of its instruction set) may be linked from the AVX-512 copy and reached on any processor.
for object in build/editable-*/CMakeFiles/performer_kernels_*.dir/cc/cpu/kernels.cc.o; do
  isa=$(sed -E 's/.*performer_kernels_([a-z0-9]+)_.*/\1/' <<<"$object")
  shared=$(nm -C --defined-only "$object" | grep -E ' [TWVuBDR] ' | grep -v "::$isa::" || true)
  [[ -z $shared ]] || fail "$object shares: $shared"
done

((status == 0)) && echo "symbols: as they should be"
exit $status
