"""What each implementation must return, in NumPy float64, by another way: the quadratic forms.

FAVOR+ itself comes from `performer.reference`. All gradients are analytic, those of
sum(out * grad_out); maxima count as constants, as the implementations have them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from performer import reference
from performer.bench.cases import Case
from performer.bench.implementations.catalogue import EPSILON, FAVOR, SOFTMAX, TWO_EPSILONS

_FEATURE_EPSILON, _DENOMINATOR_EPSILON = 1e-4, 1e-6


@functools.cache
def expected(estimator: str, case: Case) -> dict[str, np.ndarray]:
    """The results of an estimator on the inputs of a case.

    Returns:
        out [B, L, H, D] and, if `case.backward`, the gradients: query, key, value [B, L, H, D] and,
        but for softmax attention, projection [M, D].
    """
    inputs = case.inputs()
    if estimator == FAVOR:
        results = _favor(case, inputs)
    elif estimator == SOFTMAX:
        results = _by_head(_softmax, case, inputs)
    else:
        denominator = _DENOMINATOR_EPSILON if case.causal and estimator == TWO_EPSILONS else 0.0
        results = _by_head(_stabilized, case, inputs, denominator)
    return results if case.backward else {"out": results["out"]}


def distance_from_favor(estimator: str, case: Case) -> float | None:
    """Relative rms by which an estimator with epsilon differs from FAVOR+ on a case, else None."""
    if estimator not in (EPSILON, TWO_EPSILONS):
        return None
    out, favor = (expected(name, case)["out"] for name in (estimator, FAVOR))
    return float(np.sqrt(np.mean((out - favor) ** 2) / np.mean(favor**2)))


def _favor(case, inputs):
    query, key, value, grad_out = (inputs[n] for n in ("query", "key", "value", "grad_out"))
    projection = inputs["projection"]
    attention: Callable = reference.attention
    gradients_of: Callable = reference.attention_gradients
    options = {"causal": case.causal}
    if case.window:
        attention = reference.near_far_attention
        gradients_of = reference.near_far_attention_gradients
        options["exact_window"] = case.window
    out = attention(query, key, value, projection, **options)[0]
    if not case.backward:
        return {"out": out}
    gradients = gradients_of(
        query,
        key,
        value,
        projection[None],
        projection[None],
        np.zeros((1, case.features)),
        np.zeros((1, 1, 1)),
        grad_out,
        **options,
    )
    both = gradients["query_projection"] + gradients["key_projection"]
    return {
        "out": out,
        **{name: gradients[name] for name in ("query", "key", "value")},
        "projection": both[0],
    }


def _by_head(attention, case, inputs, *options):
    """Runs `attention` on [B, H, L, D]; the results in the layout and sums of the inputs."""
    projection = inputs["projection"].astype(np.float64)
    q, k, v, dout = (
        inputs[name].astype(np.float64).swapaxes(1, 2)
        for name in ("query", "key", "value", "grad_out")
    )
    seen = np.tri(case.length) if case.causal else np.ones((case.length, case.length))
    results = attention(q, k, v, projection, dout, seen, *options)
    return {
        name: x.sum((0, 1)) if name == "projection" else x.swapaxes(1, 2)
        for name, x in results.items()
    }


def _average(weights, denominator, v, dout):
    """out = weights @ v / denominator; also the gradients of weights, v and denominator."""
    out = weights @ v / denominator
    dout = dout / denominator
    ddenominator = -np.sum(dout * out, -1, keepdims=True)
    return out, dout @ v.swapaxes(-1, -2), weights.swapaxes(-1, -2) @ dout, ddenominator


def _softmax(q, k, v, projection, dout, seen):
    scale = q.shape[-1] ** -0.5
    scores = np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    out, dweights, dv, dtotal = _average(weights, total, v, dout)
    dscores = scale * weights * (dweights + dtotal)
    return {"out": out, "query": dscores @ k, "key": dscores.swapaxes(-1, -2) @ q, "value": dv}


def _stabilized(q, k, v, projection, dout, seen, denominator_epsilon):
    root = q.shape[-1] ** -0.25
    ratio = len(projection) ** -0.5

    def features(x, axes):
        u = root * x @ projection.T
        half_norm = np.sum((root * x) ** 2, -1, keepdims=True) / 2
        return ratio * np.exp(u - half_norm - u.max(axes, keepdims=True))

    def slopes(x, phi, dphi):  # gradients of x and projection
        du = dphi * phi
        dx = root * du @ projection - root**2 * np.sum(du, -1, keepdims=True) * x
        return dx, root * du.swapaxes(-1, -2) @ x

    a, b = features(q, -1), features(k, (-2, -1))
    a_more, b_more = a + ratio * _FEATURE_EPSILON, b + ratio * _FEATURE_EPSILON
    weights = seen * (a_more @ b_more.swapaxes(-1, -2))
    denominator = weights.sum(-1, keepdims=True)
    denominator += denominator_epsilon * a_more.sum(-1, keepdims=True)
    out, dweights, dv, ddenominator = _average(weights, denominator, v, dout)
    dweights = seen * (dweights + ddenominator)
    dq, dprojection = slopes(q, a, dweights @ b_more + denominator_epsilon * ddenominator)
    dk, more = slopes(k, b, dweights.swapaxes(-1, -2) @ a_more)
    return {"out": out, "query": dq, "key": dk, "value": dv, "projection": dprojection + more}
