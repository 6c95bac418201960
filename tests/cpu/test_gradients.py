"""Gradients of the compiled core against the analytic gradients of the reference."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from support.cases import CASES, ELU, RELU, TOKENS, cases, parameters
from support.compare import assert_close, assert_finite
from support.core_calls import backward, expected_gradients, forward, isas, run
from support.inputs import Case, cotangents, forms, make
from support.promises import check_gradients, check_gradients_of_values_with_a_mean


@isas
@pytest.mark.parametrize(("causal", "name", "dtype"), parameters(leave_out=TOKENS))
def test_gradients_are_those_of_the_reference(causal, name, dtype, isa):
    check_gradients(partial(run, isa=isa), cases(causal)[name], causal, dtype)


@isas
@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_several_panels_of_features_are_those_of_the_reference(causal, dtype, isa):
    case = Case(batch=1, rows=150, heads=2, features=201, value_dim=24)
    check_gradients(partial(run, isa=isa), case, causal, dtype)


SMALL = replace(CASES["an initial state for each, 500 rows"], rows=60, heads=6)


@isas
@pytest.mark.parametrize("attributes", [(), (RELU,), (ELU,)], ids=["softmax", "relu", "elu"])
def test_read_has_the_gradient_of_any_state(isa, attributes):
    x, incoming = make(SMALL, "float64"), cotangents(SMALL, "float64")
    options = dict(attributes)
    x.update(log_mass=x["initial_log_mass"], mean=x["initial_mean"])
    out = run("Read", x, isa=isa, **options)
    grads = run("ReadGrad", {**x, **out, **incoming}, isa=isa, **options)
    no_keys = {**x, "key": x["key"][:, :0], "value": x["value"][:, :0]}
    no_keys["key_bias"] = x["key_bias"][..., :0]
    del no_keys["log_mass"], no_keys["mean"]
    no_state_grad = {name: np.zeros_like(grad) for name, grad in incoming.items()}
    exact = expected_gradients(
        no_keys,
        {**no_state_grad, "grad_out": incoming["grad_out"]},
        causal=False,
        state=True,
        **options,
    )
    for name in ("query", "query_projection", "feature_bias"):
        assert_close(grads[f"grad_{name}"], exact[name], relative=1e-10, what=name)
    for name in ("log_mass", "mean"):
        assert_close(grads[f"grad_{name}"], exact[f"initial_{name}"], relative=1e-10, what=name)


@isas
@pytest.mark.parametrize("attributes", [(), (RELU,), (ELU,)], ids=["softmax", "relu", "elu"])
def test_summarize_has_the_gradient_of_any_cotangent(isa, attributes):
    x, incoming = make(SMALL, "float64"), cotangents(SMALL, "float64")
    options = dict(attributes)
    state = run("Summarize", x, isa=isa, **options)
    grads = run("SummarizeGrad", {**x, **state, **incoming}, isa=isa, **options)
    no_queries = {**x, "query": x["query"][:, :0]}
    incoming["grad_out"] = incoming["grad_out"][:, :0]
    exact = expected_gradients(no_queries, incoming, causal=False, **options)
    for name in ("key", "value", "key_projection", "key_bias"):
        assert_close(grads[f"grad_{name}"], exact[name], relative=1e-10, what=name)


@forms
@pytest.mark.parametrize("attributes", [(), (RELU,), (ELU,)], ids=["softmax", "relu", "elu"])
def test_gradients_are_finite_differences_of_the_core_itself(causal, attributes):
    """<gradient, direction> against the core's own results, one direction for each input."""
    case = replace(SMALL, rows=50, attributes=attributes)
    x, incoming = make(case, "float64"), cotangents(case, "float64")
    grads = backward(x, incoming, causal, **case.options)
    rng = np.random.default_rng(3)

    def loss(inputs):
        results = forward(inputs, causal, **case.options)
        return sum(np.sum(results[name] * incoming[f"grad_{name}"]) for name in results)

    for name, grad in grads.items():
        direction = rng.normal(size=x[name].shape)
        direction[~np.isfinite(x[name])] = 0
        step = 1e-6
        ends = []
        for sign in (1, -1):
            moved = np.where(direction == 0, x[name], x[name] + sign * step * direction)
            ends.append(loss({**x, name: moved}))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert abs(np.sum(grad * direction) - numeric) <= 1e-6 * max(1, abs(numeric)), name


