"""Log-features of queries and keys in plain TensorFlow, as the operators form them.

Letters: B batch, H query heads, G key/value heads, R = H / G, L queries, S keys, D, E, M features.
T is the type of query, key and value, U that of projections, biases and all arithmetic: float32, or
float64 for float64. For bfloat16 and half the projection is rounded once to T (straight-through
gradient).
"""

from __future__ import annotations

import tensorflow as tf

from performer.composition import logsumexp
from performer.shapes import dims


def _rounded(projection: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The projection rounded to T, still in U; its gradient passes straight through."""
    if dtype.size >= 4:
        return projection
    return projection + tf.stop_gradient(
        tf.cast(tf.cast(projection, dtype), projection.dtype) - projection
    )


def _products(x, projection):
    """x [..., rows, D] and projection [..., M, D], of as many or fewer axes, to x w [..., rows, M].

    Never by a product of matrices that broadcasts: that of float32 [B, 1, rows, D] by [1, 1, D, M]
    writes outside its result in TensorFlow 2.21 with oneDNN.
    """
    *outer, rows, dim = dims(x)
    *heads, features, _ = dims(projection)
    if all(isinstance(size, int) and size == 1 for size in heads):
        flat = tf.matmul(
            tf.reshape(x, [-1, dim]), tf.reshape(projection, [features, dim]), transpose_b=True
        )
        return tf.reshape(flat, [*outer, rows, features])
    projection = tf.broadcast_to(projection, [*outer, features, dim])
    return tf.matmul(x, projection, transpose_b=True)


def _attribute(value, dtype):
    """A number of the precision of an operator's attribute, which is float32."""
    return value if tf.is_tensor(value) else tf.cast(tf.constant(value, tf.float32), dtype)


def scale_for(scale, feature_map, dim, dtype):
    """The factor of query.key that the attribute `scale` means, for key dimension `dim`."""
    if not scale:
        scale = tf.cast(dim, dtype) ** -0.5 if feature_map == "softmax" else 1.0
    return _attribute(scale, dtype)


def _log_features(x, projection, feature_map, scale, feature_epsilon, norm):
    """x [..., rows, D] and projection [..., M, D] to log-features without bias [..., rows, M].

    feature_map is a name, or a function from sqrt(scale) w.x to its log-feature. `norm` subtracts
    scale |x|^2 / 2 (softmax only).
    """
    scale = scale_for(scale, feature_map, dims(x)[-1], x.dtype)
    feature_epsilon = _attribute(feature_epsilon, x.dtype)
    u = _products(x, projection) * tf.sqrt(scale)
    if feature_map == "softmax":
        return u - scale / 2 * tf.reduce_sum(x * x, -1, keepdims=True) if norm else u
    if feature_map == "relu":
        phi = tf.nn.relu(u) + feature_epsilon
        return logsumexp.log_or_none(phi, tf.equal(phi, 0))
    if feature_map == "elu":
        return tf.where(u > 0, tf.math.log1p(tf.nn.relu(u)), u)
    return feature_map(u)


def query_features(
    query, projection, feature_bias, groups, feature_map, scale, feature_epsilon, norm=False
):
    """Log-features of the queries.

    Args:
        query: T[B, L, H, D].
        projection: U[1|G|H, M, D].
        feature_bias: U[1|G|H, M].
        groups: G.
        feature_map, scale, feature_epsilon: as the operators, or a function as feature_map.
        norm: subtract scale |query|^2 / 2 (softmax only), which cancels in a softmax over features.

    Returns:
        a U[B, G, L, R, M].
    """
    batch, length, heads, dim = dims(query)
    query_dtype, query = query.dtype, tf.cast(query, projection.dtype)
    query = tf.reshape(query, [batch, length, groups, heads // groups, dim])
    query = tf.transpose(query, [0, 2, 3, 1, 4])

    def per_head(x):  # [1|G|H, ...] to [1|G, 1|R, ...]
        first, *rest = dims(x)
        outer = tf.minimum(first, groups)
        return tf.reshape(x, [outer, first // outer, *rest])

    projection = per_head(_rounded(projection, query_dtype))
    features = _log_features(query, projection, feature_map, scale, feature_epsilon, norm)
    return tf.transpose(features + per_head(feature_bias)[..., None, :], [0, 1, 3, 2, 4])


def key_features(key, value, projection, key_bias, feature_map, scale, key_norm, feature_epsilon):
    """Log-features of the keys.

    Args:
        key, value: T[B, S, G, D], T[B, S, G, E].
        projection: U[1|G, M, D].
        key_bias: U[1|B, 1|G, 1|S]; -inf masks.
        feature_map, scale, key_norm, feature_epsilon: as the operators, or a function as
            feature_map.

    Returns:
        b U[B, G, S, M], -inf where masked, and the values U[B, G, S, E], 0 where masked.
    """
    masked = tf.equal(key_bias, logsumexp.NONE)[..., None]
    zero = tf.zeros([], projection.dtype)
    projection = _rounded(projection, key.dtype)
    key, value = (tf.transpose(tf.cast(x, projection.dtype), [0, 2, 1, 3]) for x in (key, value))
    key, value = tf.where(masked, zero, key), tf.where(masked, zero, value)
    features = _log_features(key, projection, feature_map, scale, feature_epsilon, norm=key_norm)
    features += tf.where(masked, zero, key_bias[..., None])
    return tf.where(masked, tf.constant(logsumexp.NONE, features.dtype), features), value
