#!/usr/bin/env bash
# Runs the core under sanitizers: its C++ tests and its Python tests with AddressSanitizer and
# UndefinedBehaviorSanitizer, its C++ tests with ThreadSanitizer (not through Python: TensorFlow and
# the interpreter are not instrumented). Needs the environment of `make build`.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=$PWD/.venv/bin/python
export PERFORMER_CUDA=OFF PATH=$PWD/.venv/bin:$PATH
jobs=$(nproc)

# build FOLDER SANITIZERS OPTIONS...
build() {
  cmake -S . -B "$1" -GNinja -DPERFORMER_SANITIZE="$2" -DPERFORMER_TESTS=ON \
    -DPERFORMER_TENSORFLOW=OFF "${@:3}" >/dev/null
  cmake --build "$1" --parallel "$jobs"
}

echo "-- AddressSanitizer, UndefinedBehaviorSanitizer"
build build/asan "address;undefined" -DPython_EXECUTABLE="$python"
ctest --test-dir build/asan --output-on-failure

# The package with the instrumented core, found before the installed one.
site=$PWD/build/asan/site
rm -rf "$site"
mkdir -p "$site"
cp -r python/performer "$site"
rm -f "$site"/performer/*.so
cmake --install build/asan --prefix "$site" >/dev/null
# allocator_may_return_null: sizes that no machine has are refused, as the C library refuses them.
# --capture=sys: the report of a sanitizer goes past Python, and would be lost with the process.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH=$site PERFORMER_DISABLE_LIBRARY=1 \
  "$python" -m pytest -q --capture=sys -p no:cacheprovider tests/cpu

echo "-- ThreadSanitizer"
build build/tsan thread -DPERFORMER_BINDINGS=OFF
# Some systems randomise addresses more widely than ThreadSanitizer can follow.
fixed=()
setarch -R true 2>/dev/null && fixed=(setarch -R)
"${fixed[@]}" ctest --test-dir build/tsan --output-on-failure
