"""Linear attention in dense form: the same estimator, with every weight A[i, j] written out.

For what only weights can do: masks that differ from query to query, and the weights themselves.
Time and memory grow with L S. Letters as in `log_features`.
"""

from __future__ import annotations

import tensorflow as tf

from performer import checks
from performer.composition import logsumexp
from performer.composition.log_features import key_features, query_features
from performer.shapes import dims

# Smallest sum of products that float64 still holds to full precision, as a logarithm, and how near
# to it the best key of a query may come before smaller ones beside it could be missed.
_SMALLEST = -660.0
_TOO_SMALL = -600.0


@tf.autograph.experimental.do_not_convert
def dense_attention(
    query,
    key,
    value,
    projection,
    *,
    mask=None,
    key_mask=None,
    key_bias=None,
    dropped_keys=None,
    feature_bias=None,
    feature_map="softmax",
    scale=None,
    key_norm=True,
    feature_epsilon=1e-3,
    name=None,
):
    """`favor_attention` by its weights, and the weights.

    With the log-features a, b of `favor_attention`: A[i, j] = sum_m exp(a[i, m] + b[j, m]), 0 where
    masked; weights = A / sum_j A; output = weights @ value.

    Args:
        query, key, value, projection, key_mask, key_bias, feature_bias, feature_map, scale,
            key_norm, feature_epsilon, name: as `favor_attention`.
        mask: bool [1|B, 1|H, L, S], True: query i attends to key j.
        dropped_keys: bool [B, G, S], True: the key counts in the weights that are returned, but
            not in the output, for which the others are normalised again.

    Returns:
        Output [B, L, H, E] and weights [B, H, L, S], of the type of query. Both 0 on rows that see
        no key.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it.

    Numerics: sums in float64, exact to rounding for any spread of the log-features. A NaN or
        infinity in a key or value makes NaN of the rows that see it, and of no other.

    Example:

    >>> import tensorflow as tf
    >>> from performer.composition import dense
    >>> from performer.features import projections
    >>> x, w = tf.random.normal([1, 5, 2, 4]), projections.orthogonal_projection(8, 4, seed=1)
    >>> mask = tf.random.uniform([1, 1, 5, 5]) < 0.5
    >>> output, weights = dense.dense_attention(x, x, x, w, mask=mask)
    >>> weights.shape
    TensorShape([1, 2, 5, 5])
    """
    with tf.name_scope(name or "dense_attention"):
        attributes = checks.attributes(feature_map, scale, feature_epsilon)
        query = checks.tensor("query", query, ("BLHD",))
        key, value = checks.tensor("key", key, ("BSGD",)), checks.tensor("value", value, ("BSGE",))
        dtype = checks.accumulator(query.dtype)
        query_side, key_side = (checks.projection_side(projection, i, dtype) for i in (0, 1))
        feature_bias = checks.feature_bias(feature_bias, query_side[1], dtype)
        checks.queries_and_keys(query, key, value, query_side, key_side, feature_bias)
        bias = checks.key_bias(key, dtype, key_mask, key_bias)
        batch, length, heads, _ = dims(query)
        groups, keys = dims(key)[2], dims(key)[1]

        # Keys that hold no numbers are taken out, and leave a NaN with those who see them.
        numbers = tf.reduce_all(tf.math.is_finite(key), -1) & tf.reduce_all(
            tf.math.is_finite(value), -1
        )
        numbers = tf.transpose(numbers, [0, 2, 1])
        poisoned = ~numbers & (bias > logsumexp.NONE)
        bias = tf.where(numbers, bias, logsumexp.NONE)

        shared = (attributes["feature_map"], attributes["scale"])
        epsilon = attributes["feature_epsilon"]
        a = query_features(query, query_side[1], feature_bias, groups, *shared, epsilon)
        b, values = key_features(key, value, key_side[1], bias, *shared, bool(key_norm), epsilon)
        a = tf.transpose(a, [0, 1, 3, 2, 4])  # [B, G, R, L, M]
        repeats = heads // groups
        visible = tf.ones([1, 1, 1, length, keys], tf.bool)
        if mask is not None:
            visible = _grouped(checks.pair_mask("mask", mask, query, key), groups, repeats)
        log_weights = _log_products(a, b[:, :, None], visible)

        def softmax(log_weights, visible):
            visible = tf.broadcast_to(visible, tf.shape(log_weights))
            seen = tf.where(visible, log_weights, tf.constant(logsumexp.NONE, tf.float64))
            terms, _, total, _ = logsumexp.scaled_exp(seen, -1)
            nan = tf.reduce_any(visible & poisoned[:, :, None, None], -1, keepdims=True)
            weights = tf.where(nan, tf.constant(float("nan"), tf.float64), terms / total)
            return tf.cast(weights, values.dtype)

        weights = softmax(log_weights, visible)
        kept = weights
        if dropped_keys is not None:
            kept = softmax(log_weights, visible & ~dropped_keys[:, :, None, None])
        kept = tf.reshape(kept, [batch, groups, repeats * length, keys])
        output = tf.reshape(tf.matmul(kept, values), [batch, heads, length, dims(values)[-1]])
        output = tf.transpose(output, [0, 2, 1, 3])
        weights = tf.reshape(weights, [batch, heads, length, keys])
        return tf.cast(output, query.dtype), tf.cast(weights, query.dtype)


