"""Dense attention: the same estimator as the operators, for any spread of features."""

import numpy as np
import pytest
import tensorflow as tf

from performer import favor_attention, orthogonal_projection
from performer.composition.dense import _exact_log_products, _log_products
from performer.features.tolerances import tolerances
from performer.ops.dense import dense_attention
from support import compare


def inputs(*, std=1.0, dtype="float32", length=6, keys=5, heads=4, groups=2):
    random = np.random.default_rng(0)
    shapes = (2, length, heads, 8), (2, keys, groups, 8), (2, keys, groups, 3)
    return [tf.cast(tf.constant(random.normal(0, std, shape)), dtype) for shape in shapes]


@pytest.mark.parametrize("feature_map", ["softmax", "relu", "elu"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_operators(dtype, feature_map, causal):
    q, k, v = inputs(dtype=dtype, keys=6)
    projection = orthogonal_projection(16, 8, seed=1, dtype=tf.float64)
    key_mask = np.array([[True] * 6, [False, True] * 3])
    options = {"feature_map": feature_map, "key_mask": key_mask}
    output, weights = dense_attention(
        q, k, v, projection, mask=np.tri(6, dtype=bool)[None, None] if causal else None, **options
    )
    expected = favor_attention(q, k, v, projection, causal=causal, **options)
    assert output.dtype == weights.dtype == dtype
    # Both are within the promise of the same reference.
    bound = 2 * tolerances(dtype, causal=causal).rms
    compare.assert_close(output, expected, rms=bound)
    seen = (np.tri(6, dtype=bool)[None] if causal else np.ones((1, 6, 6), bool)) & key_mask[:, None]
    total = np.broadcast_to(seen.any(-1)[:, None], (2, 4, 6))
    compare.assert_close(tf.reduce_sum(tf.cast(weights, "float64"), -1), total, worst=20 * bound)


@pytest.mark.parametrize("heads", [2, 3])
def test_one_key_head_for_all_queries(heads):
    """One key head and several batch rows: the product that TensorFlow's oneDNN gets wrong."""
    q, k, v = inputs(heads=heads, groups=1)
    projection = orthogonal_projection(16, 8, seed=1)
    output, _ = dense_attention(q, k, v, projection)
    alone = [
        dense_attention(q[b : b + 1, :, h : h + 1], k[b : b + 1], v[b : b + 1], projection)[0]
        for b in range(2)
        for h in range(heads)
    ]
    expected = tf.reshape(tf.stack(alone), [2, heads, 6, 3])
    compare.assert_close(output, tf.transpose(expected, [0, 2, 1, 3]), worst=1e-6)


@pytest.mark.parametrize("std", [1.0, 30.0, 3000.0])
def test_any_spread_of_features(std):
    """Masked to one key, a query returns its value, however far others lie above it."""
    q, k, v = inputs(std=std, dtype="float64", heads=2, groups=2)
    projection = orthogonal_projection(16, 8, seed=1, dtype=tf.float64)
    for key in range(5):
        mask = np.zeros((1, 1, 6, 5), bool)
        mask[..., key] = True
        output, weights = dense_attention(q, k, v, projection, mask=mask)
        compare.assert_close(output, tf.tile(v[:, key : key + 1], [1, 6, 1, 1]), relative=1e-12)
        compare.assert_close(weights, np.broadcast_to(mask, weights.shape), worst=1e-12)
    causal, _ = dense_attention(q, k, v, projection, mask=np.tri(6, 5, dtype=bool)[None, None])
    expected = favor_attention(q[:, :5], k, v, projection, causal=True)
    compare.assert_close(causal[:, :5], expected, relative=1e-12)


def test_both_ways_to_the_weights_and_their_gradients():
    random = np.random.default_rng(0)
    a, b = (tf.constant(random.normal(0, 3, (2, heads, 5, 6))) for heads in (3, 1))
    direction = tf.constant(random.normal(0, 1, (2, 3, 5, 5)))

    def gradients(function):
        with tf.GradientTape() as second:
            second.watch([a, b])
            with tf.GradientTape() as first:
                first.watch([a, b])
                result = function(a, b)
            one = first.gradient(result, [a, b], direction)
            loss = sum(tf.reduce_sum(g**2) for g in one)
        return [result, *one, *second.gradient(loss, [a, b])]

    products = gradients(lambda a, b: _log_products(a, b, tf.ones([1, 1, 5, 5], tf.bool)))
    for one, other in zip(gradients(_exact_log_products), products, strict=True):
        compare.assert_close(one, other, relative=1e-12)


@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number_reaches_those_who_see_it_only(where, number):
    q, k, v = (x.numpy() for x in inputs())
    projection = orthogonal_projection(16, 8, seed=1)
    mask = np.ones((1, 1, 6, 5), bool)
    mask[:, :, 2:, 3] = False
    expected = dense_attention(q, k, v, projection, mask=mask)
    (k if where == "key" else v)[0, 3, 1, 0] = number
    output, weights = dense_attention(q, k, v, projection, mask=mask)
    # Key head 1 serves query heads 2 and 3.
    seen = np.zeros((2, 6, 4), bool)
    seen[0, :2, 2:] = True
    for result, want, hit in (
        (output, expected[0], seen),
        (weights, expected[1], seen.transpose(0, 2, 1)),
    ):
        np.testing.assert_array_equal(np.isnan(result).all(-1), hit)
        np.testing.assert_array_equal(result.numpy()[~hit], want.numpy()[~hit])
    masked = dense_attention(q, k, v, projection, key_mask=np.arange(5)[None] != np.full((2, 1), 3))
    assert np.all(np.isfinite(masked[0]))


def test_refusals_name_the_argument():
    q, k, v = inputs()
    projection = orthogonal_projection(16, 8, seed=1)
    with pytest.raises(ValueError, match="mask must have shape"):
        dense_attention(q, k, v, projection, mask=np.ones((6, 5), bool))
    with pytest.raises(ValueError, match="value must have the S of key"):
        dense_attention(q, k, v[:, :4], projection)
    for message, mask in (
        ("mask must have 1 or H = 4 on axis 1, got 3", np.ones((1, 3, 6, 5), bool)),
        ("mask must have 1 or B = 2 on axis 0, got 3", np.ones((3, 1, 6, 5), bool)),
        ("mask must have the L of query", np.ones((1, 1, 5, 5), bool)),
        ("mask must have the S of key", np.ones((1, 1, 6, 6), bool)),
    ):
        with pytest.raises(ValueError, match=message):
            dense_attention(q, k, v, projection, mask=mask)
    with pytest.raises(TypeError, match=r"mask must be bool.*got int64"):
        dense_attention(q, k, v, projection, mask=np.ones((1, 1, 6, 5), int))
    with pytest.raises(ValueError, match="key must have the B of query"):
        dense_attention(q, k[:1], v[:1], projection)
    pair = projection, orthogonal_projection(8, 8, seed=1)
    with pytest.raises(ValueError, match=r"projection\[1\] must have the M of projection\[0\]"):
        dense_attention(q, k, v, pair)
    with pytest.raises(ValueError, match="feature_map must be one of"):
        dense_attention(q, k, v, projection, feature_map="sigmoid")
