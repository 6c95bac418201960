"""A few keys of each head that every query attends to exactly, beside features for the others.

Letters as in `favor_attention`; n = exact_keys.

Random features are worst for the keys that matter to many queries: their weight is large, and so is
its error. For queries that are normal with mean mu and covariance C, the expected weight of a key k
is, by the moment generating function of the normal distribution,

    E exp(scale q.k + key_bias) = exp(scale k.mu + scale^2 k'C k / 2 + key_bias),

so the n keys of the largest exponent are taken. mu and C are those of the queries of the call that
read the key/value head, all rows together.
"""

from __future__ import annotations

import tensorflow as tf

from performer.composition import logsumexp
from performer.composition.log_features import scale_for
from performer.shapes import dims


def choose(call) -> tf.Tensor:
    """int32 [B, G, n]: the keys of a prepared call with the largest expected weight.

    A choice has no gradient. Where there are fewer than n keys, all are chosen, masked ones, too.
    """
    key, bias = _keys(call)
    query = tf.stop_gradient(_queries(call, key.dtype))
    key, bias = tf.stop_gradient(key), tf.stop_gradient(bias)
    return of_largest_weight(query, key, bias, _scale(call, key.dtype), call.exact_keys)


def of_largest_weight(query, key, bias, scale, count) -> tf.Tensor:
    """int32 [B, G, n]: the keys of the largest expected weight; n = count, at most S.

    Args:
        query, key: [B, G, N, D] and [B, G, S, D].
        bias: [B, G, S].
        scale: a number.
        count: an integer.
    """
    queries = tf.cast(tf.maximum(tf.shape(query)[2], 1), key.dtype)
    mean = tf.reduce_sum(query, 2, keepdims=True) / queries
    query -= mean
    covariance = tf.matmul(query, query, transpose_a=True) / queries
    score = scale * tf.reduce_sum(key * mean, -1) + bias
    score += scale**2 / 2 * tf.reduce_sum(key * tf.matmul(key, covariance), -1)
    return tf.math.top_k(score, tf.minimum(count, tf.shape(key)[2])).indices


def attend_to(call, chosen):
    """Exact attention to the chosen keys [B, G, n]: output [B, L, H, E], log weights [B, L, H]."""
    key, bias = _keys(call)
    masked = tf.equal(bias, logsumexp.NONE)[..., None]
    value = tf.transpose(tf.cast(call.keys["value"], key.dtype), [0, 2, 1, 3])
    value = tf.where(masked, tf.zeros([], key.dtype), value)
    key, value, bias = (tf.gather(x, chosen, axis=2, batch_dims=2) for x in (key, value, bias))
    logits = tf.matmul(_queries(call, key.dtype), key, transpose_b=True) * _scale(call, key.dtype)
    nothing = tf.equal(bias, logsumexp.NONE)[:, :, None]
    zero = tf.zeros([], key.dtype)
    logits = tf.where(nothing, zero, logits + tf.where(nothing, zero, bias[:, :, None]))
    logits = tf.where(nothing, tf.constant(logsumexp.NONE, key.dtype), logits)
    weight, out = logsumexp.average(logits, value)

    batch, length, heads, _ = dims(call.queries["query"])
    groups = dims(key)[1]

    def to_heads(x):  # [B, G, L R, ...] to [B, L, H, ...]
        x = tf.reshape(x, [batch, groups, length, heads // groups, *dims(x)[3:]])
        x = tf.transpose(x, [0, 2, 1, 3, *range(4, len(x.shape))])
        return tf.reshape(x, [batch, length, heads, *dims(x)[4:]])

    return tf.cast(to_heads(out), call.queries["query"].dtype), to_heads(weight)


def without(call, chosen):
    """The call with the chosen keys masked."""
    batch, rows, groups, _ = dims(call.keys["key"])
    bias = tf.broadcast_to(call.keys["key_bias"], [batch, groups, rows])
    return call._replace(
        keys={
            **call.keys,
            "key_bias": tf.where(
                is_chosen(chosen, rows), tf.constant(logsumexp.NONE, bias.dtype), bias
            ),
        },
        exact_keys=None,
    )


def is_chosen(chosen, rows) -> tf.Tensor:
    """Bool [B, G, S] of chosen keys [B, G, n] among `rows` = S."""
    batch, groups, count = dims(chosen)
    first = tf.reshape(tf.range(batch * groups) * rows, [batch, groups, 1])
    index = tf.reshape(chosen + first, [-1, 1])
    ones = tf.ones([batch * groups * count], tf.int32)
    return tf.reshape(
        tf.scatter_nd(index, ones, [batch * groups * rows]) > 0, [batch, groups, rows]
    )


def _keys(call):
    """key [B, G, S, D], 0 where masked, and bias [B, G, S], in the type of the sums."""
    key, bias = call.keys["key"], call.keys["key_bias"]
    batch, rows, groups, _ = dims(key)
    bias = tf.broadcast_to(bias, [batch, groups, rows])
    key = tf.transpose(tf.cast(key, bias.dtype), [0, 2, 1, 3])
    masked = tf.equal(bias, logsumexp.NONE)[..., None]
    return tf.where(masked, tf.zeros([], bias.dtype), key), bias


def _queries(call, dtype):
    """query [B, G, L R, D]."""
    query = call.queries["query"]
    batch, length, heads, dim = dims(query)
    groups = dims(call.keys["key"])[2]
    query = tf.reshape(tf.cast(query, dtype), [batch, length, groups, heads // groups, dim])
    query = tf.transpose(query, [0, 2, 1, 3, 4])
    return tf.reshape(query, [batch, groups, length * (heads // groups), dim])


def _scale(call, dtype):
    return scale_for(call.attributes["scale"], "softmax", dims(call.keys["key"])[3], dtype)
