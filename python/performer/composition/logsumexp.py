"""Sums of exponentials in TensorFlow that keep -inf, with finite gradients of every order.

`tf.reduce_logsumexp` and `tf.nn.softmax` have NaN gradients on rows that are all -inf. Here the
scale of a sum is its largest term, or 0 for a sum of nothing, so that nothing is ever subtracted
from itself at infinity: exp(-inf) is 0 and so is its slope. Logarithms of nothing are selected away
twice, before and after. The scale is held constant for the gradient: no result depends on it. A NaN
is never selected away.
"""

from __future__ import annotations

import tensorflow as tf

NONE = float("-inf")


def log_or_none(x: tf.Tensor, empty: tf.Tensor) -> tf.Tensor:
    """log(x), and -inf with gradient 0 where `empty`."""
    return tf.where(
        empty, tf.constant(NONE, x.dtype), tf.math.log(tf.where(empty, tf.ones([], x.dtype), x))
    )


def scaled_exp(x: tf.Tensor, axis: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """The parts of a softmax along `axis`, which stays as size 1 in the last three.

    Returns:
        exp(x - top) (largest entry 1; 0 where x is -inf), top (0 for a sum of nothing), the sum of
        the first (1 for a sum of nothing), and whether the sum is one of nothing.
    """
    top = tf.stop_gradient(tf.reduce_max(x, axis=axis, keepdims=True))
    empty = tf.equal(top, NONE)
    top = tf.where(empty, tf.zeros([], x.dtype), top)
    terms = tf.exp(x - top)
    total = tf.reduce_sum(terms, axis=axis, keepdims=True)
    return terms, top, tf.where(empty, tf.ones([], x.dtype), total), empty


def log_sum(top: tf.Tensor, total: tf.Tensor, empty: tf.Tensor, axis: int) -> tf.Tensor:
    """logsumexp from the parts of `scaled_exp`, without `axis`; -inf for a sum of nothing."""
    return tf.squeeze(log_or_none(total, empty) + top, axis)


def logsumexp(x: tf.Tensor, axis: int) -> tf.Tensor:
    """log(sum(exp(x))) along `axis`; -inf, with gradient 0, for a sum of nothing."""
    _, top, total, empty = scaled_exp(x, axis)
    return log_sum(top, total, empty, axis)


def average(log_weights: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Softmax average: what attention, and each of its halves, is.

    Args:
        log_weights: [..., X, Y]; -inf takes no part.
        values: [..., Y, E].

    Returns:
        logsumexp of the weights [..., X], and softmax(log_weights) @ values [..., X, E] (0 for a
        sum of nothing).
    """
    terms, top, total, empty = scaled_exp(log_weights, -1)
    return log_sum(top, total, empty, -1), tf.matmul(terms, values) / total


def merge(log_mass, mean, other_log_mass, other_mean) -> tuple[tf.Tensor, tf.Tensor]:
    """Joins averages of two sets: log_mass [...], mean [..., E], broadcast. Identity: (-inf, 0)."""
    top = tf.stop_gradient(tf.maximum(log_mass, other_log_mass))
    empty = tf.equal(top, NONE)
    top = tf.where(empty, tf.zeros([], top.dtype), top)
    first, second = tf.exp(log_mass - top), tf.exp(other_log_mass - top)
    total = tf.where(empty, tf.ones([], top.dtype), first + second)
    joined = first[..., None] * mean + second[..., None] * other_mean
    return log_or_none(total, empty) + top, joined / total[..., None]


def merge_by(log_mass, mean, sequence, count) -> tuple[tf.Tensor, tf.Tensor]:
    """Joins averages that belong together.

    Args:
        log_mass, mean: [K, ...], [K, ..., E].
        sequence: [K], 0 to `count`: which one each belongs to; `count` for none.
        count: how many there are, a scalar tensor.

    Returns:
        [count, ...] and [count, ..., E]; (-inf, 0) where nothing belongs.
    """

    def total_of(x):
        return tf.math.unsorted_segment_sum(x, sequence, count + 1)

    top = tf.stop_gradient(tf.math.unsorted_segment_max(log_mass, sequence, count + 1))
    top = tf.where(top <= log_mass.dtype.min, tf.zeros([], top.dtype), top)
    empty = tf.equal(total_of(tf.cast(tf.not_equal(log_mass, NONE), tf.int32)), 0)
    terms = tf.exp(log_mass - tf.gather(top, sequence))
    total = tf.where(empty, tf.ones([], top.dtype), total_of(terms))
    joined = total_of(terms[..., None] * mean) / total[..., None]
    return (log_or_none(total, empty) + top)[:-1], joined[:-1]
