"""Extreme values through the CUDA kernels, emulated."""

import numpy as np

from support.compare import assert_close, assert_finite
from support.core_calls import forward
from support.emulated_calls import dtypes, run
from support.inputs import Case, forms, make

CASE = Case(batch=1, rows=70, heads=1, groups=1, dim=16, value_dim=8, features=24, bias="11S")


@forms
@dtypes
def test_large_keys_and_queries_give_finite_results(causal, dtype):
    x = make(CASE, dtype)
    size = 1e3 if dtype == "float16" else 1e4
    for name in ("query", "key"):
        x[name] = (x[name].astype(np.float32) * size).astype(x[name].dtype)
    results = forward(x, causal, run)
    assert_finite(results["out"], what="out")
    assert_finite(results["mean"], what="mean")
    values = x["value"].astype(np.float32)
    assert np.abs(results["out"].astype(np.float32)).max() <= np.abs(values).max() * 1.01


@forms
@dtypes
def test_large_values_give_finite_results(causal, dtype):
    x = make(CASE, dtype)
    size = 1e4 if dtype == "float16" else 1e10 if causal else 1e30
    x["value"] = (np.sign(x["value"].astype(np.float32)) * size).astype(x["value"].dtype)
    results = forward(x, causal, run)
    assert_finite(results["out"], what="out")
    assert np.abs(results["out"].astype(np.float64)).max() <= size * 1.01


@forms
@dtypes
def test_a_constant_value_is_what_comes_out(causal, dtype):
    x = make(CASE, dtype)
    x["value"][:] = 1.5
    results = forward(x, causal, run)
    relative = {"float32": 6e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert_close(results["out"], np.full_like(results["out"], 1.5), relative=relative)


@forms
@dtypes
def test_masked_keys_are_deleted_keys(causal, dtype):
    x = make(CASE, dtype)
    gone = np.arange(64, 70)
    short = {n: a[:, :64] if a.ndim == 4 and a.shape[1] == 70 else a for n, a in x.items()}
    short["key_bias"] = x["key_bias"][..., :64]
    x["key_bias"][..., gone] = -np.inf
    x["key"][:, gone], x["value"][:, gone] = np.nan, np.inf
    whole, part = forward(x, causal, run), forward(short, causal, run)
    for name in ("log_mass", "mean"):
        assert_close(whole[name], part[name], rms=1e-6, what=name)
    assert_close(whole["out"][:, :64], part["out"], rms=1e-6)


@forms
@dtypes
def test_rows_that_see_no_key_are_zero(causal, dtype):
    x = make(CASE, dtype)
    x["key_bias"][:] = -np.inf
    x["key"][:], x["value"][:] = np.nan, np.nan
    results = forward(x, causal, run)
    assert not results["out"].astype(np.float32).any()
    assert np.isneginf(results["log_mass"]).all()
    assert not results["mean"].any()
