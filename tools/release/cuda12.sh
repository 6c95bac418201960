#!/usr/bin/env bash
# Makes a CUDA 12.4 compiler without a system toolkit: cuda12.sh PYTHON FOLDER; then
#   CUDACXX=FOLDER/bin/nvcc PERFORMER_CUDA=ON ...
# PyPI's wheels of CUDA 12 have its headers and its static runtime, and no nvcc; Debian 13 has one, in
# its non-free part. Only what compiles is fetched (95 MB of the 1 GB), by apt-get, from the mirror
# that this Debian uses; nothing is installed. GPU code of CUDA 12 runs on
# every driver that TensorFlow takes (525 and later); that of CUDA 13 wants 580.
set -euo pipefail
python=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
[[ -x $folder/bin/nvcc && -f $folder/complete ]] && exit

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$') ||
  { echo "cuda12.sh: needs apt-get with a Debian mirror" >&2; exit 1; }

# A configuration of apt-get's own, so that the system's stays as it is.
mkdir -p "$work"/{parts,lists/partial,cache/archives/partial,debs,wheels}
cat >"$work/parts/cuda.sources" <<END
Types: deb
URIs: $mirror
Suites: trixie
Components: non-free
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
apt=(apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/none"
  -o Dir::Etc::sourceparts="$work/parts" -o Dir::State::lists="$work/lists"
  -o Dir::Cache="$work/cache")
"${apt[@]}" update
(cd "$work/debs" && "${apt[@]}" download nvidia-cuda-toolkit)
dpkg -x "$work"/debs/nvidia-cuda-toolkit_12.4.*.deb "$work/toolkit"
# Headers of the compiler's own version. Of the runtime, 12.9 is the first that comes as a static
# library; it takes what any 12.x compiled.
"$python" -m pip download --quiet --no-deps --dest "$work/wheels" \
  'nvidia-cuda-nvcc-cu12==12.4.131' 'nvidia-cuda-runtime-cu12==12.4.127' 'nvidia-cuda-cccl-cu12==12.4.127.post1'
"$python" -m pip download --quiet --no-deps --dest "$work/runtime" 'nvidia-cuda-runtime-cu12==12.9.79'
for wheel in "$work"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$work/headers"; done
"$python" -m zipfile -e "$work"/runtime/*.whl "$work/static"

mkdir -p "$folder"/{bin,lib64,nvvm/libdevice}
tools=$work/toolkit/usr/lib/nvidia-cuda-toolkit
cp -r "$tools"/bin/{nvcc,cicc,crt} "$work"/toolkit/usr/bin/{cudafe++,fatbinary,nvlink,ptxas} "$folder/bin"
cp "$tools"/libdevice/libdevice.10.bc "$folder/nvvm/libdevice"
for part in nvcc runtime cccl; do cp -r "$work/headers/nvidia/cuda_$part/include" "$folder"; done
cp "$work/static/nvidia/cuda_runtime/lib/libcudart_static.a" "$folder/lib64"
ar rcs "$folder/lib64/libcudadevrt.a"  # nvcc asks for it; no kernel here launches another
cat >"$folder/bin/nvcc.profile" <<'END'
TOP = $(_HERE_)/..
NVVMIR_LIBRARY_DIR = $(TOP)/nvvm/libdevice
PATH += $(_HERE_):
INCLUDES += "-I$(TOP)/include" $(_SPACE_)
LIBRARIES =+ $(_SPACE_) "-L$(TOP)/lib64"
END
touch "$folder/complete"
"$folder/bin/nvcc" --version | tail -n 2
