"""Linear attention in dense form: the same estimator, with every weight A[i, j] written out.

Time and memory grow with L S. Letters as in `log_features`.
"""

from __future__ import annotations

import tensorflow as tf

from performer.composition import logsumexp
from performer.composition.log_features import key_features, query_features, scale_for
from performer.shapes import dims

# Smallest sum of products that float64 still holds to full precision, as a logarithm, and how near
# to it the best key of a query may come before smaller ones beside it could be missed.
_SMALLEST = -660.0
_TOO_SMALL = -600.0


def attend(
    query,
    query_projection,
    feature_bias,
    key,
    value,
    key_projection,
    key_bias,
    *,
    mask=None,
    dropped_keys=None,
    near=None,
    query_norm=True,
    feature_map,
    scale,
    key_norm,
    feature_epsilon,
):
    """Output [B, L, H, E] and weights [B, H, L, S] of queries and keys.

    Args:
        mask: bool [1|B, 1|H, L, S], True: the query attends to the key. None: all do.
        dropped_keys: bool [B, G, S], or None. Keys that count in the weights, not in the output.
        near: bool [1|B, 1|G, 1|L, S], or None. Pairs of which the weight is exact, exp(scale
            query.key + key_bias), and with which those of all others have to be comparable: then a
            has the norm of the query (with `query_norm`) and the number of features, as in
            `windowed`.
        others: as the operators' inputs and attributes.
    """
    batch, length, heads, _ = dims(query)
    groups, keys = dims(key)[2], dims(key)[1]
    repeats = heads // groups

    # Keys that hold no numbers are taken out. They leave a NaN in the rows that see them.
    finite = [tf.reduce_all(tf.math.is_finite(x), -1) for x in (key, value)]
    numbers = tf.transpose(finite[0] & finite[1], [0, 2, 1])
    poisoned = ~numbers & (key_bias > logsumexp.NONE)
    key_bias = tf.where(numbers, key_bias, logsumexp.NONE)

    if near is not None:
        features = tf.cast(tf.shape(query_projection)[1], feature_bias.dtype)
        feature_bias = feature_bias - tf.math.log(features)
    of_map = feature_map, scale, feature_epsilon
    with_norm = near is not None and query_norm
    a = query_features(query, query_projection, feature_bias, groups, *of_map, norm=with_norm)
    b, values = key_features(
        key, value, key_projection, key_bias, feature_map, scale, key_norm, feature_epsilon
    )
    a = tf.transpose(a, [0, 1, 3, 2, 4])  # [B, G, R, L, M]
    visible = tf.ones([1, 1, 1, length, keys], tf.bool)
    if mask is not None:
        visible = _grouped(mask, groups, repeats)
    log_weights = _log_products(a, b[:, :, None], visible)
    if near is not None:
        exact = _exact_logits(query, key, key_bias, groups, scale, b.dtype)
        log_weights = tf.where(near[:, :, None], tf.cast(exact, tf.float64), log_weights)

    weights = kept = _softmax(log_weights, visible, poisoned, values.dtype)
    if dropped_keys is not None:
        visible = visible & ~dropped_keys[:, :, None, None]
        kept = _softmax(log_weights, visible, poisoned, values.dtype)
    kept = tf.reshape(kept, [batch, groups, repeats * length, keys])
    output = tf.reshape(tf.matmul(kept, values), [batch, heads, length, dims(values)[-1]])
    output = tf.transpose(output, [0, 2, 1, 3])
    weights = tf.reshape(weights, [batch, heads, length, keys])
    return tf.cast(output, query.dtype), tf.cast(weights, query.dtype)


def _exact_logits(query, key, key_bias, groups, scale, dtype):
    """scale query.key + key_bias [B, G, R, L, S]; -inf for masked keys, whatever they hold."""
    batch, length, heads, dim = dims(query)
    masked = tf.equal(key_bias, logsumexp.NONE)
    zero = tf.zeros([], dtype)
    key = tf.where(masked[..., None], zero, tf.transpose(tf.cast(key, dtype), [0, 2, 1, 3]))
    query = tf.reshape(tf.cast(query, dtype), [batch, length, groups, heads // groups, dim])
    query = tf.reshape(tf.transpose(query, [0, 2, 3, 1, 4]), [batch, groups, -1, dim])
    logits = tf.matmul(query, key, transpose_b=True) * scale_for(scale, "softmax", dim, dtype)
    logits += tf.where(masked, zero, key_bias)[:, :, None]
    logits = tf.where(masked[:, :, None], tf.constant(logsumexp.NONE, dtype), logits)
    return tf.reshape(logits, [batch, groups, heads // groups, length, dims(key)[2]])


def _softmax(log_weights, visible, poisoned, dtype):
    """Weights of the visible keys; NaN in rows that see a poisoned one, 0 in rows that see none."""
    visible = tf.broadcast_to(visible, tf.shape(log_weights))
    seen = tf.where(visible, log_weights, tf.constant(logsumexp.NONE, tf.float64))
    terms, _, total, _ = logsumexp.scaled_exp(seen, -1)
    nan = tf.reduce_any(visible & poisoned[:, :, None, None], -1, keepdims=True)
    weights = tf.where(nan, tf.constant(float("nan"), tf.float64), terms / total)
    return tf.cast(weights, dtype)


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
