"""The wheels that bring nvcc, where the GPU kernels are asked for and the system has none.

Also a program: it prints what `needed` returns, one requirement a line.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path

FOLDER = Path(__file__).parent
system_nvcc = runpy.run_path(str(FOLDER.parent / "cmake" / "locate.py"))["system_nvcc"]


def needed() -> list[str]:
    """Returns the requirements of cuda-requirements.txt, or nothing."""
    if os.environ.get("PERFORMER_CUDA", "").upper() not in ("ON", "1", "YES", "TRUE"):
        return []
    if os.environ.get("CUDACXX") or system_nvcc():
        return []
    lines = (FOLDER / "cuda-requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    print(*needed(), sep="\n")
