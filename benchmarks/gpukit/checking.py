"""Compares each implementation with float64, on one head, before it is timed."""

from __future__ import annotations

from gpukit import cases
from gpukit.implementations import IMPLEMENTATIONS, INPUTS, compose

# Relative rms in bfloat16: the promise of performer.tolerances; what tells a mistake from rounding
# in the others (the composition rounds features and prefix sums).
BOUNDS = {
    "performer": {cases.FORWARD: 4e-3, cases.BACKWARD: 8e-3},
    "flash": {cases.FORWARD: 1e-2, cases.BACKWARD: 2e-2},
    "composition": {cases.FORWARD: 5e-2, cases.BACKWARD: 2e-1},
}
# What is off by more, up to this multiple of the bound, is timed and marked: it is a matter of
# rounding, and its time tells as much. Beyond it something is broken.
SLIGHTLY = 4
LAST = 64  # rows of exact attention that are compared: the last ones, against all keys
LONGEST = 4096  # rows of a gradient of exact attention in float64


def error(impl: str, case, x: dict, results) -> float | None:
    """The largest relative rms error of the results; None where exact attention is too long.

    Args:
        impl: a key of `IMPLEMENTATIONS`.
        case: its case.
        x: `implementations.make_inputs` of the case.
        results: out, or the gradients of query, key and value; [B, L, H, D].
    """
    linear = IMPLEMENTATIONS[impl].linear
    if not linear and case.part == cases.BACKWARD and case.length > LONGEST:
        return None
    q, k, v, g = (x[n][0, :, 0].double()[None, None] for n in (*INPUTS, "grad_out"))
    w = x["projection"].double()

    def attention(q, k, v):
        if not linear:
            return exact(q, k, v, case.causal)
        return compose(q, k, v, w, case.causal, case.window)

    if case.part == cases.FORWARD:
        wanted = [attention(q, k, v) if linear else attention(q[..., -LAST:, :], k, v)]
        got = [results]
    else:
        import torch

        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        wanted = torch.autograd.grad(attention(*leaves), leaves, g)
        got = results
    return max(
        _distance(actual[0, :, 0].double()[-expected.shape[-2] :], expected[0, 0])
        for actual, expected in zip(got, wanted, strict=True)
    )


def exact(query, key, value, causal: bool):
    """Softmax attention; the queries are the last rows of the sequence."""
    import torch

    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        rows, keys = scores.shape[-2:]
        seen = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.softmax(scores, -1) @ value


def _distance(actual, expected) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
