"""Takes the place of the compiled module performer_probes in tests/gpu/test_ptx.py: it interprets
the PTX of the file that PERFORMER_PROBES_PTX names."""

from __future__ import annotations

import os
from pathlib import Path

import interpreter
import numpy as np

EMULATED = True
# By a part of the kernel's mangled name.
PROBES = {
    "MmaM16N8K16<BFloat16>": "MmaM16N8K16INS_8BFloat16E",
    "MmaM16N8K16<Half>": "MmaM16N8K16INS_4HalfE",
    "MmaTf32M16N8K8": "MmaTf32M16N8K8",
    "LdMatrixX4": "LdMatrixProbeILb0E",
    "LdMatrixX4Trans": "LdMatrixProbeILb1E",
    "CpAsync": "CpAsyncProbe",
    "Opaque": "OpaqueProbe",
    "Exp2": "4Exp2E",
    "Log2": "4Log2E",
    "Pack<BFloat16>": "PackProbeINS_8BFloat16E",
    "Pack<Half>": "PackProbeINS_4HalfE",
    "HalfToFloat": "HalfToFloatProbe",
    "ToTf32": "ToTf32Probe",
}
_kernels = interpreter.parse(Path(os.environ["PERFORMER_PROBES_PTX"]))
_cores = "H100"


def set_tensor_cores(name: str) -> None:
    """H100 or A100."""
    global _cores
    _cores = name


def names() -> list[str]:
    """The names that `run` knows."""
    return list(PROBES)


def run(name: str, x: np.ndarray) -> np.ndarray:
    """uint32 [warps, 32, 12] to uint32 [warps, 32, 4]."""
    (code,) = (code for kernel, code in _kernels.items() if PROBES[name] in kernel)
    return interpreter.Machine(x, 4, _cores).run(code).reshape(len(x), interpreter.LANES, 4)
