#!/usr/bin/env bash
# Checks that the built libraries are hardened: what CMakeLists.txt asks for under "Hardening". Needs
# an editable build (`make build`) of the Python it is told, .venv's or PYTHON.
set -euo pipefail
cd "$(dirname "$0")/../.."

status=0
fail() {
  printf '%s\n' "$1" >&2
  status=1
}
facts=$("${PYTHON:-.venv/bin/python}" tests/building/built.py)
{ read -ra libraries; read -r objects; read -ra isas; } <<<"$facts"

for library in "${libraries[@]}"; do
  segments=$(readelf --program-headers --wide "$library")
  dynamic=$(readelf --dynamic --wide "$library")
  undefined=$(nm -D --undefined-only --format=just-symbols "$library")
  # Calls into other libraries are bound at loading, and the table of them is read-only from then on.
  grep -q GNU_RELRO <<<"$segments" || fail "$library: no read-only relocations"
  grep -qE 'FLAGS.*(BIND_NOW|NOW)' <<<"$dynamic" || fail "$library: bound lazily"
  # Nothing is both writable and executable, the stack included.
  grep -qE 'GNU_STACK.* RW  ' <<<"$segments" || fail "$library: no word on the stack"
  if grep -E '^  (LOAD|GNU_STACK).* RWE ' <<<"$segments"; then fail "$library: writable code"; fi
  if grep TEXTREL <<<"$dynamic"; then fail "$library: relocations in code"; fi
  # Functions with arrays on the stack are guarded.
  grep -q '^__stack_chk_fail' <<<"$undefined" || fail "$library: no stack protector"
  # Nothing of the machine that built it: no search path, no file name.
  if grep -E 'RPATH|RUNPATH' <<<"$dynamic"; then fail "$library: a search path"; fi
  if grep -aoE "($PWD|site-packages|/(tmp|home)/)[[:graph:]]*" "$library" | sort -u | head -5 | grep .
  then fail "$library: paths of this machine"; fi
done

# FORTIFY leaves no trace where the compiler can prove every size: the command lines are asked.
if grep '"command"' "${objects%/CMakeFiles}/compile_commands.json" |
  grep -vF -e -D_FORTIFY_SOURCE=2 | head -3 | grep .
then fail "compiled without FORTIFY"; fi

# The kernels are not slowed down.
for isa in "${isas[@]}"; do
  for accumulator in float double; do
    object=$objects/performer_kernels_${isa}_$accumulator.dir/cc/cpu/kernels/kernels.cc.o
    if nm --undefined-only "$object" | grep __stack_chk_fail
    then fail "$object: a stack protector in kernels"; fi
  done
done

((status == 0)) && echo "hardening: as it should be"
exit $status
