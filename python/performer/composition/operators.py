"""The operators Summarize, Read and Causal as plain TensorFlow, differentiable to any order.

They are the oracle in tests, the fallback where there is no compiled library, and the second-order
gradient of the compiled operators. Arguments carry the operators' input and attribute names.
Everything is in log space and scaled per feature by the largest term. So there is no epsilon, and
masks (-inf in key_bias) leave every value and gradient finite.

Letters: B batch, H query heads, G key/value heads, R = H / G, L queries, S keys, D, E, M features,
N sequences. T is the type of query, key and value (float32, bfloat16, half, float64), U that of
projections, biases, states and of all arithmetic: float32, or float64 for float64. For bfloat16 and
half the projection is rounded once to T (straight-through gradient).

Unlike the compiled operators, these keep all features in memory, O(S M). `chunked` says how causal
attention stays causal to the bit.

Example:

>>> import tensorflow as tf
>>> from performer import composition
>>> x, w = tf.random.normal([1, 5, 2, 4]), tf.random.normal([1, 16, 4])
>>> no_bias, no_mask = tf.zeros([1, 16]), tf.zeros([1, 1, 1])
>>> state = composition.summarize(key=x, value=x, key_projection=w, key_bias=no_mask)
>>> query_side = {"query": x, "query_projection": w, "feature_bias": no_bias}
>>> composition.read(**query_side, log_mass=state[0], mean=state[1]).shape
TensorShape([1, 5, 2, 4])
"""

from __future__ import annotations

import tensorflow as tf

from performer.composition import logsumexp
from performer.composition.chunked import (
    attend_causally,
    attend_causally_in_blocks,
    attend_to_state,
    chunk_rows,
    state_of_keys,
)
from performer.composition.log_features import key_features, query_features
from performer.composition.packed_blocks import PackedBlocks, gather_or_zero, packed_blocks
from performer.shapes import dims


def _blocks_of(offsets, rows) -> tuple[PackedBlocks, tf.Tensor]:
    """The blocks of packed sequences, and the number N of these."""
    return packed_blocks(offsets, rows, chunk_rows(rows)), tf.size(offsets) - 1


def _pack_keys(key, value, key_bias, blocks):
    """key, value [1, S, G, ...] and key_bias [1, 1|G, 1|S] in blocks; -inf where no key is."""
    key_bias = tf.broadcast_to(key_bias, [1, dims(key_bias)[1], dims(key)[1]])
    key_bias = tf.transpose(blocks.pack(tf.transpose(key_bias, [0, 2, 1])), [0, 2, 1])
    is_key = (blocks.rows < tf.cast(dims(key)[1], blocks.rows.dtype))[:, None, :]
    key_bias = tf.where(is_key, key_bias, tf.constant(logsumexp.NONE, key_bias.dtype))
    return blocks.pack(key), blocks.pack(value), key_bias


def _to_heads(out, dtype):
    """[B, G, L, R, E] to [B, L, H, E] in T."""
    batch, groups, length, repeats, dim = dims(out)
    out = tf.transpose(out, [0, 2, 1, 3, 4])
    return tf.cast(tf.reshape(out, [batch, length, groups * repeats, dim]), dtype)


def _log_weight_of_heads(weight, blocks=None):
    """[B, G, L, R] to [B, L, H], or of packed blocks to [1, S, H]: -inf on rows of no sequence."""
    batch, groups, length, repeats = dims(weight)
    weight = tf.reshape(tf.transpose(weight, [0, 2, 1, 3]), [batch, length, groups * repeats])
    return weight if blocks is None else blocks.unpack(weight, logsumexp.NONE)


@tf.autograph.experimental.do_not_convert
def summarize(
    *,
    key,
    value,
    key_projection,
    key_bias,
    offsets=None,
    feature_map="softmax",
    scale=0.0,
    key_norm=True,
    feature_epsilon=1e-3,
    packed=False,
    name=None,
):
    """`Performer>Summarize`: the state of key T[B, S, G, D] and value T[B, S, G, E].

    Args:
        key_projection: U[1|G, M, D].
        key_bias: U[1|B, 1|G, 1|S], added to the key log-features; -inf masks.
        offsets: int64 [N + 1], used when `packed` (B = 1).
        feature_map, scale, key_norm, feature_epsilon, packed: attributes of the operator.

    Returns:
        log_mass U[N, G, M], mean U[N, G, M, E].
    """
    with tf.name_scope(name or "summarize"):
        if packed:
            blocks, sequences = _blocks_of(offsets, dims(key)[1])
            key, value, key_bias = _pack_keys(key, value, key_bias, blocks)
        log_mass, mean = state_of_keys(
            *key_features(
                key, value, key_projection, key_bias, feature_map, scale, key_norm, feature_epsilon
            )
        )
        if packed:
            log_mass, mean = logsumexp.merge_by(log_mass, mean, blocks.sequence, sequences)
        return log_mass, mean


