"""Gradients of the plain TensorFlow composition, of both orders, also under masks."""

import numpy as np
import pytest
import tensorflow as tf

from performer import composition, reference
from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_finite
from support.composition_calls import MAPS, E, M, attend, random_inputs, random_state, tensors
from support.inputs import forms


def with_gradients(inputs, state, cotangents, causal, offsets=None, **attributes):
    """First-order gradients by input name."""
    inputs, state = tensors(inputs), [tf.constant(x) for x in state]
    with tf.GradientTape() as tape:
        tape.watch([inputs, state])
        results = attend(inputs, state, causal, offsets, **attributes)
    grads = tape.gradient(results, [inputs, state], [tf.constant(x) for x in cotangents])
    return {**grads[0], "initial_log_mass": grads[1][0], "initial_mean": grads[1][1]}


@forms
@pytest.mark.parametrize(
    ("attributes", "offsets"),
    [
        *((attributes, None) for attributes in MAPS.values()),
        ({}, [0, 4, 4, 9]),
        ({}, [0, 1, 1, 140]),
    ],
    ids=[*MAPS, "packed", "packed, several packed blocks"],
)
def test_gradients_are_those_of_the_reference(attributes, causal, offsets):
    packed, rows = offsets is not None, offsets[-1] if offsets else 9
    batch = 1 if packed else 2
    inputs = random_inputs(batch=batch, rows=rows, bias=(batch, 1, rows))
    state = random_state()
    rng = np.random.default_rng(7)
    sequences = 3 if packed else 2
    grad_out = rng.normal(size=(*inputs["query"].shape[:3], E))
    grad_state = rng.normal(size=(sequences, 2, M)), rng.normal(size=(sequences, 2, M, E))
    if packed:  # an empty sequence keeps its initial state: both sides agree on that too
        assert offsets[1] == offsets[2]
    got = with_gradients(inputs, state, [grad_out, *grad_state], causal, offsets, **attributes)
    expected = reference.attention_gradients(
        **inputs,
        grad_out=grad_out,
        initial_state=state,
        grad_state=grad_state,
        causal=causal,
        offsets=offsets,
        **attributes,
    )
    bound = tolerances("float64").gradient_rms
    for name, grad in got.items():
        assert_close(grad, expected[name], relative=bound, what=name)


@forms
def test_gradients_across_chunks_are_those_of_the_reference(causal):
    rows = 129
    inputs = random_inputs(
        batch=1, rows=rows, bias=(1, 1, rows), heads=2, groups=1, projections=(1, 1)
    )
    rng = np.random.default_rng(7)
    state = random_state(groups=1)
    grad_out = rng.normal(size=(1, rows, 2, E))
    grad_state = rng.normal(size=(1, 1, M)), rng.normal(size=(1, 1, M, E))
    got = with_gradients(inputs, state, [grad_out, *grad_state], causal)
    expected = reference.attention_gradients(
        **inputs, grad_out=grad_out, initial_state=state, grad_state=grad_state, causal=causal
    )
    for name, grad in got.items():
        assert_close(grad, expected[name], relative=1e-10, what=name)


@pytest.mark.parametrize(
    ("causal", "feature_map", "graph"),
    [
        (False, "softmax", False),
        (False, "relu", False),
        (True, "elu", False),
        (True, "softmax", True),
    ],
)
def test_second_order_is_that_of_finite_differences(causal, graph, feature_map):
    """d/dt <gradient(x + t direction), other> at t = 0, over all inputs at once."""
    rows = 1 if graph else 6  # tracing takes its time
    inputs = random_inputs(
        batch=1, rows=rows, heads=2, groups=1, projections=(2, 1), bias=(1, 1, rows)
    )
    inputs["key_bias"][0, 0] = [-np.inf, 0.2, 0.1, -np.inf, 0.0, -0.3][-rows:]
    names = [*inputs, "initial_log_mass", "initial_mean"]
    point = [tf.constant(x) for x in (*inputs.values(), *random_state(groups=1))]
    rng = np.random.default_rng(2)
    direction, other = ([tf.constant(rng.normal(size=x.shape)) for x in point] for _ in range(2))
    weights = [tf.constant(rng.normal(size=s)) for s in ((1, rows, 2, E), (1, 1, M), (1, 1, M, E))]

    def gradient(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            results = attend(
                dict(zip(names[:7], values[:7], strict=True)),
                values[7:],
                causal,
                feature_map=feature_map,
            )
            loss = sum(tf.reduce_sum(w * x**2) for w, x in zip(weights, results, strict=True))
        return tape.gradient(loss, values)

    def product(values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            total = sum(tf.reduce_sum(g * o) for g, o in zip(gradient(values), other, strict=True))
        return tape.gradient(total, values)

    second = (tf.function(product, autograph=False) if graph else product)(point)
    for grad in second:
        assert_finite(grad)
    step = 1e-5
    ends = [
        gradient([x + sign * step * d for x, d in zip(point, direction, strict=True)])
        for sign in (1, -1)
    ]
    numeric = sum(
        float(tf.reduce_sum((a - b) / (2 * step) * o)) for a, b, o in zip(*ends, other, strict=True)
    )
    analytic = sum(float(tf.reduce_sum(g * d)) for g, d in zip(second, direction, strict=True))
    assert abs(analytic - numeric) < 1e-6 * max(1.0, abs(numeric)), (analytic, numeric)


@forms
@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        ("holes", "float32"),
        ("holes", "float16"),
        ("everything", "float32"),
    ],
)
def test_masks_over_nan_leave_values_and_gradients_of_both_orders_finite(causal, mask, dtype):
    inputs = random_inputs(std=3.0)
    bias = np.zeros((2, 1, 9))
    bias[:, :, [0, 1, 4]] = -np.inf
    bias[slice(1, 2) if mask == "holes" else slice(None)] = -np.inf  # a batch row, or all of them
    masked = np.broadcast_to(bias[:, 0] == -np.inf, (2, 9))
    inputs["key"][masked], inputs["value"][masked] = np.nan, np.inf
    inputs["key_bias"] = bias
    inputs = tensors(inputs, tf.as_dtype(dtype))
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = attend(inputs, None, causal)[0]
            loss = tf.reduce_sum(tf.cast(out, tf.float32) ** 2)
        grads = tape.gradient(loss, inputs)
        total = sum(tf.reduce_sum(tf.cast(g, tf.float32) * 0.1) for g in grads.values())
    assert_finite(out)
    for name, grad in {
        **grads,
        **{f"second {n}": g for n, g in outer.gradient(total, inputs).items()},
    }.items():
        assert_finite(grad, what=name)
    for name in ("key", "value"):
        assert not grads[name].numpy()[masked].any(), name
    assert not grads["key_bias"].numpy()[bias == -np.inf].any()
    if mask == "everything":
        assert not out.numpy().any()
        assert not any(grad.numpy().any() for grad in grads.values())


def test_relu_features_that_are_zero_have_finite_gradients():
    x, w = -tf.ones([1, 3, 1, 2]), tf.constant([[[1.0, 1.0], [-1.0, -1.0]]])  # one is, one is not
    inputs = {"key": x, "value": x, "key_projection": w, "key_bias": tf.zeros([1, 1, 1])}
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        log_mass, mean = composition.summarize(**inputs, feature_map="relu", feature_epsilon=0.0)
        total = tf.reduce_sum(mean) + tf.reduce_sum(log_mass[..., 1])
    assert log_mass[0, 0, 0] == float("-inf")
    for name, gradient in tape.gradient(total, inputs).items():
        assert np.isfinite(gradient).all(), name
