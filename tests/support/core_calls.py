"""Calls of the compiled core, and what the reference expects of them.

No TensorFlow: the tests of the core also run under sanitizers.
"""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

if os.environ.get("PERFORMER_DISABLE_LIBRARY"):
    sys.modules.setdefault("tensorflow", None)  # not installed, as far as the package can tell

from performer import _core, reference
from support.inputs import known_attributes

isas = pytest.mark.parametrize("isa", _core.isas())
_OTHERS = ("initial", "offsets", "start")  # inputs that the reference takes apart from the others


def signature_names(op: str) -> list[str]:
    """Names of the inputs of an operator."""
    return [name for name, *_ in _core.signature(op)["inputs"]]


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """Runs an operator on those of the arrays that are its inputs."""
    names, options = signature_names(op), known_attributes(op, options)
    return _core.run(op, {name: x[name] for name in names}, **options)


def forward(x: dict, causal: bool, by=run, **options) -> dict[str, np.ndarray]:
    """out, log_mass, mean: by Causal, or by Summarize and Read (without an initial state).

    `by` runs an operator, as `run` does.
    """
    if causal:
        return by("Causal", x, **options)
    state = by("Summarize", x, **options)
    return {**by("Read", {**x, **state}, **options), **state}


def backward(x: dict, incoming: dict, causal: bool, by=run, **options) -> dict[str, np.ndarray]:
    """Gradients by input name; `incoming` as `cotangents`, `by` as `forward`."""
    results = forward(x, causal, by, **options)
    if causal:
        grads = by("CausalGrad", {**x, **results, **incoming}, **options)
    else:
        grads = by("ReadGrad", {**x, **results, **incoming}, **options)
        state = {n: incoming[n] + grads.pop(n) for n in ("grad_log_mass", "grad_mean")}
        grads.update(by("SummarizeGrad", {**x, **results, **state}, **options))
    return {name.removeprefix("grad_"): grad for name, grad in grads.items()}


def expected(x: dict, causal: bool, **options) -> dict[str, np.ndarray]:
    """What `forward` should give, in float64."""
    options = dict(options)
    arguments = {name: a for name, a in x.items() if not name.startswith(_OTHERS)}
    out, (log_mass, mean) = reference.attention(
        **arguments,
        causal=causal,
        offsets=x["offsets"] if options.pop("packed", False) else None,
        initial_state=(x["initial_log_mass"], x["initial_mean"]) if causal else None,
        **options,
    )
    return {"out": out, "log_mass": log_mass, "mean": mean}


def expected_near_far(x: dict, **options) -> dict[str, np.ndarray]:
    """What NearFar should give, in float64."""
    options = {"exact_window": 64, "causal": False, **options}
    packed = options.pop("packed", False)
    names = [name for name in signature_names("NearFar") if not name.startswith("initial")]
    out, log_weight, (log_mass, mean) = reference.near_far_attention(
        **{name: x[name] for name in names if name not in ("offsets", "start")},
        start=int(x["start"]) % options["exact_window"],  # of any size
        offsets=x["offsets"] if packed else None,
        initial_state=(x["initial_log_mass"], x["initial_mean"]),
        **options,
    )
    return {"out": out, "log_weight": log_weight, "log_mass": log_mass, "mean": mean}


def expected_gradients(
    x: dict, incoming: dict, causal: bool, *, state: bool | None = None, **options
) -> dict[str, np.ndarray]:
    """What `backward` should give, in float64; `state`: with the initial one (default: causal)."""
    options, state = dict(options), causal if state is None else state
    return reference.attention_gradients(
        **{name: a for name, a in x.items() if not name.startswith(_OTHERS)},
        grad_out=incoming["grad_out"],
        grad_state=(incoming["grad_log_mass"], incoming["grad_mean"]),
        causal=causal,
        offsets=x["offsets"] if options.pop("packed", False) else None,
        initial_state=(x["initial_log_mass"], x["initial_mean"]) if state else None,
        **options,
    )
