"""One small call of every kernel in every form that has code of its own: several tiles and chunks,
segments, both widths, 16-bit and float32."""

from __future__ import annotations

from dataclasses import replace

from kit.core import Case, cotangents, forward, make
from kit.core_cases import ELU, RELU
from kit.cuda_cases import CASES
from kit.emulated import run

OPS = ["Summarize", "Read", "Causal", "SummarizeGrad", "ReadGrad", "CausalGrad"]
SEGMENTS = Case(batch=1, rows=1060, heads=1, groups=1, dim=16, value_dim=8, features=10, bias="11S")
CALLS = {
    "narrow": (replace(CASES["narrow, 256 features"], bias="11S", masked="holes"), "bfloat16"),
    "narrow float32": (replace(CASES["narrow, 256 features"], features=72), "float32"),
    "wide": (CASES["wide, two groups of features"], "float16"),
    "wide float32": (replace(CASES["wide, two groups of features"], features=80), "float32"),
    "narrow relu": (replace(CASES["narrow, 256 features"], attributes=(RELU,)), "bfloat16"),
    "wide float32 elu": (
        replace(CASES["wide, two groups of features"], features=80, attributes=(ELU,)),
        "float32",
    ),
    "segments": (SEGMENTS, "bfloat16"),
}


def inputs(name: str, op: str) -> dict:
    """Everything that the operator takes in the call of that name."""
    case, dtype = CALLS[name]
    x = make(case, dtype)
    if op in ("Summarize", "Causal"):
        return x
    causal = op.startswith("Causal")
    return {**x, **forward(x, causal, run, **case.options), **cotangents(case, dtype)}


def call(name: str, op: str, x: dict, **options) -> dict:
    """The call of that name, with inputs `x`."""
    return run(op, x, **CALLS[name][0].options, **options)
