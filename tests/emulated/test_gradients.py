"""The gradients of the CUDA kernels, emulated, against the analytic gradients of the reference."""

import numpy as np
import pytest

from support.cases import SUB_CHUNKS, TOKENS
from support.compare import assert_close, assert_same_bits
from support.core_calls import backward, forward
from support.emulated_calls import (
    GPU_CASES,
    SCHEDULES,
    all_cases,
    counting,
    dtypes,
    each_dtype,
    parameters,
    run,
    run_in_small_blocks,
)
from support.inputs import Case, cotangents, forms, make
from support.promises import check_gradients, check_gradients_of_values_with_a_mean


@pytest.mark.parametrize(("causal", "name", "dtype"), parameters(leave_out=TOKENS))
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    check_gradients(run, all_cases(causal)[name], causal, dtype)


@forms
@dtypes
@pytest.mark.parametrize("run", [run, run_in_small_blocks])
def test_entries_of_std_8_keep_the_promise_in_float32_and_twice_it_in_16_bits(causal, dtype, run):
    check_gradients(run, SUB_CHUNKS, causal, dtype, times=1 if dtype == "float32" else 2)


WIDE = ["wide, two blocks of features", "of 256, two blocks of features"]


@forms
@each_dtype(["packed, with empty sequences", WIDE[0]])
def test_gradients_are_the_same_bits_under_every_schedule(causal, name, dtype):
    case = all_cases(causal)[name]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    first, *others = (
        backward(x, incoming, causal, run, order=order, seed=seed, **case.options)
        for order, seed in SCHEDULES[1::2]
    )
    for other in others:
        for argument, grad in first.items():
            assert_same_bits(other[argument], grad, what=argument)


@forms
def test_gradients_of_long_sequences_do_not_drown_in_what_values_have_in_common(causal):
    bounds = {"query": 4e-6, "key": 6e-7, "value": 4e-7}
    check_gradients_of_values_with_a_mean(run, 1500, causal, bounds)


@forms
def test_gradients_of_10000_rows_are_as_good_as_those_of_the_composition(causal):
    """The bounds are the rms errors of the plain composition. Tensor cores, which cut off where a
    processor rounds, come to 1.1 times its error in the gradient of values."""
    bounds = {"query": 1e-5 if causal else 1.7e-5, "key": 7e-7, "value": 1.15 * 2.8e-7}
    check_gradients_of_values_with_a_mean(run, 10_000, causal, bounds)


def test_weights_of_features_sum_to_one_however_large_log_features_are():
    """A query hands its gradient on to means, even where an ulp of log-features is 0.06."""
    case = Case(batch=1, rows=300, heads=2, groups=1, features=40, std=0.5)
    x, incoming = make(case), cotangents(case)
    x.update(run("Summarize", x))
    x["log_mass"] += 1e6
    grads = run("ReadGrad", {**x, **run("Read", x), **incoming})
    handed_on = grads["grad_mean"].astype("f8").sum((1, 2))
    assert_close(handed_on, incoming["grad_out"].astype("f8").sum((1, 2)), relative=1e-5)


@forms
@dtypes
def test_the_gradients_of_masked_keys_are_zero(causal, dtype):
    case = GPU_CASES["narrow, 128 features, entry std 3"]
    x = make(case, dtype)
    grads = backward(x, cotangents(case, dtype), causal, run)
    masked = np.isneginf(x["key_bias"][0, 0])
    assert masked.any()
    for name in ("key", "value"):
        assert not grads[name].astype(np.float32)[:, masked].any(), name
    assert not grads["key_bias"][..., masked].any()


@dtypes
def test_gradients_of_projections_are_zero_where_they_are_not_asked_for(dtype):
    case = GPU_CASES["narrow, 128 features, entry std 3"]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    x.update(forward(x, True, run))
    whole = run("CausalGrad", {**x, **incoming})
    part = run("CausalGrad", {**x, **incoming}, projection_gradient=False)
    for name in ("grad_query_projection", "grad_key_projection", "grad_feature_bias"):
        assert not part.pop(name).any(), name
        assert whole.pop(name).any(), name
    for name, grad in whole.items():
        assert_same_bits(part[name], grad, what=name)


@each_dtype(["narrow, 256 features", "520 features", *WIDE])
def test_the_gradient_of_a_projection_is_zero_where_it_is_not_asked_for(dtype, name):
    case = GPU_CASES[name]
    x = {**make(case, dtype), **cotangents(case, dtype)}
    x.update(forward(x, False, run))
    for op in ("SummarizeGrad", "ReadGrad"):
        asked, others = run(op, x), run(op, x, projection_gradient=False)
        for output, grad in asked.items():
            assert grad.any(), output
            wanted = np.zeros_like(grad) if "projection" in output else grad
            assert_same_bits(others[output], wanted, what=output)


@forms
@each_dtype(["narrow, 128 features, entry std 3", *WIDE])
def test_operands_are_read_without_bank_conflicts(causal, name, dtype):
    case = GPU_CASES[name]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    forward(x, causal, run)
    with counting() as counters:
        backward(x, incoming, causal, run)
    assert counters["ldmatrix_conflicts"] == 0
    assert (counters["ldmatrix"] > 0) == (dtype != "float32")
