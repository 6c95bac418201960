"""Inputs whose keys outweigh all before them by far."""

from __future__ import annotations

import numpy as np

from support.inputs import Case, make

KINDS = (
    "bias rises at every key",
    "bias rises now and then",
    "bias rises, keys are masked",
    "keys shrink",
)


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
