"""The gradients of the CUDA kernels, emulated, against the analytic gradients of the reference."""

from functools import cache

import numpy as np
import pytest

from kit.compare import assert_close, assert_same_bits
from kit.core import backward, cotangents, expected_gradients, forward, make
from kit.core_cases import NARROW, TOKENS, cases
from kit.cuda_cases import CASES
from kit.emulated import DTYPES, SCHEDULES, counting, dtypes, run
from performer.tolerances import tolerances

FORMS = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def all_cases(causal):
    return {**{name: c for name, c in cases(causal).items() if name not in TOKENS}, **CASES}


@cache
def wanted(causal, name, dtype):
    case = all_cases(causal)[name]
    return expected_gradients(make(case, dtype), cotangents(case, dtype), causal, **case.options)


@pytest.mark.parametrize(
    ("causal", "name", "dtype"),
    [
        (causal, name, dtype)
        for causal in (False, True)
        for name in all_cases(causal)
        for dtype in (DTYPES if name in CASES or name in NARROW else ["bfloat16"])
    ],
)
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    case, bound = all_cases(causal)[name], tolerances(dtype, causal=causal).gradient_rms
    x = make(case, dtype)
    grads = backward(x, cotangents(case, dtype), causal, run, **case.options)
    for argument, grad in wanted(causal, name, dtype).items():
        assert grads[argument].dtype == x[argument].dtype, argument
        assert_close(grads[argument], grad, rms=bound, what=argument)


@FORMS
@dtypes
@pytest.mark.parametrize("name", ["packed, with empty sequences", "wide, two groups of features"])
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


@FORMS
@dtypes
def test_the_gradients_of_masked_keys_are_zero(causal, dtype):
    case = CASES["narrow, 128 features, entry std 3"]
    x = make(case, dtype)
    grads = backward(x, cotangents(case, dtype), causal, run)
    masked = np.isneginf(x["key_bias"][0, 0])
    assert masked.any()
    for name in ("key", "value"):
        assert not grads[name].astype(np.float32)[:, masked].any(), name
    assert not grads["key_bias"][..., masked].any()


@FORMS
@dtypes
def test_operands_are_read_without_bank_conflicts(causal, dtype):
    for name in ("narrow, 128 features, entry std 3", "wide, two groups of features"):
        case = CASES[name]
        x, incoming = make(case, dtype), cotangents(case, dtype)
        forward(x, causal, run)
        with counting() as counters:
            backward(x, incoming, causal, run)
        assert counters["ldmatrix_conflicts"] == 0
        assert (counters["ldmatrix"] > 0) == (dtype != "float32")
