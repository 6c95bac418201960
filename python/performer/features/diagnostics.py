"""How well random features serve given queries and keys."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import tensorflow as tf

from performer import checks
from performer.ops.dense import dense_attention


@tf.autograph.experimental.do_not_convert
def approximation_error(query, key, projection, *, scale=None, **options) -> tf.Tensor:
    """Distance of the estimated attention weights to those of softmax, uniform weights being 1.

    |A - S| / |U - S| in the Frobenius norm over all batch rows, heads, queries and keys, for the
    weights A of linear attention, S = softmax(scale query . key) and U = 1 / keys. 0 is exact; at 1
    and above, uniform weights would do as well. Masks have no part in it. It says how far linear
    attention is from a softmax model of the same queries and keys, not how good it is: a model that
    is trained with it may do well at any value.

    Args:
        query: [B, L, H, D], floating.
        key: [B, S, G, D], same type.
        projection: As in `favor_attention`.
        scale: Factor of query . key in both; default D**-0.5 (in the estimate 1 for feature maps
            "relu" and "elu", as in `favor_attention`).
        **options: `feature_map`, `feature_bias`, `key_bias`, `key_norm` and `feature_epsilon`, as
            in `favor_attention`.

    Returns:
        float64 scalar; where softmax is uniform itself, 0 if it is met to rounding, else inf; NaN
            where an entry of query or key is NaN or infinite.

    Raises:
        ValueError, TypeError: An argument breaks its rule, as in `favor_attention`.

    Example:

    >>> import tensorflow as tf
    >>> from performer import diagnostics, orthogonal_projection
    >>> q = tf.random.stateless_normal([1, 64, 2, 16], [1, 2], stddev=0.5)
    >>> k = tf.random.stateless_normal([1, 64, 2, 16], [3, 4], stddev=0.5)
    >>> few, many = (orthogonal_projection(m, 16, seed=5) for m in (16, 1024))
    >>> bool(diagnostics.approximation_error(q, k, many) < 0.5)
    True
    >>> bool(diagnostics.approximation_error(q, k, few) > 0.5)
    True
    """
    query, key = checks.tensor("query", query), checks.tensor("key", key)
    default = max(query.shape[-1] or 1, 1) ** -0.5 if query.shape.rank else 1.0
    named = options.get("feature_map", "softmax")
    if scale is None and isinstance(named, str) and named == "softmax":
        scale = default
    _, estimate = dense_attention(query, key, key, projection, scale=scale, **options)
    estimate, q, k = (tf.cast(x, tf.float64) for x in (estimate, query, key))
    k = tf.repeat(k, q.shape[2] // k.shape[2], 2)
    scores = tf.einsum("blhd,bshd->bhls", q, k) * (default if scale is None else float(scale))
    exact = tf.nn.softmax(scores)
    uniform = 1 / tf.cast(tf.shape(exact)[-1], tf.float64)
    distance, unit = tf.norm(estimate - exact), tf.norm(uniform - exact)
    # What the weights' own rounding may make of a softmax that is uniform.
    rounding = 2 * ml_dtypes.finfo(query.dtype.as_numpy_dtype).eps * tf.norm(exact)
    if_uniform = tf.where(distance > rounding, tf.constant(np.inf, tf.float64), 0.0)
    error = tf.where(unit > 0, tf.math.divide_no_nan(distance, unit), if_uniform)
    # No comparison above holds for NaN.
    return tf.where(tf.math.is_nan(distance + unit), tf.constant(np.nan, tf.float64), error)
