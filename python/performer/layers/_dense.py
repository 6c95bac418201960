"""Linear attention with its scores: masks of pairs, and scores for the caller."""

import math

import tensorflow as tf

from performer.composition.dense import dense_attention
from performer.composition.packed_blocks import run_starts
from performer.layers import _masks
from performer.layers._attention import dropped_keys, hide_masked_queries, key_mask
from performer.layers._axes import fold, unfold
from performer.shapes import dims


def attend_densely(query, key, value, features, visibility, *, axes, limit, dropout=None):
    """FAVOR+ over `axes` of projected inputs, in dense form.

    Args:
        query, key, value, features, axes, dropout: as `attention.attend`.
        visibility: the call's `Visibility`; any.
        limit: largest number of scores for one head and batch row.

    Returns:
        `[B, q1, ..., qn, H, E]`, and the scores `[B, <other axes>, H, <query axes>, <key axes>]`,
        axes in the order of `axes`, before dropout; both in the dtype of `query`.

    Raises:
        ValueError: more scores than `limit`; a mask that does not fit.
        tf.errors.InvalidArgumentError: the first, where it is known only when the graph runs.
    """
    folded_query, folded_key, folded_value = (fold(x, axes) for x in (query, key, value))
    length, keys = dims(folded_query)[1], dims(folded_key)[1]
    with tf.control_dependencies(check_size(length, keys, limit)):
        folded_query = tf.identity(folded_query)
    bias = features.feature_map.key_bias(folded_key)
    output, scores = dense_attention(
        folded_query,
        folded_key,
        folded_value,
        mask=_pairs(visibility, query, key, length, keys, axes),
        key_mask=key_mask(visibility, key, axes),
        key_bias=bias,
        dropped_keys=None if dropout is None else dropped_keys(folded_key, *dropout),
        **features.of_both(),
    )
    output = hide_masked_queries(output, visibility, query, axes)
    if visibility.query_mask is not None:
        exists = _masks.fold_mask("query_mask", visibility.query_mask, query, axes)
        scores = tf.where(exists[:, tf.newaxis, :, tf.newaxis], scores, tf.zeros_like(scores))
    sizes, key_sizes = dims(query), dims(key)
    others = [size for axis, size in enumerate(sizes[1:-2], 1) if axis not in axes]
    shape = [sizes[0], *others, sizes[-2]]
    shape += [sizes[axis] for axis in axes] + [key_sizes[axis] for axis in axes]
    return unfold(output, axes, like=query), tf.reshape(scores, shape)


def score_shape(query_shape, value_shape, axes, heads, limit):
    """Static shape of the scores of a layer's call, from the shapes of its inputs.

    Raises:
        ValueError: they are more than `limit` for a head and batch row.
    """
    lengths = [[shape[axis] for axis in axes] for shape in (query_shape, value_shape)]
    length, keys = (None if None in sizes else math.prod(sizes) for sizes in lengths)
    check_size(length, keys, limit)
    others = [size for axis, size in enumerate(query_shape[1:-1], 1) if axis not in axes]
    return (query_shape[0], *others, heads, *lengths[0], *lengths[1])


def check_size(length, keys, limit):
    """Refuses more than `limit` scores.

    Args:
        length, keys: T and S, as integers, None or tensors.
        limit: largest product of both.

    Returns:
        The checks that are left for the graph: none, unless one of them is a tensor.

    Raises:
        ValueError: both are known, and too large.
    """
    message = (
        "attention scores, and an `attention_mask` that differs from query to query, take the "
        "dense form of linear attention, whose time and memory grow with T * S, up to "
        f"T * S = dense_limit = {limit}. Use masks that factor (`use_causal_mask`, `segment_ids`, "
        "`prefix_mask`, masks of keys), or raise `dense_limit`."
    )
    sizes = (length, keys)
    if all(isinstance(size, int) for size in sizes):
        if length * keys > limit:
            raise ValueError(f"{message} Received: T = {length}, S = {keys}")
        return []
    if None in sizes:
        return []
    size = tf.cast(length, tf.int64) * tf.cast(keys, tf.int64)
    check = tf.debugging.assert_less_equal(size, tf.cast(limit, tf.int64), message=message)
    return [] if check is None else [check]


def _pairs(visibility, query, key, length, keys, axes):
    """Bool `[1|B', 1|H, L, S]` of what `visibility` says about pairs; None for nothing."""
    pairs = []
    if visibility.use_causal_mask:
        seen = tf.range(keys) <= tf.range(length)[:, tf.newaxis]
        if visibility.prefix_mask is not None:
            prefix = _masks.fold_mask("prefix_mask", visibility.prefix_mask, key, axes)
            seen |= prefix[:, tf.newaxis, tf.newaxis]
        pairs.append(seen)
    if visibility.segment_ids is not None:
        ids = _masks.fold_ids("segment_ids", visibility.segment_ids, key, axes)
        run = tf.cumsum(tf.cast(run_starts(ids), tf.int32), 1)
        pairs.append(tf.equal(run[:, tf.newaxis, :, tf.newaxis], run[:, tf.newaxis, tf.newaxis]))
    if visibility.is_general(len(axes)):
        pairs.append(_fold_pairs(visibility.attention_mask, query, key, axes))
    if not pairs:
        return None
    pairs = [x[(tf.newaxis,) * (4 - len(x.shape))] for x in pairs]
    return _masks.combine(pairs)


def _fold_pairs(mask, query, key, axes):
    """`attention_mask` `[B, <other axes>, H, <query axes>, <key axes>]` to `[B', 1|H, L, S]`.

    Of the axes before those of query and key, the last ones may be missing, and all may be 1.
    """
    mask = tf.cast(tf.convert_to_tensor(mask), tf.bool)
    sizes, key_sizes = dims(query), dims(key)
    others = [size for axis, size in enumerate(sizes[1:-2], 1) if axis not in axes]
    pair_sizes = [sizes[axis] for axis in axes] + [key_sizes[axis] for axis in axes]
    rows = [sizes[0], *others]
    full = [*rows, sizes[-2], *pair_sizes]
    given = dims(mask)
    missing = len(full) - len(given)
    head = given[: len(given) - len(pair_sizes)] + [1] * missing + given[-len(pair_sizes) :]
    for size, expected in zip(head, full, strict=False):
        known = isinstance(size, int) and isinstance(expected, int)
        if missing < 0 or (known and size not in (1, expected)):
            raise ValueError(
                "`attention_mask` must have shape (batch, <other axes>, heads, <query axes>, "
                f"<key axes>) = {tuple(x if isinstance(x, int) else None for x in full)}, other "
                "axes and heads optional, or 1 in any axis. "
                f"Received: attention_mask.shape={tuple(mask.shape)}"
            )
    mask = tf.reshape(mask, head)
    heads = head[len(rows)]
    mask = tf.broadcast_to(mask, [*rows, heads, *pair_sizes])
    return tf.reshape(
        mask,
        [
            math.prod(rows),
            heads,
            math.prod(pair_sizes[: len(axes)]),
            math.prod(pair_sizes[len(axes) :]),
        ],
    )
