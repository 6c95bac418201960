"""No figure without a right result: every implementation is checked before it is timed."""

from __future__ import annotations

import numpy as np

from performer.bench.cases import Case
from performer.bench.expected import distance_from_favor, expected
from performer.bench.implementations.catalogue import IMPLEMENTATIONS
from performer.features.tolerances import tolerances

LENGTH = 256  # of the check: four chunks of the causal forms, and the reference can afford it

# Exact attention of the frameworks keeps its weights in the type of its inputs: 8 bits of them.
_EXACT_BFLOAT16 = 2e-2


class WrongResult(Exception):
    """A result is not that of the estimator; the message says whose, where and how far."""


def check(impl: str, case: Case, results: dict[str, np.ndarray]) -> dict:
    """Compares results with the implementation's own estimator in float64.

    Args:
        impl: key of `IMPLEMENTATIONS`.
        case: what was computed.
        results: out [B, L, H, D] and gradients by name, computed from the inputs of the case.

    Returns:
        A record: implementation, case (its fields), estimator, error (largest relative rms of the
        results), bound, distance (relative rms of the estimator itself from FAVOR+, or None).

    Raises:
        WrongResult: a result has another shape, is not finite, or breaks its bound.
    """
    label, estimator = IMPLEMENTATIONS[impl].label, IMPLEMENTATIONS[impl].estimator
    wanted, worst, worst_bound = expected(estimator, case), 0.0, _bound(impl, case, "out")
    for name, got in results.items():
        want, bound, what = wanted[name], _bound(impl, case, name), _name(name)
        got = np.asarray(got).astype(np.float64)
        where = f"{label}, {case.mode}, {case.dtype}: {what}"
        if got.shape != want.shape:
            raise WrongResult(f"{where} must have shape {want.shape}; got {got.shape}")
        error = float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
        if not error <= bound:
            raise WrongResult(
                f"{where} must be within {bound:g} (relative rms) of {estimator} in float64; "
                f"got {error:.3g}"
            )
        if error / bound >= worst / worst_bound:
            worst, worst_bound = error, bound
    distance = distance_from_favor(estimator, case)
    return {
        "implementation": impl,
        "case": vars(case),
        "estimator": estimator,
        "error": worst,
        "bound": worst_bound,
        "distance": distance,
    }


def _name(result):
    return "the output" if result == "out" else f"the gradient of {result}"


def _bound(impl, case, result):
    if IMPLEMENTATIONS[impl].exact and case.dtype == "bfloat16":
        return _EXACT_BFLOAT16
    promise = tolerances(case.dtype, causal=case.causal)
    return promise.rms if result == "out" else promise.gradient_rms
