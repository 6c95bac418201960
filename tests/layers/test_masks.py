"""Segments, prefixes and grouped heads in the layer: linear, and equal to what they stand for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def linear(**options):
    options = {"num_heads": 2, "key_dim": 4, "supports": 16, "seed": 5, **options}
    return performer.Performer(bias_initializer="random_normal", **options)


def close(output, expected):
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=2e-6)


X = normal(3, 7, 6)
KEPT = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]], bool)
SEGMENTS = np.array([[4, 4, 4, 1, 1, 2, 2], [0] * 7, [9, 8, 8, 8, 8, 8, 7]])
PREFIX = np.array([[1, 1, 1, 0, 0, 0, 0], [0] * 7, [0, 1, 1, 0, 1, 0, 0]], bool)
CAUSAL = np.tri(7, dtype=bool)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_are_separate_sequences(causal, graph):
    layer = linear()
    layer.build(X.shape, X.shape)

    def call(x, segments, mask):
        return layer(x, x, segment_ids=segments, value_mask=mask, use_causal_mask=causal)

    if graph:
        spec = tf.TensorSpec
        call = tf.function(
            call,
            input_signature=[
                spec([None, None, 6]), spec([None, None], tf.int64), spec([None, None], tf.bool)
            ],
        )  # fmt: skip
    output = call(X, SEGMENTS, KEPT).numpy()
    for row, ids in enumerate(SEGMENTS):
        for segment in np.unique(ids):
            at = ids == segment
            alone = X[row : row + 1, at]
            mask = KEPT[row : row + 1, at]
            close(output[row, at], layer(alone, alone, value_mask=mask, use_causal_mask=causal)[0])
    poisoned = X.copy()
    poisoned[0, 3:] = np.nan
    np.testing.assert_array_equal(call(poisoned, SEGMENTS, KEPT)[0, :3], output[0, :3])


MASKS = {
    "segments": ({"segment_ids": SEGMENTS}, SEGMENTS[:, :, None] == SEGMENTS[:, None]),
    "causal segments": (
        {"segment_ids": SEGMENTS, "use_causal_mask": True},
        (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & CAUSAL,
    ),
    "prefix": ({"prefix_mask": PREFIX, "use_causal_mask": True}, PREFIX[:, None] | CAUSAL),
    "prefix with holes": (
        {"prefix_mask": PREFIX, "use_causal_mask": True, "value_mask": KEPT},
        (PREFIX[:, None] | CAUSAL) & KEPT[:, None],
    ),
    "causal": ({"use_causal_mask": True}, CAUSAL),
    "padding": ({"value_mask": KEPT}, KEPT[:, None] & np.ones((1, 7, 1), bool)),
    "padded queries": (
        {"query_mask": KEPT, "key_mask": KEPT},
        KEPT[:, None] & KEPT[:, :, None],
    ),
}


@pytest.mark.parametrize("groups", [None, 1])
@pytest.mark.parametrize("case", MASKS)
def test_masks_that_factor_equal_their_dense_form(case, groups):
    """The same mask, pair by pair; and asked for scores, the call gives the same output."""
    options, pairs = MASKS[case]
    layer = linear(num_key_value_heads=groups, value_dim=3)
    output = layer(X, X, **options)
    close(output, layer(X, X, attention_mask=pairs))
    dense, scores = layer(X, X, return_attention_scores=True, **options)
    close(dense, output)
    assert not np.any(scores.numpy()[~np.broadcast_to(pairs[..., None, :, :], scores.shape)])
    seen = np.broadcast_to(pairs.any(-1)[..., None, :], scores.shape[:-1])
    np.testing.assert_allclose(scores.numpy().sum(-1), seen, rtol=1e-6)


@pytest.mark.parametrize("axes", [(1,), (2,), (2, 1)])
def test_segments_and_prefixes_over_other_axes(axes):
    layer = linear(attention_axes=axes)
    x = normal(2, 3, 4, 6)
    shape = (2, x.shape[axes[0]]) if len(axes) == 1 else x.shape[:-1]
    segments = np.sort(np.random.default_rng(1).integers(0, 3, shape), -1)
    prefix = np.random.default_rng(2).random(shape) < 0.4
    for options in ({"segment_ids": segments}, {"prefix_mask": prefix}):
        output = layer(x, x, use_causal_mask=True, **options)
        dense, _ = layer(x, x, use_causal_mask=True, return_attention_scores=True, **options)
        close(dense, output)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_the_dense_form(causal):
    layer = linear(dtype="float64")
    layer.build(X.shape, X.shape)
    weights = layer.trainable_weights
    direction = tf.constant(normal(3, 7, 6, seed=1).astype("float64"))

    def gradients(**options):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(direction * layer(X, X, **options))
        return tape.gradient(loss, [w.value for w in weights])

    mask = CAUSAL[None] if causal else np.ones((1, 7, 7), bool)
    for one, other in zip(
        gradients(attention_mask=mask), gradients(use_causal_mask=causal), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("form", [{}, {"return_attention_scores": True}])
def test_dropped_keys_in_both_forms(form):
    """Scores are those of all keys; the output is the mean of the keys that are left."""
    layer = linear(num_heads=1, dropout=0.5)
    query, value = np.tile(X[:1], (200, 1, 1)), np.tile(X[:1, :2], (200, 1, 1))
    output, *scores = tf.nest.flatten(layer(query, value, training=True, **form))
    expected = [
        layer(X[:1], X[:1, :2], value_mask=np.array([kept]))[0].numpy()
        for kept in ([True, True], [True, False], [False, True], [False, False])
    ]
    distance = [np.abs(output - e).max((1, 2)) for e in expected]
    assert np.all(np.min(distance, 0) < 1e-5)
    # Binomial of 200 at a quarter: standard deviation 6.
    assert np.all(np.abs(np.bincount(np.argmin(distance, 0), minlength=4) - 50) < 31)
    for score in scores:
        np.testing.assert_allclose(score.numpy().sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("gate", [False, True])
def test_grouped_heads_are_repeated_heads(groups, gate):
    if gate and "use_gate" not in performer.Performer(2, 4, supports=8).get_config():
        pytest.skip("this Keras has no use_gate")
    options = {"num_heads": 4, **({"use_gate": True} if gate else {})}
    grouped = linear(num_key_value_heads=groups, **options)
    grouped(X, X)
    assert grouped.key_dense.kernel.shape == (6, groups, 4)
    whole = linear(**options)
    whole.build(X.shape, X.shape)
    for name in ("query", "key", "value", "output", *(["gate"] if gate else [])):
        source, target = (getattr(x, f"_{name}_dense") for x in (grouped, whole))
        for one, other in ((source.kernel, target.kernel), (source.bias, target.bias)):
            repeats = 4 // groups if name in ("key", "value") else 1
            other.assign(np.repeat(one, repeats, axis=-2) if repeats > 1 else one)
    for call in ({}, {"use_causal_mask": True}, {"attention_mask": CAUSAL}):
        close(grouped(X, X, **call), whole(X, X, **call))
    quadratic = performer.Performer(
        key_dim=4, num_key_value_heads=groups, attention_method="quadratic", **options
    )
    performer.convert.copy_weights(grouped, quadratic)
    exact = keras.layers.GroupQueryAttention(
        head_dim=4,
        num_query_heads=4,
        num_key_value_heads=groups,
        **({"use_gate": True} if gate else {}),
    )
    performer.convert.copy_weights(grouped, exact)
    np.testing.assert_allclose(quadratic(X, X), exact(X, X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scores", [False, True])
def test_shapes_of_a_functional_model_with_masks_are_inferred(scores):
    inputs, mask = keras.Input((None, 8)), keras.Input((None,), dtype="bool")
    layer = performer.Performer(2, 4, supports=8)
    outputs = layer(inputs, inputs, query_mask=mask, key_mask=mask, return_attention_scores=scores)
    model = keras.Model([inputs, mask], outputs)
    found = model.compute_output_shape([(3, 6, 8), (3, 6)])
    assert found == (((3, 6, 8), (3, 2, 6, 6)) if scores else (3, 6, 8))