def _grouped(mask, groups, repeats):
    """Mask [1|B, 1|H, L, S] to [1|B, 1|G, 1|R, L, S]."""
    batch, heads, length, keys = dims(mask)
    if isinstance(heads, int) and heads == 1:
        return mask[:, :, None]
    return tf.reshape(mask, [batch, groups, repeats, length, keys])


def _log_products(a, b, visible):
    """log(sum_m exp(a[..., i, m] + b[..., j, m])), float64, for a [X, L, M] and b [X, S, M].

    One product of matrices scaled by the largest term of each feature is right unless all keys that
    a query sees (`visible` [X, L, S]) are hundreds of nats below others that it does not. Then the
    sums are taken again, feature by feature.
    """
    a, b = tf.cast(a, tf.float64), tf.cast(b, tf.float64)
    shift = _largest(b, -2)
    raised = a + shift
    top = _largest(raised, -1)
    product = tf.matmul(tf.exp(raised - top), tf.exp(b - shift), transpose_b=True)
    inside = tf.math.log(tf.maximum(product, tf.exp(tf.constant(_SMALLEST, tf.float64))))
    small = product < tf.exp(tf.constant(_SMALLEST, tf.float64))
    inside = tf.where(small, tf.constant(logsumexp.NONE, tf.float64), inside)
    some = tf.reduce_any(visible & tf.reduce_any(b > logsumexp.NONE, -1)[..., None, :], -1)
    best = tf.reduce_max(tf.where(visible, inside, logsumexp.NONE), -1)
    lost = tf.reduce_any(some & (best < _TOO_SMALL))
    return tf.cond(lost, lambda: _exact_log_products(a, b), lambda: inside + top)


def _largest(x, axis):
    """Largest entry along `axis`, which stays; 0 where that is -inf. Constant for the gradient."""
    top = tf.stop_gradient(tf.reduce_max(x, axis, keepdims=True))
    return tf.where(tf.equal(top, logsumexp.NONE), tf.zeros([], x.dtype), top)


@tf.custom_gradient
def _exact_log_products(a, b):
    """`_log_products` for any spread, one feature after the other: no [L, S, M] in memory."""

    def by_feature(x):  # [..., M] to [M, ...]
        return tf.transpose(x, [len(x.shape) - 1, *range(len(x.shape) - 1)])

    def log_terms(features):
        return features[0][..., :, None] + features[1][..., None, :]

    def add(total, features):
        return logsumexp.logsumexp(tf.stack([total, log_terms(features)]), 0)

    features = (by_feature(a), by_feature(b))
    nothing = log_terms((features[0][0], features[1][0]))
    total = tf.foldl(add, features, tf.fill(tf.shape(nothing), tf.cast(logsumexp.NONE, a.dtype)))

    def gradient(incoming):
        empty = tf.equal(total, logsumexp.NONE)

        def of_feature(features):
            share = tf.exp(log_terms(features) - tf.where(empty, tf.zeros([], a.dtype), total))
            share = tf.where(empty, tf.zeros([], a.dtype), incoming * share)
            return tf.reduce_sum(share, -1), tf.reduce_sum(share, -2)

        parts = tf.map_fn(of_feature, features, fn_output_signature=(a.dtype, a.dtype))
        order = [*range(1, len(a.shape)), 0]
        return tuple(
            _reduced_to(tf.transpose(part, order), x) for part, x in zip(parts, (a, b), strict=True)
        )

    return total, gradient


def _reduced_to(gradient, x):
    """Sums `gradient` over the axes along which `x` was broadcast."""
    axes = [i for i, size in enumerate(x.shape) if size == 1 and gradient.shape[i] != 1]
    return tf.reduce_sum(gradient, axes, keepdims=True) if axes else gradient
