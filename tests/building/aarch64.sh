#!/usr/bin/env bash
# Compiles the core and its kernels for aarch64 on another machine, and runs the C++ tests of the core
# under qemu. Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user);
# CMAKE may name cmake.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/aarch64
cmake=${CMAKE:-.venv/bin/cmake}
ctest=${cmake%cmake}ctest
"$cmake" -S . -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" \
  -DPERFORMER_TENSORFLOW=OFF -DPERFORMER_BINDINGS=OFF -DPERFORMER_CUDA=OFF -DPERFORMER_TESTS=ON
"$cmake" --build "$build" --parallel "${JOBS:-2}"
"$ctest" --test-dir "$build" --output-on-failure
