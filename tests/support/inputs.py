"""Inputs of one call of the operators, drawn for a `Case`: its sizes and options."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

FORWARD = ("Summarize", "Read", "Causal", "NearFar")
OPS = (*FORWARD, *(f"{op}Grad" for op in FORWARD))
GPU_OPS = tuple(op for op in OPS if not op.startswith("NearFar"))  # whose cases they share
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Attributes that some operators do not have.
_WINDOW, _MAP = ("exact_window", "causal", "query_norm"), ("feature_map", "feature_epsilon")
forms = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call; letters as in the signatures of the operators.

    Attributes:
        query_projections, key_projections, feature_biases: entries of these (1, G or H).
        bias: axes of key_bias, a letter where the axis has its full size: "111", "B1S", "BGS" ...
        masked: the keys that -inf masks: "", "holes", "left", "row" (all keys of the last batch
            row). Masked keys and their values hold NaN.
        state: number of initial states: 0 (one, empty), 1 or N.
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
    offsets = [0] if c.offsets is None else c.offsets
    return {**x, "offsets": np.array(offsets, np.int64), "start": np.array(0, np.int64)}


def make(case: Case, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the forward operators, but for the state of Read; the caller may change them."""
    return {name: x.copy() for name, x in _made(case, dtype, seed).items()}


def cotangents(case: Case, dtype: str = "float32", seed: int = 100) -> dict[str, np.ndarray]:
    """Incoming gradients of out, log_mass, mean and log_weight."""
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
        "grad_log_weight": rng.normal(size=(case.batch, queries, case.heads)).astype(wide),
    }


def known_attributes(op: str, attributes: dict) -> dict:
    """Those that an operator has, and those that no operator has."""
    other = _MAP if op.startswith("NearFar") else _WINDOW
    if op.startswith("Read"):
        other = (*other, "key_norm")
    return {name: value for name, value in attributes.items() if name not in other}
