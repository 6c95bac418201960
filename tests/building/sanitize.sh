#!/usr/bin/env bash
# Runs the core under sanitizers: its C++ tests and its Python tests with AddressSanitizer and
# UndefinedBehaviorSanitizer, its C++ tests with ThreadSanitizer (not through Python: TensorFlow and
# the interpreter are not instrumented). Needs the environment of `make build`.
set -euo pipefail
cd "$(dirname "$0")/../.."

echo "-- AddressSanitizer, UndefinedBehaviorSanitizer"
source tests/building/asan.sh
ctest --test-dir build/asan --parallel "$(nproc)" --output-on-failure
# --capture=sys: the report of a sanitizer goes past Python, and would be lost with the process. How
# much memory a call takes cannot be seen here: AddressSanitizer keeps what was freed.
with_asan "$python" -m pytest -q --capture=sys -p no:cacheprovider --numprocesses=2 \
  --dist=worksteal --ignore tests/cpu/test_near_far_memory.py tests/cpu

echo "-- ThreadSanitizer"
# Threads share work in the same way for all instruction sets, and the narrowest vectors compile
# fastest.
build build/tsan thread -DPERFORMER_BINDINGS=OFF -DPERFORMER_ISAS="${isas%%,*}"
# Some systems randomise addresses more widely than ThreadSanitizer can follow.
fixed=()
setarch -R true 2>/dev/null && fixed=(setarch -R)
"${fixed[@]}" ctest --test-dir build/tsan --parallel "$(nproc)" --output-on-failure
