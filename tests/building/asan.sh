# To be sourced, from the root of the project: builds the core with AddressSanitizer and
# UndefinedBehaviorSanitizer, its C++ tests included, and puts a package with it into build/asan/site.
# with_asan COMMAND...: runs Python code on that package.
python=$PWD/.venv/bin/python
export PERFORMER_CUDA=OFF PATH=$PWD/.venv/bin:$PATH

# build FOLDER SANITIZERS OPTIONS...
build() {
  cmake -S . -B "$1" -GNinja -DPERFORMER_SANITIZE="$2" -DPERFORMER_TESTS=ON \
    -DPERFORMER_TENSORFLOW=OFF "${@:3}" >/dev/null
  cmake --build "$1" --parallel "$(nproc)"
}

isas=NATIVE
[[ $(uname -m) == x86_64 ]] && isas=v2,NATIVE
# The narrowest vectors and the widest of this machine only: to compile the kernels takes most of the time.
build build/asan "address;undefined" -DPython_EXECUTABLE="$python" -DPERFORMER_ISAS="$isas"

# The package with the instrumented core, found before the installed one.
site=$PWD/build/asan/site
rm -rf "$site"
mkdir -p "$site"
cp -r python/performer "$site"
rm -f "$site"/performer/*.so
cmake --install build/asan --prefix "$site" >/dev/null

# allocator_may_return_null: sizes that no machine has are refused, as the C library refuses them.
with_asan() {
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH=$site PERFORMER_DISABLE_LIBRARY=1 "$@"
}
