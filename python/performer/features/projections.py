"""Random projections for positive features: block-orthogonal rows with E|w|^2 = D."""

from __future__ import annotations

import math
import numbers

import tensorflow as tf

from performer import checks


def _normal(shape, seed):
    """Normal numbers, float64, of a seed [2]: the same with and without XLA, up to rounding.

    TensorFlow's own are not, nor are its uniform ones; the bits of Philox are. Box and Muller, "A
    Note on the Generation of Random Normal Deviates" (1958).
    """
    bits = tf.random.stateless_uniform([2, *shape], seed, None, None, tf.uint32, alg="philox")
    radius, angle = tf.unstack((tf.cast(bits, tf.float64) + 0.5) / 2.0**32)
    return tf.sqrt(-2 * tf.math.log(radius)) * tf.cos(2 * math.pi * angle)


@tf.autograph.experimental.do_not_convert
def orthogonal_projection(rows, dim, *, scaling=0, seed, dtype=tf.float32, heads=None) -> tf.Tensor:
    """Draws a block-orthogonal Gaussian projection.

    Rows come in blocks of `dim`; the rows of a block (the last one may be cut short) are
    orthogonal, blocks are independent, and each row by itself points in a uniformly random
    direction. Orthogonal rows lower the variance of the softmax estimate. Source: Choromanski et
    al., "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794, section 2.4.

    Args:
        rows: M, number of features, at least 1.
        dim: D, key dimension, at least 1.
        scaling: 0: squared row norms are drawn independently from chi-squared with D degrees of
            freedom, as those of a Gaussian matrix (the unbiased estimator); 1: every row has norm
            sqrt(D). E|w|^2 = D in both.
        seed: int, or integer tensor [2]; the same seed gives the same projection, in eager mode, in
            graphs and under XLA (there up to rounding).
        dtype: floating type of the result, which is drawn in float64 and rounded.
        heads: None, or the number of independent projections.

    Returns:
        [rows, dim], or [heads, rows, dim] if `heads` is given.

    Raises:
        ValueError: `rows`, `dim` or `heads` below 1, `scaling` neither 0 nor 1, `seed` of another
            shape.
        TypeError: `dtype` is not floating.

    Example:

    >>> from performer import projections
    >>> projections.orthogonal_projection(256, 64, seed=7).shape
    TensorShape([256, 64])
    """
    for name, size in (("rows", rows), ("dim", dim), ("heads", 1 if heads is None else heads)):
        checks.size(name, size)
    if not isinstance(scaling, numbers.Integral) or scaling not in (0, 1):
        raise ValueError(f"scaling must be 0 (norms drawn) or 1 (norms sqrt(dim)), got {scaling!r}")
    try:
        dtype = tf.as_dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype must be floating, got {dtype!r}") from error
    if not dtype.is_floating:
        raise TypeError(f"dtype must be floating, got {dtype.name}")
    seed = checks.tensor("seed", seed)
    if not seed.dtype.is_integer or seed.shape not in ([], [2]):
        raise ValueError(f"seed must be an integer or an integer tensor of shape [2], got {seed!r}")
    seed = tf.stack([seed, tf.zeros_like(seed)]) if seed.shape.rank == 0 else seed

    direction_seed, norm_seed = tf.unstack(tf.random.split(seed, 2, alg="philox"))
    count, blocks = heads or 1, -(-rows // dim)
    q, r = tf.linalg.qr(_normal([count, blocks, dim, dim], direction_seed))
    # Uniform (Haar): otherwise the signs of the rows are the algorithm's choice.
    q *= tf.where(tf.linalg.diag_part(r) < 0, -tf.ones([], tf.float64), 1)[..., None, :]
    direction = tf.reshape(q, [count, blocks * dim, dim])[:, :rows]
    if scaling:
        norm = tf.sqrt(tf.cast(dim, tf.float64))
    else:
        norm = tf.norm(_normal([count, rows, dim], norm_seed), axis=-1, keepdims=True)
    result = tf.cast(direction * norm, dtype)
    return result if heads is not None else result[0]
