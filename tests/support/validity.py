"""Which calls of the operators are valid: the rules once more, in other words.

Written from the documentation of the operators (cc/tf/ops.cc), as a judge of the compiled checks:
nothing here may be taken from cc/core/schema.cc or from the signatures that the core reports.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

NARROW = ("float32", "bfloat16", "float16", "float64")
MOST_ELEMENTS, MOST_HEADS, MOST_WIDTH = 2**56, 2**20, 65536

# The axes of every argument. A set: the axis may be 1, or any of these.
_KEY_SIDE = {
    "key": ("batch", "keys", "groups", "key_dim"),
    "value": ("batch", "keys", "groups", "value_dim"),
    "key_projection": ({"groups"}, "features", "key_dim"),
    "key_bias": ({"batch"}, {"groups"}, {"keys"}),
}
_QUERY_SIDE = {
    "query": ("batch", "queries", "heads", "key_dim"),
    "query_projection": ({"groups", "heads"}, "features", "key_dim"),
    "feature_bias": ({"groups", "heads"}, "features"),
}
_STATE = {
    "log_mass": ("sequences", "groups", "features"),
    "mean": ("sequences", "groups", "features", "value_dim"),
}
_INITIAL = {
    "initial_log_mass": ("states", "groups", "features"),
    "initial_mean": ("states", "groups", "features", "value_dim"),
}
_OUT = {"out": ("batch", "queries", "heads", "value_dim")}
_OFFSETS = {"offsets": ("offsets",)}
_WEIGHT = {"log_weight": ("batch", "queries", "heads")}


def _incoming(axes: dict) -> dict:
    return {f"grad_{name}": shape for name, shape in axes.items()}


INPUTS = {
    "Summarize": {**_KEY_SIDE, **_OFFSETS},
    "Read": {**_QUERY_SIDE, **_STATE, **_OFFSETS},
    "Causal": {**_QUERY_SIDE, **_KEY_SIDE, **_INITIAL, **_OFFSETS},
    "NearFar": {**_QUERY_SIDE, **_KEY_SIDE, **_INITIAL, **_OFFSETS, "start": ()},
}
INPUTS["SummarizeGrad"] = {**INPUTS["Summarize"], **_STATE, **_incoming(_STATE)}
INPUTS["ReadGrad"] = {**INPUTS["Read"], **_OUT, **_incoming(_OUT)}
INPUTS["CausalGrad"] = {**INPUTS["Causal"], **_OUT, **_STATE, **_incoming({**_OUT, **_STATE})}
_ALL = {**_OUT, **_WEIGHT, **_STATE}
INPUTS["NearFarGrad"] = {**INPUTS["NearFar"], **_ALL, **_incoming(_ALL)}
RESULTS = {"Summarize": _STATE, "Read": _OUT, "Causal": {**_OUT, **_STATE}, "NearFar": _ALL}
# A gradient for each of these inputs, in this order.
DIFFERENTIABLE = {
    "SummarizeGrad": list(_KEY_SIDE),
    "ReadGrad": [*_QUERY_SIDE, *_STATE],
    "CausalGrad": [
        *("query", "key", "value", "query_projection", "key_projection", "feature_bias"),
        *("key_bias", *_INITIAL),
    ],
}
DIFFERENTIABLE["NearFarGrad"] = DIFFERENTIABLE["CausalGrad"]
FIRST = {"Summarize": "key", "Read": "query", "Causal": "query", "NearFar": "query"}
MOST_WINDOW = 65536


@dataclass(frozen=True, eq=False)
class Call:
    """What a call hands over.

    Attributes:
        op: operator.
        shapes: of every input.
        dtypes: of every input.
        attributes: those that are given.
        offsets: the numbers in "offsets", if that has rank 1.
        start: the number in "start", if that has rank 0.
    """

    op: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    attributes: dict = field(default_factory=dict)
    offsets: tuple[int, ...] = (0,)
    start: int = 0

    @property
    def packed(self) -> bool:
        """Whether sequences lie one after another."""
        return bool(self.attributes.get("packed", False))

    @property
    def windowed(self) -> bool:
        """Whether near keys are exact."""
        return self.op.startswith("NearFar")

    @property
    def causal(self) -> bool:
        """Whether every query has a key."""
        return self.op.startswith("Causal")


def _wrong_types(call: Call) -> list[str]:
    first = call.dtypes[FIRST[call.op.removesuffix("Grad")]]
    wide = "float64" if first == "float64" else "float32"
    rows = ("query", "key", "value", "out", "grad_out")
    wanted = {
        name: first if name in rows else "int64" if name in ("offsets", "start") else wide
        for name in INPUTS[call.op]
    }
    wrong = [name for name, dtype in wanted.items() if call.dtypes[name] != dtype]
    return wrong + ([] if first in NARROW else ["type"])


def _wrong_attributes(call: Call) -> list[str]:
    given = call.attributes
    with np.errstate(over="ignore"):  # attributes are float32
        numbers = [np.float32(given.get(name, 0.0)) for name in ("scale", "feature_epsilon")]
    wrong = [f"{x}" for x in numbers if not (np.isfinite(x) and x >= 0)]
    if given.get("feature_map", "softmax") not in ("softmax", "relu", "elu"):
        wrong.append("feature_map")
    if not 1 <= given.get("exact_window", 64) <= MOST_WINDOW:
        wrong.append("exact_window")
    return wrong


def _wrong_offsets(call: Call, rows: int) -> list[str]:
    x = call.offsets
    good = len(x) > 0 and x[0] == 0 and x[-1] == rows
    good = good and all(a <= b for a, b in pairwise(x))
    return [] if good else ["offsets"]


def _wrong_rows(call: Call, found) -> list[str]:
    """Of near-and-far attention: a query row stands at a key row, the last at the last."""
    wrong = []
    more_keys = call.attributes.get("causal", False) and not call.packed
    if found["queries"] > found["keys"] or (found["queries"] < found["keys"] and not more_keys):
        wrong.append("queries and keys")
    if call.start < 0 or (call.packed and call.start):
        wrong.append("start")
    return wrong


def _elements(shape) -> int:
    return math.prod(size for size in shape if size != 0)


@functools.lru_cache(maxsize=8)  # calls are told apart by identity
def sizes(call: Call) -> tuple[dict[str, int], list[str]]:
    """The sizes of a call by name, and what is wrong with its shapes."""
    axes, found, wrong, causal = dict(INPUTS[call.op]), {}, [], call.causal
    if not call.packed:
        del axes["offsets"]  # ignored

    def meet(name, size, argument):
        if found.setdefault(name, size) != size:
            wrong.append(f"{argument}: {name}")

    for argument, names in axes.items():
        shape = call.shapes[argument]
        if len(shape) != len(names):
            wrong.append(f"{argument}: rank")
            continue
        if _elements(shape) > MOST_ELEMENTS:
            wrong.append(f"{argument}: too large")
        for name, size in zip(names, shape, strict=True):
            if isinstance(name, str):
                meet("keys" if causal and name == "queries" else name, size, argument)
    if call.packed:
        meet("batch", 1, "packed")
        meet("sequences", found.get("offsets", 0) - 1, "offsets")
    elif "batch" in found:
        meet("sequences", found["batch"], "batch")
    if wrong:
        return found, wrong
    for argument, names in axes.items():
        for name, size in zip(names, call.shapes[argument], strict=True):
            if isinstance(name, set) and size not in {1, *(found.get(each) for each in name)}:
                wrong.append(f"{argument}: {name}")
    if found.get("states", 1) not in (1, found["sequences"]):
        wrong.append("states")
    return found, wrong + _wrong_sizes(found)


def _wrong_sizes(found) -> list[str]:
    least = {"heads": 1, "groups": 1, "key_dim": 1, "features": 1, "sequences": 0}
    most = {"heads": MOST_HEADS, "groups": MOST_HEADS}
    most |= dict.fromkeys(("key_dim", "value_dim", "features"), MOST_WIDTH)
    wrong = [name for name, size in least.items() if found.get(name, size) < size]
    wrong += [name for name, size in most.items() if found.get(name, size) > size]
    if not wrong and "heads" in found and found["heads"] % found["groups"]:
        wrong.append("heads are no multiple of groups")
    return wrong


def result_shapes(call: Call) -> dict[str, tuple[int, ...]]:
    """The shapes of the results of a valid call, by name, in their order."""
    if call.op.endswith("Grad"):
        return {f"grad_{name}": call.shapes[name] for name in DIFFERENTIABLE[call.op]}
    found = dict(sizes(call)[0])
    if call.causal:
        found["queries"] = found["keys"]
    return {name: tuple(found[axis] for axis in axes) for name, axes in RESULTS[call.op].items()}


@functools.lru_cache(maxsize=8)
def faults(call: Call) -> list[str]:
    """What is wrong with a call; nothing if it is valid."""
    found, wrong_sizes = sizes(call)
    wrong = wrong_sizes + _wrong_types(call) + _wrong_attributes(call)
    if not wrong:
        wrong += [
            f"{name}: too large"
            for name, shape in result_shapes(call).items()
            if _elements(shape) > MOST_ELEMENTS
        ]
    if call.windowed and not wrong:
        wrong += _wrong_rows(call, found)
    if call.packed and not wrong:
        wrong += _wrong_offsets(call, found["queries" if call.op.startswith("Read") else "keys"])
    return wrong
