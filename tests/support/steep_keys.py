"""Inputs whose keys outweigh all before them by far."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from support.compare import assert_close
from support.core_calls import backward, forward
from support.inputs import Case, cotangents, make

KINDS = (
    "bias rises at every key",
    "bias rises now and then",
    "bias rises, keys are masked",
    "keys shrink",
)
CASE = Case(batch=1, rows=70, heads=1, groups=1, features=24, bias="1GS", std=0.5, state=1)


def steep(case: Case, kind: str, dtype: str) -> dict:
    """Inputs whose keys outgrow the past at every row, at some, or each in other features."""
    x, rows = make(case, dtype), np.arange(case.rows)
    if kind == "bias rises at every key":
        x["key_bias"] += 31 * rows
    elif kind == "bias rises now and then":
        x["key_bias"] += np.cumsum(np.where(rows % 7 == 3, 33, 0))
    elif kind == "bias rises, keys are masked":
        x["key_bias"] += 31 * rows
        x["key_bias"][..., rows % 3 == 1] = -np.inf
        x["key_bias"][..., :5] = -np.inf
    else:
        x["key"] *= np.linspace(40, 1, case.rows)[:, None, None].astype(x["key"].dtype)
    return x


def check_steep_keys(run, kind: str, dtype: str) -> None:
    """Causal results and gradients are as good as their log-features.

    A row may see its own key alone; all gradients but those of values are about 0 there.
    """
    case = replace(CASE, state=0 if "masked" in kind else 1)
    x, incoming = steep(case, kind, dtype), cotangents(case, dtype)
    wide = [
        {n: a if n == "offsets" else a.astype("f8") for n, a in y.items()} for y in (x, incoming)
    ]
    exact, grads = forward(wide[0], True), backward(*wide, True)
    results, ours = forward(x, True, run), backward(x, incoming, True, run)
    for name, a in exact.items():
        assert_close(results[name], a, rms=5e-4 if dtype == "float32" else 4e-3, what=name)
    for name, a in grads.items():
        worst = (1e-3 if dtype == "float32" else 3e-2) * max(1, np.abs(a).max())
        assert_close(ours[name], a, worst=worst, what=name)
