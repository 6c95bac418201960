"""Causality, stated once for every backend: the future cannot change one bit of the past.

`run` runs an operator: `support.core_calls.run`, `support.emulated_calls.run` or
`support.gpu_calls.run`.
"""

from __future__ import annotations

import numpy as np

from support.compare import assert_finite, assert_same_bits
from support.core_calls import expected
from support.inputs import Case, cotangents, make
from support.promises import check_against

HUGE = {"float32": 1e30, "float64": 1e30, "bfloat16": 1e30, "float16": 6e4}
POISONS = ["noise", "NaN", "inf", "-inf", "huge", "growing", "masked"]
POISONED = ("query", "key", "value", "key_bias")


def poisoned(x, poison, t, dtype, only=POISONED):
    """The inputs, with everything from row t on replaced by the worst there is."""
    rng = np.random.default_rng(9)
    changed = {name: array.copy() for name, array in x.items()}
    for name in only:
        rows = changed[name][..., t:] if name == "key_bias" else changed[name][:, t:]
        noise = rng.normal(size=rows.shape)
        fill = {
            "noise": noise,
            "NaN": np.nan,
            "inf": np.inf,
            "-inf": -np.inf,
            "huge": np.sign(noise) * HUGE[dtype],
            "growing": noise * 3 + (35.0 * np.arange(rows.shape[-1]) if name == "key_bias" else 0),
            "masked": -np.inf if name == "key_bias" else np.nan,
        }[poison]
        with np.errstate(over="ignore"):
            rows[...] = np.asarray(fill).astype(rows.dtype)
    return changed


def jumps(case: Case, dtype: str) -> dict:
    """Inputs whose keys grow by 40 nats now and then, and fall back: chunks are cut there."""
    x = make(case, dtype)
    rng = np.random.default_rng(4)
    x["key_bias"][:] = np.where(rng.random(x["key_bias"].shape) < 0.06, 40.0, 0.0)
    x["key_bias"][..., 60:] += 45.0
    x["key_bias"][..., 90:95] = -np.inf
    x["key_bias"][..., 100:] = np.arange(x["key_bias"].shape[-1] - 100) * 33.0
    return x


def with_masked(x: dict, rows) -> dict:
    """The inputs with the keys of some rows masked; these and their values hold NaN."""
    changed = {name: array.copy() for name, array in x.items()}
    changed["key_bias"][..., list(rows)] = -np.inf
    for name in ("key", "value"):
        changed[name][:, list(rows)] = np.nan
    return changed


def rowwise(run, x: dict, incoming: dict | None, **options) -> dict:
    """What a row has for itself: `out` and, with gradients that come in, that of its query."""
    results = run("Causal", x, **options)
    if incoming is None:
        return {"out": results["out"]}
    grads = run("CausalGrad", {**x, **results, **incoming}, **options)
    return {"out": results["out"], "grad_query": grads["grad_query"]}


def check_past(run, x, dtype, futures, *, incoming=None, only=POISONED, **options) -> None:
    """The past is finite and keeps every bit, whatever comes at row t and after.

    Args:
        futures: pairs (t, poison).
        incoming: gradients that come in; None: only the forward pass.
        only: the inputs that are poisoned.
        options: attributes of the operator.
    """
    before = rowwise(run, x, incoming, **options)
    for name, result in before.items():
        assert_finite(result, what=name)
    for t, poison in futures:
        after = rowwise(run, poisoned(x, poison, t, dtype, only), incoming, **options)
        for name, result in before.items():
            assert_same_bits(after[name][:, :t], result[:, :t], what=f"{name}, {poison} from {t}")


def check_prefix_alone(run, x, rows) -> None:
    """The first t rows, for each t of `rows`, have the bits that they have without the others."""
    whole, length = run("Causal", x)["out"], x["query"].shape[1]
    for t in rows:
        cut = {n: a[:, :t] if a.ndim == 4 and a.shape[1] == length else a for n, a in x.items()}
        cut["key_bias"] = x["key_bias"][..., :t]
        assert_same_bits(run("Causal", cut)["out"], whole[:, :t], what=f"the first {t} rows alone")


def check_jumps(run, case: Case, dtype: str) -> None:
    """Chunks that are cut where keys outgrow the past give the results of the reference."""
    x = jumps(case, dtype)
    check_against(run("Causal", x), expected(x, True), True, dtype)


def check_nan_in_query(run, case: Case, dtype: str, gradients: bool) -> None:
    """A NaN in a query row shows in that row and changes no bit of the others."""
    x, incoming = make(case, dtype), cotangents(case, dtype)
    before = run("Causal", x)
    x["query"][0, 50, 1] = np.nan
    after = run("Causal", x)
    assert np.isnan(after["out"][0, 50, 1].astype(np.float32)).all()
    after["out"][0, 50, 1] = before["out"][0, 50, 1]
    for name in before:
        assert_same_bits(after[name], before[name], what=name)
    if gradients:
        grads = run("CausalGrad", {**x, **after, **incoming})
        assert_finite(np.delete(grads["grad_query"][0], 50, 0), what="grad_query")


def check_nan_in_key(run, case: Case, dtype: str, name: str) -> None:
    """A NaN in a key or value shows from its row on, in its group and nowhere else."""
    x, per_group = make(case, dtype), case.heads // case.groups
    x[name][0, 50, -1] = np.nan
    results = run("Causal", x)
    shows = np.zeros(results["out"].shape, bool)
    shows[:, 50:, -per_group:] = True
    assert np.array_equal(np.isnan(results["out"].astype(np.float32)), shows)
    assert np.isnan(results["mean"][0, -1]).all()
    assert_finite(results["mean"][0, :-1], what="mean of the other groups")


def check_packed_apart(run, case: Case, dtype: str, gradients: bool) -> None:
    """Packed sequences do not touch each other: NaN in one changes no bit of the others."""
    x = {**make(case, dtype), "offsets": np.array([0, 40, 40, 90, case.rows])}
    incoming = cotangents(case, dtype) if gradients else None
    for name in ("grad_log_mass", "grad_mean") if gradients else ():
        incoming[name] = np.repeat(incoming[name], 4, 0)
    before = rowwise(run, x, incoming, packed=True)
    changed = {name: a.copy() for name, a in x.items()}
    changed["key"][:, 40:90], changed["query"][:, 40:90] = np.nan, np.inf
    after = rowwise(run, changed, incoming, packed=True)
    for name in before:
        for rows in (slice(0, 40), slice(90, case.rows)):
            assert_same_bits(after[name][:, rows], before[name][:, rows], what=name)
