"""Gradients of the operators: finite differences, orders two and three, float32's share."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from performer import Performer, reference
from performer.ops import gradients
from support.inputs import Case, cotangents, forms, make
from support.operator_calls import FORWARD, call, composed, definition, needs_library

pytestmark = needs_library

SMALL = Case(
    batch=1,
    rows=4,
    heads=2,
    groups=1,
    dim=2,
    value_dim=2,
    features=3,
    query_projections=2,
    feature_biases=1,
    bias="B1S",
    state=1,
)
MAPS = {
    "softmax": {},
    "softmax, no norm": {"key_norm": False, "scale": 0.3},
    "relu": {"feature_map": "relu", "feature_epsilon": 0.1},
    "elu": {"feature_map": "elu"},
}
# Of NearFar: blocks of one row, so that the last two rows have far keys.
WINDOW = {"exact_window": 1, "causal": True}
OPS_AND_MAPS = [
    pytest.param(op, attributes, id=f"{op}, {name}")
    for op in FORWARD
    for name, attributes in MAPS.items()
    if op != "NearFar" or "softmax" in name
]
maps = pytest.mark.parametrize(("op", "attributes"), OPS_AND_MAPS)


@pytest.mark.parametrize("op", FORWARD)
def test_the_schema_of_the_gradients_is_the_registered_one(op):
    _, inputs, outputs, attributes = gradients._FORMS[op]
    forward, backward = definition(op), definition(f"{op}Grad")
    saved = [name for name in outputs if name not in inputs]
    constants = ("offsets", "start") if op == "NearFar" else ("offsets",)
    assert [arg.name for arg in forward.input_arg] == [*inputs, *constants]
    assert [arg.name for arg in forward.output_arg] == [*outputs]
    assert {attr.name for attr in forward.attr if attr.type != "type"} == {*attributes}
    incoming = [f"grad_{name}" for name in outputs]
    assert [arg.name for arg in backward.input_arg] == [*inputs, *constants, *saved, *incoming]
    assert [arg.name for arg in backward.output_arg] == [f"grad_{name}" for name in inputs]


def point(op):
    """All float64 inputs of an operator, those that are differentiable first by name."""
    x = make(SMALL, "float64", seed=3)
    x["log_mass"], x["mean"] = x["initial_log_mass"], x["initial_mean"]
    names = [arg.name for arg in definition(op).input_arg if arg.name not in ("offsets", "start")]
    return x, names


@maps
def test_gradients_are_finite_differences(op, attributes):
    x, names = point(op)
    weights = dict(cotangents(SMALL, "float64").items())

    def scalar_of(name):
        def loss(value):
            results = call(op, {**x, name: value}, **attributes, **WINDOW)
            return sum(tf.reduce_sum(r * weights[f"grad_{n}"]) for n, r in results.items())

        return loss

    for name in names:
        analytic, numeric = tf.test.compute_gradient(scalar_of(name), [x[name]], delta=1e-5)
        scale = max(1.0, np.abs(numeric[0]).max())
        assert np.abs(analytic[0] - numeric[0]).max() <= 1e-6 * scale, name


@maps
def test_second_order_is_that_of_the_composition(op, attributes):
    x, names = point(op)
    rng = np.random.default_rng(8)
    weights = cotangents(SMALL, "float64")
    directions = {name: tf.constant(rng.normal(size=x[name].shape)) for name in names}

    def second(operator):
        values = {name: tf.constant(x[name]) for name in names}
        with tf.GradientTape() as outer:
            outer.watch(values)
            with tf.GradientTape() as inner:
                inner.watch(values)
                results = operator(op, {**x, **values}, **attributes, **WINDOW)
                loss = sum(tf.reduce_sum(r**2 * weights[f"grad_{n}"]) for n, r in results.items())
            first = inner.gradient(loss, values)
            product = sum(tf.reduce_sum(first[n] * directions[n]) for n in names)
        return outer.gradient(product, values)

    got, wanted = second(call), second(composed)
    for name in names:
        scale = max(1.0, np.abs(wanted[name]).max())
        assert np.abs(got[name] - wanted[name]).max() <= 1e-9 * scale, name


@pytest.mark.parametrize("op", ["Causal", "NearFar"])
def test_one_tensor_as_both_projections_has_the_second_order_of_two_equal_ones(op):
    x = make(dataclasses.replace(SMALL, query_projections=1), "float64", seed=3)
    one = tf.constant(x["query_projection"])
    direction = np.random.default_rng(8).normal(size=one.shape)

    def second(*sides):
        with tf.GradientTape() as outer:
            outer.watch(sides)
            with tf.GradientTape() as inner:
                inner.watch(sides)
                both = {"query_projection": sides[0], "key_projection": sides[-1]}
                results = call(op, {**x, **both}, **WINDOW)
                loss = sum(tf.reduce_sum(r**2) for r in results.values())
            product = sum(tf.reduce_sum(g * direction) for g in inner.gradient(loss, sides))
        return sum(outer.gradient(product, sides))

    np.testing.assert_allclose(second(one), second(one, tf.constant(one.numpy())), rtol=1e-9)


@pytest.mark.parametrize("op", FORWARD)
def test_second_order_is_finite_differences_of_the_first(op):
    x, names = point(op)
    rng = np.random.default_rng(9)
    weights = cotangents(SMALL, "float64")
    direction, other = ({n: rng.normal(size=x[n].shape) for n in names} for _ in range(2))

    def first(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            results = call(op, {**x, **values}, **WINDOW)
            loss = sum(tf.reduce_sum(r**2 * weights[f"grad_{n}"]) for n, r in results.items())
        return tape.gradient(loss, values)

    values = {name: tf.constant(x[name]) for name in names}
    with tf.GradientTape() as tape:
        tape.watch(values)
        product = sum(tf.reduce_sum(g * other[n]) for n, g in first(values).items())
    second = tape.gradient(product, values)
    analytic = sum(float(tf.reduce_sum(second[n] * direction[n])) for n in names)
    step = 1e-5
    ends = [
        first({n: tf.constant(x[n] + sign * step * direction[n]) for n in names})
        for sign in (1, -1)
    ]
    numeric = sum(float(tf.reduce_sum((ends[0][n] - ends[1][n]) * other[n])) for n in names)
    numeric /= 2 * step
    assert abs(analytic - numeric) <= 1e-6 * max(1.0, abs(numeric))


@pytest.mark.slow
@pytest.mark.parametrize("op", FORWARD)
def test_third_order_is_finite_differences_of_the_second(op):
    x, names = point(op)
    rng = np.random.default_rng(10)
    weights = cotangents(SMALL, "float64")
    direction = {n: tf.constant(rng.normal(size=x[n].shape)) for n in names}

    def derivatives(t):
        """The second and the third along `direction`, at `x` + t `direction`."""
        t = tf.constant(t, tf.float64)
        with tf.GradientTape() as third:
            third.watch(t)
            with tf.GradientTape() as second:
                second.watch(t)
                with tf.GradientTape() as first:
                    first.watch(t)
                    values = {n: tf.constant(x[n]) + t * direction[n] for n in names}
                    results = call(op, {**x, **values}, **WINDOW)
                    loss = sum(
                        tf.reduce_sum(r**2 * weights[f"grad_{n}"]) for n, r in results.items()
                    )
                slope = first.gradient(loss, t)
            curvature = second.gradient(slope, t)
        return float(curvature), float(third.gradient(curvature, t))

    step = 1e-4
    numeric = (derivatives(step)[0] - derivatives(-step)[0]) / (2 * step)
    assert abs(derivatives(0.0)[1] - numeric) <= 1e-5 * max(1.0, abs(numeric))


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


INPUTS = ("query", "key", "value", "query_projection", "key_projection", "feature_bias")


def attend(operator, x, incoming, causal, dtype="float32"):
    """out and the gradients of INPUTS, by `call` or `composed`."""
    x = {name: a if a.dtype == np.int64 else tf.cast(a, dtype) for name, a in x.items()}
    incoming = tf.cast(incoming, dtype)

    @tf.function(autograph=False)  # its loops are 15 times as fast
    def both(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            inputs = {**x, **values}
            if causal:
                out = operator("Causal", inputs)["out"]
            else:
                out = operator("Read", {**inputs, **operator("Summarize", inputs)})["out"]
        return {"out": out, **tape.gradient(out, values, incoming)}

    results = both({name: x[name] for name in INPUTS})
    return {name: result.numpy() for name, result in results.items()}


def assert_errors_at_most_twice_theirs(ours, theirs, exact):
    for name in ("out", *INPUTS):
        error, allowed = (rms(results[name] - exact[name]) for results in (ours, theirs))
        print(f"{name}: rms error {error:.3g}, composition {allowed:.3g}")
        assert error <= 2 * allowed, f"{name}: rms {error:.3g}, composition {allowed:.3g}"


@forms
@pytest.mark.parametrize("std", [0.5, 1.0, 3.0, 5.0])
def test_float32_errors_are_at_most_twice_those_of_the_composition(causal, std):
    case = Case(batch=1, rows=384, heads=4, groups=2, dim=64, value_dim=32, features=64, std=std)
    x = make(case, seed=5)
    incoming = cotangents(case, seed=6)["grad_out"]
    plain = {name: x[name] for name in (*INPUTS, "key_bias")}
    exact = {
        "out": reference.attention(**plain, causal=causal)[0],
        **reference.attention_gradients(**plain, grad_out=incoming, causal=causal),
    }
    results = (attend(operator, x, incoming, causal) for operator in (call, composed))
    assert_errors_at_most_twice_theirs(*results, exact)


@pytest.mark.slow
@forms
@pytest.mark.parametrize("rows", [100_000, 1_000_000])
def test_float32_errors_of_long_sequences_are_at_most_twice_those_of_the_composition(rows, causal):
    """Values of mean 1. The composition needs 4 GB for a million causal rows."""
    case = Case(batch=1, rows=rows, heads=1, groups=1, dim=8, value_dim=8, features=16, std=0.5)
    x = make(case)
    x["value"] += 1
    x["feature_bias"][:] = 0
    incoming = cotangents(case)["grad_out"]
    results = (attend(operator, x, incoming, causal) for operator in (call, composed))
    exact = attend(call, x, incoming, causal, "float64")
    assert_errors_at_most_twice_theirs(*results, exact)


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_projections_that_no_tape_watches_cost_nothing_and_change_no_bit_of_the_others(op, graph):
    x = make(dataclasses.replace(SMALL, rows=70, features=8), "float32", seed=4)
    x.update(log_mass=x["initial_log_mass"], mean=x["initial_mean"])
    x = {name: tf.constant(value) for name, value in x.items()}
    attributes = WINDOW if op == "NearFar" else {}
    names = [name for name in gradients._FORMS[op][1] if name in x]

    def found(sources):
        with tf.GradientTape() as tape:
            tape.watch([x[name] for name in sources])
            out = call(op, x, **attributes)
            total = tf.add_n([tf.reduce_sum(tf.sin(y)) for y in tf.nest.flatten(out)])
        return tape.gradient(total, {name: x[name] for name in sources})

    others = [name for name in names if "projection" not in name and name != "feature_bias"]
    asked, not_asked, of_bias = (
        tf.function(found).get_concrete_function(sources) if graph else None
        for sources in (names, others, [name for name in names if "projection" not in name])
    )
    if graph:
        biased = "feature_bias" in names
        for function, wanted in ((asked, True), (not_asked, False), (of_bias, biased)):
            made = [o for o in function.graph.get_operations() if o.type == f"Performer>{op}Grad"]
            assert [o.get_attr("projection_gradient") for o in made] == [wanted]
    whole = asked() if graph else found(names)
    part = not_asked() if graph else found(others)
    for name in others:
        np.testing.assert_array_equal(part[name], whole[name], err_msg=name)
    assert all(np.any(whole[name]) for name in names if "projection" in name)


@pytest.mark.parametrize("causal", [False, True], ids=["all keys", "causal"])
def test_a_layer_asks_for_no_gradient_of_its_draw(causal):
    layer = Performer(2, 8, supports=16, seed=1)
    x = tf.random.stateless_normal([1, 9, 16], [1, 2])
    layer(x, x)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, x, use_causal_mask=causal) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    made = [o for o in step.get_concrete_function().graph.get_operations() if "Grad" in o.type]
    asked = [o.get_attr("projection_gradient") for o in made if o.type.startswith("Performer>")]
    assert asked
    assert not any(asked)
