"""The CUDA kernels as the PTX that nvcc made of them, interpreted: calls as those of
`support.core_calls`."""

from __future__ import annotations

import contextlib
import re
import runpy
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import performer_ptx

from support.core_calls import signature_names

CHECK = Path(__file__).parents[1] / "building" / "budgets" / "check.py"
SPLIT = performer_ptx.split_rows  # as on a GPU
# Of a type in the mangled name of a kernel.
MANGLED = {"float32": "f", "bfloat16": "NS_8BFloat16E", "float16": "NS_4HalfE"}


@cache
def library() -> str:
    """The PTX in the library of the kernels."""
    cuobjdump = runpy.run_path(str(CHECK), run_name="budgets")["tool"]("cuobjdump")
    command = [cuobjdump, "-ptx", performer_ptx.library]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@cache
def kernels() -> dict[str, str]:
    """The PTX of each kernel, by mangled name."""
    shared = "\n".join(sorted(set(re.findall(r"^\.extern \.shared .*;", library(), re.M))))
    texts = {}
    for part in library().split("\n}\n"):
        if (entry := part.find(".entry ")) >= 0:
            name = part[entry + len(".entry ") : part.index("(", entry)]
            texts[name] = f"{shared}\n{part[entry:]}\n}}\n"
    return texts


@cache
def _load_library() -> None:
    performer_ptx.load(library())


def name_of(kernel: str, dtype: str = "", *numbers: int) -> str:
    """The mangled name of a kernel: "ReadKernel", "bfloat16", 64."""
    arguments = (MANGLED[dtype] if dtype else "") + "".join(f"Li{n}E" for n in numbers)
    part = f"{len(kernel)}{kernel}" + (f"I{arguments}E" if arguments else "E")
    (name,) = (name for name in kernels() if part in name)
    return name


@contextlib.contextmanager
def changed(name: str, text: str):
    """Another PTX of that kernel, until the end of the block."""
    _load_library()
    performer_ptx.load(text)
    try:
        yield
    finally:
        performer_ptx.load(kernels()[name])


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """Runs an operator on those of the arrays that are its inputs."""
    _load_library()
    if op.startswith("Read"):
        options.pop("key_norm", None)
    return performer_ptx.run(op, {name: x[name] for name in signature_names(op)}, **options)
