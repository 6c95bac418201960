"""Linear attention by its weights, for what only weights can do.

That is masks which differ from query to query, and the weights themselves. Time and memory grow
with L S.
"""

from __future__ import annotations

import tensorflow as tf

from performer import checks
from performer.composition import dense
from performer.ops.arguments import pair_mask, prepare
from performer.ops.chosen_keys import choose, is_chosen
from performer.ops.sizes import wait_for_sizes
from performer.shapes import dims


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
    exact_window=None,
    far_bias=None,
    exact_keys=None,
    query_norm=True,
    positions=None,
    name=None,
):
    """`favor_attention` by its weights, and the weights.

    With the log-features a, b of `favor_attention`: A[i, j] = sum_m exp(a[i, m] + b[j, m]), 0 where
    masked; weights = A / sum_j A; output = weights @ value.

    Args:
        query, key, value, projection, key_mask, key_bias, feature_bias, feature_map, scale,
            key_norm, feature_epsilon, exact_window, far_bias, exact_keys, query_norm,
            name: as `favor_attention`.
        mask: bool [1|B, 1|H, L, S], True: query i attends to key j.
        dropped_keys: bool [B, G, S], True: the key counts in the weights that are returned, but
            not in the output, for which the others are normalised again.
        positions: integers [1|B, S], with `exact_window`: the place of each row in its sequence,
            from which blocks are counted. Defaults to the row.

    Returns:
        Output [B, L, H, E] and weights [B, H, L, S], of the type of query. Both 0 on rows that see
        no key.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it.

    Numerics: sums in float64, exact to rounding for any spread of the log-features. A NaN or
        infinity in a key or value makes NaN of the rows that see it, and of no other.

    Example:

    >>> import tensorflow as tf
    >>> from performer import projections
    >>> from performer.ops.dense import dense_attention
    >>> x, w = tf.random.normal([1, 5, 2, 4]), projections.orthogonal_projection(8, 4, seed=1)
    >>> mask = tf.random.uniform([1, 1, 5, 5]) < 0.5
    >>> output, weights = dense_attention(x, x, x, w, mask=mask)
    >>> weights.shape
    TensorShape([1, 2, 5, 5])
    """
    with tf.name_scope(name or "dense_attention"):
        call = prepare(
            projection,
            query=checks.tensor("query", query),
            key=checks.tensor("key", key),
            value=value,
            feature_bias=feature_bias,
            key_mask=key_mask,
            key_bias=key_bias,
            feature_map=feature_map,
            scale=scale,
            key_norm=key_norm,
            feature_epsilon=feature_epsilon,
            exact_window=exact_window,
            far_bias=far_bias,
            exact_keys=exact_keys,
            query_norm=query_norm,
        )
        near = None
        if call.exact_window is not None:
            near = _near(positions, call.keys["key"], call.exact_window)
        if call.exact_keys is not None:
            chosen = is_chosen(choose(call), dims(call.keys["key"])[1])[:, :, None]
            near = chosen if near is None else near | chosen
        if mask is not None:
            mask = pair_mask("mask", mask, call.queries["query"], call.keys["key"])
        if dropped_keys is not None:
            dropped_keys = checks.tensor("dropped_keys", dropped_keys, ("BGS",))
            if dropped_keys.dtype != tf.bool:
                raise TypeError(f"dropped_keys must be bool, got {dropped_keys.dtype.name}")
            for axis, key_axis, letter in ((0, 0, "B"), (1, 2, "G"), (2, 1, "S")):
                checks.same(
                    "dropped_keys", axis, dropped_keys, "key", key_axis, call.keys["key"], letter
                )
        return dense.attend(
            **wait_for_sizes("dense", {**call.queries, **call.keys}),
            **call.attributes,
            mask=mask,
            dropped_keys=dropped_keys,
            near=near,
            query_norm=call.query_norm,
        )


def _near(positions, key, window):
    """Bool [1|B, 1, L, S], L = S: whether two rows are in the same block or in adjacent ones."""
    if positions is None:
        positions = tf.range(dims(key)[1])[None]
    blocks = tf.cast(positions, tf.int64) // window
    return tf.abs(blocks[:, None, :, None] - blocks[:, None, None, :]) <= 1
