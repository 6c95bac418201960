"""The wheels that bring nvcc, where the GPU kernels are asked for and the system has none.

Also a program: prints what `needed` returns, one requirement a line. cmake/cuda.cmake finds the
compiler by the same rules.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def needed() -> list[str]:
    """Returns the requirements of cuda-requirements.txt, or nothing."""
    if os.environ.get("PERFORMER_CUDA", "").upper() not in ("ON", "1", "YES", "TRUE"):
        return []
    roots = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return []
    if any(root and os.access(Path(root, "bin/nvcc"), os.X_OK) for root in roots):
        return []
    lines = (Path(__file__).parent / "cuda-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    print(*needed(), sep="\n")
