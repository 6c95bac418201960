"""Inputs and calls of the compiled core. No TensorFlow: these tests also run under sanitizers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

if os.environ.get("PERFORMER_DISABLE_LIBRARY"):
    sys.modules.setdefault("tensorflow", None)  # not installed, as far as the package can tell

from performer import _core, reference

DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
isas = pytest.mark.parametrize("isa", _core.isas())
forms = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
NAMES = {op: [name for name, *_ in _core.signature(op)["inputs"]] for op in ("Summarize", "Causal")}


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; letters as in the signatures of the operators.

    Attributes:
        query_projections, key_projections, feature_biases: entries of these (1, G or H).
        bias: axes of key_bias, a letter where it has its full size: "111", "B1S", "BGS" ...
        masked: which keys -inf masks: "", "holes", "left", "row" (all keys of the last batch row).
            What masked keys and values hold is NaN.
        state: initial states: 0 (one, empty), 1 or N.
        attributes: of the operator, as pairs.
    """

    batch: int = 2
    rows: int = 33
    queries: int | None = None
    heads: int = 2
    groups: int = 2
    dim: int = 16
    value_dim: int = 5
    features: int = 10
    query_projections: int = 1
    key_projections: int = 1
    feature_biases: int = 1
    bias: str = "111"
    masked: str = ""
    offsets: tuple[int, ...] | None = None
    state: int = 0
    std: float = 1.0
    attributes: tuple = ()

    @property
    def options(self) -> dict:
        """Attributes of the operator."""
        return {"packed": self.offsets is not None, **dict(self.attributes)}

    @property
    def sequences(self) -> int:
        """N."""
        return self.batch if self.offsets is None else len(self.offsets) - 1


def _key_bias(case: Case, rng) -> np.ndarray:
    full = {"B": case.batch, "G": case.groups, "S": case.rows, "1": 1}
    bias = rng.normal(size=[full[axis] for axis in case.bias])
    if case.masked == "holes":
        bias[rng.random(bias.shape) < 0.4] = -np.inf
    elif case.masked == "left":
        for b in range(len(bias)):
            bias[b, ..., : 5 + 30 * b] = -np.inf
    elif case.masked == "row":
        bias[-1] = -np.inf
    return bias


@lru_cache(maxsize=64)
def _made(case: Case, dtype: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    narrow, wide = DTYPES[dtype], np.dtype("f8" if dtype == "float64" else "f4")
    c = case
    queries = c.rows if c.queries is None else c.queries
    key_bias = _key_bias(c, rng)
    masked = np.broadcast_to(np.isneginf(key_bias), (c.batch, c.groups, c.rows)).transpose(0, 2, 1)
    states = c.state or 1
    x = {
        "query": rng.normal(size=(c.batch, queries, c.heads, c.dim)) * c.std,
        "key": rng.normal(size=(c.batch, c.rows, c.groups, c.dim)) * c.std,
        "value": rng.normal(size=(c.batch, c.rows, c.groups, c.value_dim)),
        "query_projection": rng.normal(size=(c.query_projections, c.features, c.dim)),
        "key_projection": rng.normal(size=(c.key_projections, c.features, c.dim)),
        "feature_bias": rng.normal(size=(c.feature_biases, c.features)),
        "key_bias": key_bias,
        "initial_log_mass": rng.normal(size=(states, c.groups, c.features)),
        "initial_mean": rng.normal(size=(states, c.groups, c.features, c.value_dim)),
    }
    if not c.state:
        x["initial_log_mass"][:], x["initial_mean"][:] = -np.inf, 0
    x["key"][masked], x["value"][masked] = np.nan, np.nan
    x = {
        name: array.astype(narrow if name in ("query", "key", "value") else wide)
        for name, array in x.items()
    }
    return {**x, "offsets": np.array([0] if c.offsets is None else c.offsets, np.int64)}


def make(case: Case, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of Causal (of Summarize and Read: a selection), the caller's to change."""
    return {name: x.copy() for name, x in _made(case, dtype, seed).items()}


def cotangents(case: Case, dtype: str = "float32", seed: int = 100) -> dict[str, np.ndarray]:
    """Gradients that come in: of out, log_mass and mean."""
    rng = np.random.default_rng(seed)
    wide = np.dtype("f8" if dtype == "float64" else "f4")
    queries = case.rows if case.queries is None else case.queries
    state = (case.sequences, case.groups, case.features)
    return {
        "grad_out": rng.normal(size=(case.batch, queries, case.heads, case.value_dim)).astype(
            DTYPES[dtype]
        ),
        "grad_log_mass": rng.normal(size=state).astype(wide),
        "grad_mean": rng.normal(size=(*state, case.value_dim)).astype(wide),
    }


def signature_names(op: str) -> list[str]:
    """Names of the inputs of an operator."""
    return [name for name, *_ in _core.signature(op)["inputs"]]


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """An operator on those of the arrays that are its inputs."""
    names = signature_names(op)
    if op.startswith("Read"):
        options.pop("key_norm", None)
    return _core.run(op, {name: x[name] for name in names}, **options)


def forward(x: dict, causal: bool, by=run, **options) -> dict[str, np.ndarray]:
    """out, log_mass, mean: by Causal, or by Summarize and Read (without an initial state).

    `by` runs an operator, as `run` does.
    """
    if causal:
        return by("Causal", x, **options)
    state = by("Summarize", x, **options)
    return {**by("Read", {**x, **state}, **options), **state}


def backward(x: dict, incoming: dict, causal: bool, by=run, **options) -> dict[str, np.ndarray]:
    """Gradients by input name; `incoming` as `cotangents`, `by` as `forward`."""
    results = forward(x, causal, by, **options)
    if causal:
        grads = by("CausalGrad", {**x, **results, **incoming}, **options)
    else:
        grads = by("ReadGrad", {**x, **results, **incoming}, **options)
        state = {n: incoming[n] + grads.pop(n) for n in ("grad_log_mass", "grad_mean")}
        grads.update(by("SummarizeGrad", {**x, **results, **state}, **options))
    return {name.removeprefix("grad_"): grad for name, grad in grads.items()}


def expected(x: dict, causal: bool, **options) -> dict[str, np.ndarray]:
    """What `forward` should give, in float64."""
    options = dict(options)
    arguments = {name: a for name, a in x.items() if not name.startswith(("initial", "offsets"))}
    out, (log_mass, mean) = reference.attention(
        **arguments,
        causal=causal,
        offsets=x["offsets"] if options.pop("packed", False) else None,
        initial_state=(x["initial_log_mass"], x["initial_mean"]) if causal else None,
        **options,
    )
    return {"out": out, "log_mass": log_mass, "mean": mean}


def expected_gradients(
    x: dict, incoming: dict, causal: bool, *, state: bool | None = None, **options
) -> dict[str, np.ndarray]:
    """What `backward` should give, in float64; `state`: with the initial one (default: causal)."""
    options, state = dict(options), causal if state is None else state
    return reference.attention_gradients(
        **{name: a for name, a in x.items() if not name.startswith(("initial", "offsets"))},
        grad_out=incoming["grad_out"],
        grad_state=(incoming["grad_log_mass"], incoming["grad_mean"]),
        causal=causal,
        offsets=x["offsets"] if options.pop("packed", False) else None,
        initial_state=(x["initial_log_mass"], x["initial_mean"]) if state else None,
        **options,
    )


def shortened(case: Case, **changes) -> Case:
    """The case with other fields."""
    return replace(case, **changes)