@tf.autograph.experimental.do_not_convert
def read(
    *,
    query,
    query_projection,
    feature_bias,
    log_mass,
    mean,
    offsets=None,
    feature_map="softmax",
    scale=0.0,
    feature_epsilon=1e-3,
    packed=False,
    return_log_weight=False,
    name=None,
):
    """`Performer>Read`: attention of query T[B, L, H, D] to the keys of a state.

    Args:
        query_projection: U[1|G|H, M, D].
        feature_bias: U[1|G|H, M].
        log_mass, mean: U[N, G, M], U[N, G, M, E].
        offsets, and the attributes: as `summarize`.
        return_log_weight: also return the log of the sum over the features of exp(a + log_mass),
            U[B, L, H], which the operator does not; -inf where out is 0.

    Returns:
        out T[B, L, H, E]; 0 where the state is empty and on rows outside every sequence.
    """
    with tf.name_scope(name or "read"):
        dtype = query.dtype
        if packed:
            blocks, _ = _blocks_of(offsets, dims(query)[1])
            query = blocks.pack(query)
            log_mass, mean = (gather_or_zero(x, blocks.sequence) for x in (log_mass, mean))
        groups = dims(log_mass)[1]
        a = query_features(
            query, query_projection, feature_bias, groups, feature_map, scale, feature_epsilon
        )
        batch, groups, rows, repeats, features = dims(a)
        weight, out = attend_to_state(
            tf.reshape(a, [batch, groups, rows * repeats, features]), log_mass, mean
        )
        out = _to_heads(tf.reshape(out, [batch, groups, rows, repeats, dims(mean)[-1]]), dtype)
        out = blocks.unpack(out) if packed else out
        if not return_log_weight:
            return out
        weight = tf.reshape(weight, [batch, groups, rows, repeats])
        return out, _log_weight_of_heads(weight, blocks if packed else None)


@tf.autograph.experimental.do_not_convert
def causal(
    *,
    query,
    key,
    value,
    query_projection,
    key_projection,
    feature_bias,
    key_bias,
    initial_log_mass,
    initial_mean,
    offsets=None,
    feature_map="softmax",
    scale=0.0,
    key_norm=True,
    feature_epsilon=1e-3,
    packed=False,
    return_log_weight=False,
    name=None,
):
    """`Performer>Causal`: query i attends to keys 0 to i and to the keys of the initial state.

    Args:
        query, key, value: T[B, L, H, D], T[B, L, G, D], T[B, L, G, E].
        initial_log_mass, initial_mean: U[1|N, G, M], U[1|N, G, M, E]; (-inf, 0) for none.
        others: as `summarize` and `read`; with `return_log_weight` it comes after out.

    Returns:
        out T[B, L, H, E], and the state after the last row: log_mass U[N, G, M] and
        mean U[N, G, M, E].
    """
    with tf.name_scope(name or "causal"):
        dtype, initial = query.dtype, (initial_log_mass, initial_mean)
        if packed:
            blocks, sequences = _blocks_of(offsets, dims(query)[1])
            key, value, key_bias = _pack_keys(key, value, key_bias, blocks)
            query = blocks.pack(query)
        groups = dims(key)[2]
        a = query_features(
            query, query_projection, feature_bias, groups, feature_map, scale, feature_epsilon
        )
        b, v = key_features(
            key, value, key_projection, key_bias, feature_map, scale, key_norm, feature_epsilon
        )
        if not packed:
            weight, out, *after = attend_causally(a, b, v, *initial)
            weights = [_log_weight_of_heads(weight)] if return_log_weight else []
            return _to_heads(out, dtype), *weights, *after
        log_mass, mean = (tf.broadcast_to(x, [sequences, *dims(x)[1:]]) for x in initial)
        log_mass_starts, mean_starts = (
            gather_or_zero(x, blocks.sequence) for x in (log_mass, mean)
        )
        starts = log_mass_starts, mean_starts
        weight, out, *after = attend_causally_in_blocks(a, b, v, *starts, blocks.first)
        weights = [_log_weight_of_heads(weight, blocks)] if return_log_weight else []
        ends = map(blocks.of_last_block, after, (log_mass, mean))
        return blocks.unpack(_to_heads(out, dtype)), *weights, *ends
