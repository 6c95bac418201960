"""`tf.vectorized_map` and `jacobian` over attention: each iteration by itself, without a loop."""

import importlib

import numpy as np
import pytest
import tensorflow as tf

from performer import favor_attention
from performer.ops import vectorize
from support.compare import assert_close, assert_same_bits
from support.inputs import forms
from support.operator_calls import needs_library

pytestmark = needs_library
N, H, G, D, M = 3, 4, 2, 8, 12


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


@pytest.fixture
def no_loop(caplog):
    """Fails the test if TensorFlow says that it runs a loop."""
    tf.get_logger().addHandler(caplog.handler)
    yield
    tf.get_logger().removeHandler(caplog.handler)
    assert "while_loop" not in caplog.text


def with_gradients(inputs, **options):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out = favor_attention(*inputs, **options)
    return [out, *tape.gradient(out, inputs)]


def by_hand(function, count):
    return [tf.stack(results) for results in zip(*map(function, range(count)), strict=True)]


@forms
@pytest.mark.parametrize(
    ("projections", "segments"), [("shared", True), ("by group", False), ("by iteration", False)]
)
def test_a_vectorized_map_is_every_iteration_by_itself(projections, segments, causal, no_loop):
    query, key, value = normal(N, 2, 9, H, D), normal(2, 9, G, D, seed=1), normal(N, 2, 9, G, 5)
    shape = {"shared": (M, D), "by group": (G, M, D), "by iteration": (N, M, D)}[projections]
    w = normal(*shape, seed=2)
    options = {"causal": causal, "key_mask": tf.sequence_mask([9, 4], 9)}
    if segments:
        options["segment_ids"] = tf.constant([[0] * 4 + [1] * 5, [0] * 9])

    def one(query, value, w):
        return with_gradients([query, key, value, w], **options)

    if projections == "by iteration":
        results = tf.vectorized_map(lambda x: one(*x), (query, value, w))
    else:
        results = tf.vectorized_map(lambda x: one(*x, w), (query, value))
    expected = by_hand(
        lambda i: one(query[i], value[i], w[i] if projections == "by iteration" else w), N
    )
    for result, other in zip(results[:-1], expected[:-1], strict=True):
        assert_same_bits(result, other)
    # Heads share it, so that its gradient is a sum in another order.
    assert_close(results[-1], expected[-1], relative=1e-5)


@forms
def test_a_vectorized_map_with_a_window_is_every_iteration_by_itself(causal, no_loop):
    query, key, value = (
        normal(N, 1, 200, H, D),
        normal(1, 200, G, D, seed=1),
        normal(N, 1, 200, G, 5),
    )
    w, options = normal(M, D, seed=2), {"causal": causal, "exact_window": 64}

    def one(query, value):
        return with_gradients([query, key, value], projection=w, **options)

    results = tf.vectorized_map(lambda x: one(*x), (query, value))
    expected = by_hand(lambda i: one(query[i], value[i]), N)
    for result, other in zip(results, expected, strict=True):
        assert_same_bits(result, other)


@pytest.mark.parametrize(("causal", "known"), [(False, True), (True, False)])
def test_a_jacobian_is_the_gradient_of_every_output(known, causal, no_loop):
    inputs = [normal(1, 2, 2, 4), normal(1, 2, 1, 4, seed=1), normal(1, 2, 1, 2), normal(6, 4)]

    @tf.function(
        input_signature=[tf.TensorSpec(x.shape if known else [None] * x.shape.rank) for x in inputs]
    )
    def jacobians(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = tf.reshape(favor_attention(*inputs, causal=causal), [-1])
        return tape.jacobian(out, inputs)

    def gradients(i):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = tf.reshape(favor_attention(*inputs, causal=causal), [-1])[i]
        return tape.gradient(out, inputs)

    for result, other in zip(jacobians(*inputs), by_hand(gradients, 8), strict=True):
        assert_close(result, other, relative=1e-5)


def test_segments_that_differ_between_iterations_take_a_loop_and_are_right():
    x, w = normal(2, 6, 2, D), normal(M, D)
    ids = tf.constant([[[0, 0, 1, 1, 1, 2], [0] * 6], [[0] * 6, [1, 1, 1, 1, 2, 2]]])

    def one(ids):
        return favor_attention(x, x, x, w, segment_ids=ids, max_segments=3)

    assert_close(tf.vectorized_map(one, ids), tf.stack([one(ids[0]), one(ids[1])]), relative=1e-6)


def test_a_tensorflow_without_the_private_registry_is_left_alone(monkeypatch):
    pfor = importlib.import_module("tensorflow.python.ops.parallel_for.pfor")
    monkeypatch.delattr(pfor, "RegisterPFor")
    vectorize._register()  # registers nothing, raises nothing
