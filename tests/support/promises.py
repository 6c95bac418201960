"""What every backend promises for one call.

`run` runs an operator: `support.core_calls.run`, `support.emulated_calls.run` or
`support.gpu_calls.run`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits
from support.core_calls import backward, expected, expected_gradients, forward
from support.core_calls import run as run_core
from support.inputs import DTYPES, Case, cotangents, make


@cache
def wanted(case: Case, causal: bool, dtype: str) -> dict:
    """out, log_mass, mean in float64."""
    return expected(make(case, dtype), causal, **case.options)


@cache
def wanted_gradients(case: Case, causal: bool, dtype: str) -> dict:
    """Gradients by input name, in float64."""
    x, incoming = make(case, dtype), cotangents(case, dtype)
    return expected_gradients(x, incoming, causal, **case.options)


def check_against(results: dict, exact: dict, causal: bool, dtype: str) -> None:
    """Results have the accuracy that is promised, and their types."""
    bound = tolerances(dtype, causal=causal)
    wide = np.float64 if dtype == "float64" else np.float32
    types = {"out": DTYPES[dtype], "log_mass": wide, "mean": wide}
    assert {name: x.dtype for name, x in results.items()} == types
    for output, x in exact.items():
        worst = bound.worst if output == "out" else None
        assert_close(results[output], x, rms=bound.rms, worst=worst, what=output)


def check_results(run, case: Case, causal: bool, dtype: str) -> None:
    """Results are those of the reference."""
    results = forward(make(case, dtype), causal, run, **case.options)
    check_against(results, wanted(case, causal, dtype), causal, dtype)


def check_gradients(run, case: Case, causal: bool, dtype: str, times: float = 1) -> None:
    """Gradients are the analytic ones of the reference, in the type of their input.

    `times`: multiple of the promised bound, for cases that the promise does not cover.
    """
    bound, x = times * tolerances(dtype, causal=causal).gradient_rms, make(case, dtype)
    grads = backward(x, cotangents(case, dtype), causal, run, **case.options)
    for argument, grad in wanted_gradients(case, causal, dtype).items():
        assert grads[argument].dtype == x[argument].dtype, argument
        assert_close(grads[argument], grad, rms=bound, what=argument)


def check_gradients_of_values_with_a_mean(
    run, rows: int, causal: bool, bounds: dict, mean: float = 1
) -> None:
    """float32 against float64, in a sequence whose values have more in common than apart.

    `bounds`: of the rms error over the rms of the gradient, by input.
    """
    case = Case(batch=1, rows=rows, heads=1, groups=1, features=32, value_dim=16, std=0.5)
    x, incoming = make(case), cotangents(case)
    x["value"] += np.float32(mean)
    for name in ("feature_bias", "key_bias"):
        x[name][:] = 0
    for name in ("grad_log_mass", "grad_mean"):
        incoming[name][:] = 0
    wide = [
        {n: a if n == "offsets" else a.astype("f8") for n, a in y.items()} for y in (x, incoming)
    ]
    exact, grads = backward(*wide, causal, run_core), backward(x, incoming, causal, run)
    for name, bound in bounds.items():
        assert_close(grads[name], exact[name], rms=bound, what=name)


def check_batch_row_alone(run, case: Case, causal: bool, dtype: str) -> None:
    """A batch row has the bits that it has alone."""
    x = make(case, dtype)
    together = forward(x, causal, run, **case.options)
    alone = {n: a[1:] if a.ndim > 1 and len(a) == case.batch else a for n, a in x.items()}
    for output, result in forward(alone, causal, run, **case.options).items():
        assert_same_bits(result, together[output][1:], what=output)
