"""Tells CMake where the installed Python packages lie that the build takes headers from.

Prints one line, a CMake list: TensorFlow's folder, TensorFlow's version, pybind11's CMake folder,
the folder of CUDA's wheels. What is not installed is empty. Packages are found through their import
specification and never imported: importing TensorFlow takes seconds and would load its libraries
into the build.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
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


def cuda_wheels() -> Path | None:
    """Returns the folder that the wheels of tools/cuda-requirements.txt share, a toolkit's."""
    nvidia = package_folder("nvidia")
    roots = sorted(nvidia.glob("cu*/bin/nvcc")) if nvidia else []
    return roots[-1].parents[1] if roots else None


def main() -> None:
    """Prints the list."""
    tensorflow = package_folder("tensorflow")
    version = provider_version(tensorflow, "tensorflow") if tensorflow else ""
    pybind11 = package_folder("pybind11")
    config = pybind11 / "share" / "cmake" / "pybind11" if pybind11 else ""
    print(tensorflow or "", version, config, cuda_wheels() or "", sep=";")


if __name__ == "__main__":
    main()
