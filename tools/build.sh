#!/bin/sh
# Compiles into the source package and shows what is being compiled: build.sh PYTHON
# Without isolation: the library is compiled against the TensorFlow that it will run with.
set -eu
cd "$(dirname "$0")/.."

log=build/compile.log
mkdir -p build
{
  "$1" -m pip install --verbose --no-build-isolation --no-deps --editable . 2>&1 || echo "pip failed"
} | tee "$log" | sed -n -u -E \
  -e 's/^ *-- (CUDA kernels: .*)$/\1/p' \
  -e 's/^ *(\[[0-9]+\/[0-9]+\]) Building [A-Z]+ object .*\.dir\/(.*)\.o$/\1 \2/p' \
  -e 's/^ *(\[[0-9]+\/[0-9]+\] Linking .*)$/\1/p'
if grep -q '^pip failed$' "$log"; then
  cat "$log"
  printf '\nThe build failed; the messages of the compiler are above and in %s.\n' "$log"
  exit 1
fi
