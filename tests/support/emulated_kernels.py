"""One small call of every kernel in every form that has code of its own: several tiles and chunks,
splits, grouped heads, windows, all widths, 16-bit and float32."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from support.cases import ELU, ONE_HEAD, RELU, SUB_CHUNKS, TILES
from support.core_calls import forward
from support.emulated_calls import SPLIT, run
from support.inputs import GPU_OPS, cotangents, make

SPLITS = replace(ONE_HEAD, rows=SPLIT + 36, value_dim=8, bias="11S")
NARROW, WIDE = TILES["narrow, 256 features"], TILES["wide, two blocks of features"]
WIDEST = TILES["of 256, two blocks of features"]
CALLS = {
    "narrow": (replace(NARROW, bias="11S", masked="holes"), "bfloat16"),
    "narrow half": (replace(NARROW, rows=70, features=136), "float16"),
    "narrow float32": (replace(NARROW, rows=70, features=72), "float32"),
    "wide": (WIDE, "float16"),
    "wide float32": (replace(WIDE, features=80), "float32"),
    "of 256 half": (WIDEST, "float16"),
    "narrow relu": (replace(NARROW, rows=70, features=40, attributes=(RELU,)), "bfloat16"),
    "wide float32 elu": (replace(WIDE, rows=40, features=80, attributes=(ELU,)), "float32"),
    "grouped heads": (
        replace(NARROW, rows=70, heads=2, features=40, query_projections=2),
        "bfloat16",
    ),
    "sub-chunks": (SUB_CHUNKS, "bfloat16"),
    "splits": (SPLITS, "bfloat16"),
}
# Of NearFar and its gradient: (case, type, attributes).
_BLOCKS = {"exact_window": 64}
NEAR_FAR_CALLS = {
    "near far": (
        replace(SPLITS, rows=2 * SPLIT + 60, heads=2, query_projections=2),
        "bfloat16",
        {**_BLOCKS, "causal": True},
    ),
    "near far, both sides": (replace(SPLITS, rows=2 * SPLIT + 60), "bfloat16", _BLOCKS),
    "near far half, wide": (
        replace(WIDE, rows=150, features=72),
        "float16",
        {"exact_window": 40, "causal": True},
    ),
    "near far half, of 256, both sides": (
        replace(WIDEST, rows=150),
        "float16",
        {"exact_window": 40},
    ),
    "near far float32": (
        replace(NARROW, rows=180, features=72, bias="11S", masked="holes"),
        "float32",
        {"exact_window": 40, "causal": True},
    ),
    "near far float32, wide, both sides": (
        replace(WIDE, rows=150, features=72),
        "float32",
        {"exact_window": 40},
    ),
}
EVERY_CALL = [
    *((name, op) for op in GPU_OPS for name in CALLS),
    *((name, op) for op in ("NearFar", "NearFarGrad") for name in NEAR_FAR_CALLS),
]


@cache
def _results(name: str, causal: bool) -> dict:
    if name in NEAR_FAR_CALLS:
        return call(name, "NearFar", inputs(name, "NearFar"))
    case, dtype = CALLS[name]
    return forward(make(case, dtype), causal, run, **case.options)


def inputs(name: str, op: str) -> dict:
    """Everything that the operator takes in the call of that name."""
    case, dtype, *_ = {**CALLS, **NEAR_FAR_CALLS}[name]
    x = make(case, dtype)
    if op in ("Summarize", "Causal", "NearFar"):
        return x
    return {**x, **_results(name, op.startswith("Causal")), **cotangents(case, dtype)}


def call(name: str, op: str, x: dict, **options) -> dict:
    """The call of that name, with inputs `x`."""
    case, _, *attributes = {**CALLS, **NEAR_FAR_CALLS}[name]
    return run(op, x, **case.options, **dict(*attributes), **options)
