"""Tells CMake where what the build needs is installed: headers of Python packages, and nvcc.

Prints one line, a CMake list: TensorFlow's folder, pybind11's CMake folder, the system's nvcc, the
nvcc of CUDA's wheels. What is not installed is empty. Told the folder of a TensorFlow, it prints
the version of that. Packages are found through their import specification and never imported:
importing TensorFlow takes seconds and would load its libraries into the build.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path


def package_folder(name: str) -> Path | None:
    """Returns the folder of the package `name`, or None where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def provider_version(folder: Path, name: str) -> str:
    """Returns the version of the distribution that put package `name` into `folder`.

    The distribution may be called tensorflow, tensorflow-cpu or otherwise, so the one that lists
    the package as its top level is taken.
    """
    for distribution in importlib.metadata.distributions(path=[str(folder.parent)]):
        if name in (distribution.read_text("top_level.txt") or "").split():
            return distribution.version
    return ""


def system_nvcc() -> str | None:
    """Returns the nvcc in CUDA_PATH or CUDA_HOME, on PATH, or in /usr/local/cuda."""
    named = [os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)]
    folders = [folder for root in named for folder in (f"{root}/bin", root)]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    return os.path.abspath(found) if found else None


def wheels_nvcc() -> Path | None:
    """Returns the nvcc that the wheels of tools/cuda-requirements.txt bring."""
    nvidia = package_folder("nvidia")
    found = sorted(nvidia.glob("cu*/bin/nvcc")) if nvidia else []
    return found[-1] if found else None


def main() -> None:
    """Prints the list, or a version."""
    if len(sys.argv) > 1:
        print(provider_version(Path(sys.argv[1]), "tensorflow"))
        return
    tensorflow = package_folder("tensorflow")
    pybind11 = package_folder("pybind11")
    config = pybind11 / "share" / "cmake" / "pybind11" if pybind11 else ""
    print(tensorflow or "", config, system_nvcc() or "", wheels_nvcc() or "", sep=";")


if __name__ == "__main__":
    main()
