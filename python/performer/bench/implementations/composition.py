"""FAVOR+ as plain TensorFlow, in two forms: what one would write without kernels.

Both take query, key, value [B, L, H, D] and projection [M, D], compute in float32, and return
[B, L, H, D]. The causal forms join chunks of 64 rows by a cumulative sum of the chunks' states.
"""

from __future__ import annotations

import math

import tensorflow as tf

from performer.bench.cases import CHUNK

EPSILON = 1e-4


def stabilised(query, key, value, projection, causal):
    """The stabilised form: one maximum for each feature, no epsilon, no masks.

    The compiled operators compute the same estimator. `performer.composition` computes it too, with
    grouped heads and states, and with a causal form that no spread of keys can overflow. Here
    nothing is done that the inputs of the benchmark do not need.
    """
    dtype, root = query.dtype, query.shape[-1] ** -0.25
    query, key, value = _by_head(query, key, value)
    projection = tf.cast(tf.cast(projection, dtype), tf.float32)
    query, key = root * query, root * key
    a = tf.matmul(query, projection, transpose_b=True)
    # [B, H, M, L]: maxima and sums along contiguous memory.
    b = tf.matmul(projection, key, transpose_b=True)
    b -= tf.reduce_sum(key * key, -1)[..., None, :] / 2
    top = tf.stop_gradient(tf.reduce_max(b, -1, keepdims=True))
    b, a = tf.exp(b - top), a + tf.linalg.matrix_transpose(top)
    a = tf.exp(a - tf.stop_gradient(tf.reduce_max(a, -1, keepdims=True)))
    if causal:
        out = _causal(a, tf.linalg.matrix_transpose(b), value)
    else:
        mass = tf.reduce_sum(b, -1, keepdims=True)
        out = tf.matmul(a, tf.matmul(b, value)) / tf.matmul(a, mass)
    return _by_row(out, dtype)


def textbook(query, key, value, projection, causal):
    """The textbook form: one maximum for all keys, epsilon in both maps.

    This is the form of most published implementations.

    The epsilon makes it another estimator. Source: Choromanski et al., "Rethinking Attention with
    Performers", https://arxiv.org/abs/2009.14794, with the stabilisers of its published code.
    """
    dtype = query.dtype
    query, key, value = _by_head(query, key, value)
    a, b = _epsilon_features(query, projection, (-1,)), _epsilon_features(key, projection, (-2, -1))
    if causal:
        return _by_row(_causal(a, b, value), dtype)
    mass = tf.reduce_sum(b, -2, keepdims=True)
    out = tf.matmul(a, tf.matmul(b, value, transpose_a=True))
    return _by_row(out / tf.matmul(a, mass, transpose_b=True), dtype)


def _epsilon_features(x, projection, axes):
    x *= x.shape[-1] ** -0.25
    u = tf.matmul(x, projection, transpose_b=True)
    top = tf.stop_gradient(tf.reduce_max(u, axes, keepdims=True))
    half_norm = tf.reduce_sum(x * x, -1, keepdims=True) / 2
    return projection.shape[0] ** -0.5 * (tf.exp(u - half_norm - top) + EPSILON)


def _causal(a, b, value):
    """Features a, b [B, H, L, M] and values [B, H, L, E] to [B, H, L, E]."""
    chunk = math.gcd(a.shape[2], CHUNK)

    def chunks(x):
        return tf.reshape(x, [*x.shape[:2], -1, chunk, x.shape[-1]])

    # A column of ones sums the weights beside the weighted values.
    values = chunks(tf.concat([value, tf.ones_like(value[..., :1])], -1))
    a, b = chunks(a), chunks(b)
    past = tf.cumsum(tf.matmul(b, values, transpose_a=True), axis=2, exclusive=True)
    near = tf.linalg.band_part(tf.matmul(a, b, transpose_b=True), -1, 0)
    both = tf.matmul(a, past) + tf.matmul(near, values)
    return tf.reshape(both[..., :-1] / both[..., -1:], value.shape)


def _by_head(*tensors):
    """[B, L, H, D] to float32 [B, H, L, D]."""
    return [tf.transpose(tf.cast(x, tf.float32), [0, 2, 1, 3]) for x in tensors]


def _by_row(out, dtype):
    """And back."""
    return tf.cast(tf.transpose(out, [0, 2, 1, 3]), dtype)
