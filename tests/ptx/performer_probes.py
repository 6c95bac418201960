"""Takes the place of the compiled module performer_probes in tests/gpu/test_ptx.py: it interprets
the PTX of the file that PERFORMER_PROBES_PTX names."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import performer_ptx

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
LANES, OUT, SHARED_BYTES = 32, 4, 1024
_text = Path(os.environ["PERFORMER_PROBES_PTX"]).read_text()
_kernels = re.findall(r"\.entry (\w+)\(", _text)
_cores = "H100"
performer_ptx.load(_text)


def set_tensor_cores(name: str) -> None:
    """H100 or A100."""
    global _cores
    _cores = name


def names() -> list[str]:
    """The names that `run` knows."""
    return list(PROBES)


def run(name: str, x: np.ndarray) -> np.ndarray:
    """uint32 [warps, 32, 12] to uint32 [warps, 32, 4]."""
    (kernel,) = (kernel for kernel in _kernels if PROBES[name] in kernel)
    words = performer_ptx.launch(
        kernel,
        x,
        len(x) * LANES * OUT,
        blocks=len(x),
        shared_bytes=SHARED_BYTES,
        order="forward",
        tensor_cores=_cores,
    )
    return words.reshape(len(x), LANES, OUT)
