"""Linear attention with its scores: masks that differ by query, and scores for the caller."""

import math
from typing import Any, NamedTuple

import tensorflow as tf

from performer.composition.packed_blocks import run_starts
from performer.layers._attention import dropped_keys, hide_queries, map_bias
from performer.layers._masks import combine
from performer.layers.rotary_embedding import positions_in_runs
from performer.ops.dense import dense_attention
from performer.shapes import dims


class ScoreShape(NamedTuple):
    """Shape of a call's scores `[B, <other axes>, H, <query axes>, <key axes>]`.

    Attributes:
        rows: sizes of batch and other axes, as all others integers, None or scalars.
        heads: H.
        query, key: sizes of the attention axes, in the order in which they form the sequence.
    """

    rows: list[Any]
    heads: int
    query: list[Any]
    key: list[Any]

    @classmethod
    def of(cls, query_shape, key_shape, axes, heads):
        """The shape for inputs of these shapes (channels included), and `resolve_axes`'s axes."""
        others = [size for axis, size in enumerate(query_shape[1:-1], 1) if axis not in axes]
        lengths = ([shape[axis] for axis in axes] for shape in (query_shape, key_shape))
        return cls([query_shape[0], *others], heads, *lengths)

    def sizes(self):
        """All of them in one list."""
        return [*self.rows, self.heads, *self.query, *self.key]

    def check(self, limit):
        """Raises ValueError if more than `limit` scores are known for a head and batch row."""
        length, keys = (
            None if None in sizes else math.prod(sizes) for sizes in (self.query, self.key)
        )
        check_size(length, keys, limit)


def attend_densely(
    query, key, value, features, masks, *, score_shape, limit, attention_mask=None, dropout=None
):
    """FAVOR+ in dense form.

    Args:
        query, key, value, features, masks, dropout: as `attend`.
        score_shape: the call's `ScoreShape`, without None.
        limit: largest number of scores for one head and batch row.
        attention_mask: the call's if it is general, else None: of the shape of the scores. Of the
            axes before those of query and key, the last ones may be missing, and all may be 1.

    Returns:
        `[B', T, H, E]`, and the scores of `score_shape`, before dropout; both in the dtype of
        `query`.

    Raises:
        ValueError: more scores than `limit`; a mask that does not fit.
        tf.errors.InvalidArgumentError: the first, where it is known only when the graph runs.
    """
    length, keys, segments = dims(query)[1], dims(key)[1], masks.segment_ids
    with tf.control_dependencies(check_size(length, keys, limit)):
        query = tf.identity(query)
    output, scores = dense_attention(
        query,
        key,
        value,
        mask=_pairs(masks, attention_mask, length, keys, score_shape),
        key_mask=masks.keys,
        key_bias=map_bias(key, features),
        dropped_keys=None if dropout is None else dropped_keys(key, *dropout),
        positions=None if segments is None else positions_in_runs(segments),
        **features.for_attention(),
        **features.for_window(),
    )
    if masks.queries is not None:
        exists = masks.queries[:, tf.newaxis, :, tf.newaxis]
        scores = tf.where(exists, scores, tf.zeros_like(scores))
    return hide_queries(output, masks.queries), tf.reshape(scores, score_shape.sizes())


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


def _pairs(masks, attention_mask, length, keys, score_shape):
    """Bool `[1|B', 1|H, T, S]`, which pairs of query and key are allowed; None for all."""
    pairs = []
    if masks.causal:
        allowed = tf.range(keys) <= tf.range(length)[:, tf.newaxis]
        if masks.prefix is not None:
            allowed |= masks.prefix[:, tf.newaxis, tf.newaxis]
        pairs.append(allowed)
    if masks.segment_ids is not None:
        run = tf.cumsum(tf.cast(run_starts(masks.segment_ids), tf.int32), 1)
        pairs.append(tf.equal(run[:, tf.newaxis, :, tf.newaxis], run[:, tf.newaxis, tf.newaxis]))
    if attention_mask is not None:
        pairs.append(_fold_attention_mask(attention_mask, score_shape))
    return combine([x[(tf.newaxis,) * (4 - len(x.shape))] for x in pairs])


def _fold_attention_mask(mask, score_shape):
    """A general `attention_mask`, see `attend_densely`, as bool `[B', 1|H, T, S]`."""
    mask = tf.cast(tf.convert_to_tensor(mask), tf.bool)
    full, given = score_shape.sizes(), dims(mask)
    pair_sizes = [*score_shape.query, *score_shape.key]
    missing = len(full) - len(given)
    expanded = given[: len(given) - len(pair_sizes)] + [1] * missing + given[-len(pair_sizes) :]
    for size, expected in zip(expanded, full, strict=False):
        known = isinstance(size, int) and isinstance(expected, int)
        if missing < 0 or (known and size not in (1, expected)):
            raise ValueError(
                "`attention_mask` must have shape (batch, <other axes>, heads, <query axes>, "
                f"<key axes>) = {tuple(x if isinstance(x, int) else None for x in full)}, other "
                "axes and heads optional, or 1 in any axis. "
                f"Received: attention_mask.shape={tuple(mask.shape)}"
            )
    heads = expanded[len(score_shape.rows)]
    mask = tf.broadcast_to(tf.reshape(mask, expanded), [*score_shape.rows, heads, *pair_sizes])
    length, keys = math.prod(score_shape.query), math.prod(score_shape.key)
    return tf.reshape(mask, [math.prod(score_shape.rows), heads, length, keys])