@isas
@forms
@pytest.mark.parametrize("masked", ["holes", "left", "row"])
def test_masked_keys_have_gradient_exactly_zero(causal, masked, isa):
    case = replace(
        CASES["less than a chunk, holes, a projection for each head"], rows=70, masked=masked
    )
    x = make(case)
    hidden = np.isneginf(x["key_bias"])
    grads = backward(x, cotangents(case), causal, isa=isa)
    for name, grad in grads.items():
        assert_finite(grad, what=name)
    assert not grads["key_bias"][hidden].any()
    rows = hidden.transpose(0, 2, 1)
    assert not grads["key"][rows].any()
    assert not grads["value"][rows].any()


@isas
@forms
def test_queries_that_see_nothing_give_and_get_exactly_zero(causal, isa):
    case = replace(CASES["all keys of a batch row masked"], masked="row")
    x, incoming = make(case), cotangents(case)
    assert not forward(x, causal, isa=isa)["out"][-1].any()
    incoming["grad_log_mass"][:], incoming["grad_mean"][:] = 0, 0
    grads = backward(x, incoming, causal, isa=isa)
    for name in ("query", "key", "value", "key_bias"):
        assert not grads[name][-1].any(), name


@isas
@forms
def test_every_gradient_is_written_where_there_is_nothing_to_sum(causal, isa):
    for name in ("no rows", "no batch", "packed, no sequence with rows"):
        case = CASES[name]
        incoming = cotangents(case)
        incoming["grad_log_mass"][:], incoming["grad_mean"][:] = 0, 0
        x = make(case)
        for name, grad in backward(x, incoming, causal, isa=isa, **case.options).items():
            assert grad.shape == x[name].shape
            assert not grad.any(), name


@isas
@forms
def test_gradients_of_long_sequences_do_not_drown_in_what_values_have_in_common(causal, isa):
    """10,000 rows, values of mean 1; float32 against float64.

    With such values the rms errors of the plain composition are about 7e-6 (causal) and 1.6e-5 for
    queries, 8e-7 for keys, 3e-7 for values.
    """
    bounds = {"query": 8e-6, "key": 9e-7, "value": 6e-7}
    check_gradients_of_values_with_a_mean(partial(run, isa=isa), 10_000, causal, bounds)


@isas
def test_gradients_of_a_single_chunk_do_not_drown_in_it_either(isa):
    """No state before the chunk tells what its values have in common."""
    bounds = {"query": 1e-6, "key": 5e-7, "value": 4e-7}
    check_gradients_of_values_with_a_mean(partial(run, isa=isa), 40, True, bounds, mean=1000)


def as_drawn(x: dict) -> None:
    """The key that outweighs all others lies in the first chunk."""


def largest_last(x: dict) -> None:
    """Sorts keys so that each outweighs all before it: the shorter a key, the more it weighs."""
    order = np.argsort(-np.square(x["key"]).sum(-1)[0, :, 0])
    x["key"][:], x["value"][:] = x["key"][:, order], x["value"][:, order]


def largest_in_a_later_chunk(x: dict) -> None:
    """Moves the key that outweighs all others to row 150."""
    best = np.argmin(np.square(x["key"]).sum(-1)[0, :, 0])
    for name in ("key", "value"):
        x[name][0, [best, 150]] = x[name][0, [150, best]]


@isas
@forms
@pytest.mark.parametrize(
    ("size", "arrange"),
    [
        (1e4, as_drawn),
        (1e4, largest_last),  # keys that are clipped everywhere would weigh the same
        (1e4, largest_in_a_later_chunk),
        (1e6, as_drawn),
        (1e6, largest_in_a_later_chunk),
    ],
)
def test_large_entries_give_the_gradients_of_float64(size, arrange, causal, isa):
    """Log-features of 1e9 to 1e10 are rounded to 64 or more; weights must not depend on that.

    Each query sees one key only, so that all gradients but those of values are about 0: differences
    of numbers of 1e6, multiplied by keys of 1e4.
    """
    case = Case(batch=1, rows=300, heads=2, groups=1, dim=16, value_dim=16, features=64)
    x, incoming = make(case), cotangents(case)
    for name in ("query", "key", "value"):
        x[name][:] = np.clip(size * x[name], -65504, 65504)
    arrange(x)
    for name in ("grad_log_mass", "grad_mean"):
        incoming[name][:] = 0
    wide = [
        {n: a if n == "offsets" else a.astype("f8") for n, a in y.items()} for y in (x, incoming)
    ]
    run_here = partial(run, isa=isa)
    out, exact = (forward(y, causal, run_here)["out"] for y in (x, wide[0]))
    assert_close(out, exact, rms=1e-6, what="out")
    grads, exact = backward(x, incoming, causal, run_here), backward(*wide, causal, run_here)
    assert_close(grads["value"], exact["value"], rms=2e-6, what="value")
    for name, grad in grads.items():
        if name != "value":
            assert np.abs(exact[name]).max() < 1e-4, name
            assert_close(grad, exact[name], worst=1e-3, what=name)
