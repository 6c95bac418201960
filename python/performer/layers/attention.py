"""Linear attention on projected inputs: axes, masks and dropped keys around the op."""

import keras
import tensorflow as tf

from performer.layers import masks
from performer.layers.axes import dimensions, fold, unfold
from performer.ops import favor_attention
from performer.state import merge, summarize


def attend(
    query,
    key,
    value,
    projection,
    visibility,
    *,
    axes,
    dropout=None,
    initial_state=None,
    return_state=False,
    **options,
):
    """FAVOR+ over `axes` of projected inputs, with masks that need no scores.

    Args:
        query: `[B, q1, ..., qn, H, D]`; `key` `[B, s1, ..., sn, G, D]` and `value`
            `[B, s1, ..., sn, G, E]` likewise; not multiplied by any scale.
        projection: float32 `[M, D]`.
        visibility: the call's `Visibility`, not general.
        axes: attention axes, as `resolve_axes` returns them.
        dropout: a pair of rate and `keras.random.SeedGenerator`; None drops nothing.
        initial_state: `AttentionState` of earlier keys, by folded batch row; or None.
        return_state: whether to return the state after all keys, too.
        **options: `draw`, `feature_map` and others of `favor_attention`.

    Returns:
        `[B, q1, ..., qn, H, E]` in the dtype of `query`; 0 where a query attends to no key. With
        `return_state` a pair of it and the `AttentionState`.
    """
    keys = key_mask(visibility, key, axes)
    folded_query, folded_key, folded_value = (fold(x, axes) for x in (query, key, value))
    causal = visibility.use_causal_mask
    if causal:
        length = dimensions(folded_query)[1]
        if keys is None and not _same_length(folded_query, folded_key):
            keys = tf.ones(dimensions(folded_key)[:2], tf.bool)
        folded_key, folded_value = (masks.resize(x, length) for x in (folded_key, folded_value))
        keys = None if keys is None else masks.resize(keys, length)
    bias = None if dropout is None else _dropped_keys(folded_key, *dropout)
    if visibility.prefix_mask is not None:
        # The prefix is the past of every row, its own rows included; causal order is for the rest.
        prefix = masks.fold_mask("prefix_mask", visibility.prefix_mask, key, axes)
        seen, later = prefix, ~prefix
        if keys is not None:
            seen, later = seen & keys, later & keys
        past = summarize(
            folded_key, folded_value, projection, key_mask=seen, key_bias=bias, **options
        )
        initial_state = past if initial_state is None else merge(initial_state, past)
        keys = later
    segments = visibility.segment_ids
    if segments is not None:
        segments = masks.fold_ids("segment_ids", segments, key, axes)
    output = favor_attention(
        folded_query,
        folded_key,
        folded_value,
        projection,
        causal=causal,
        key_mask=keys,
        key_bias=bias,
        segment_ids=segments,
        initial_state=initial_state,
        return_state=return_state,
        **options,
    )
    output, state = output if return_state else (output, None)
    if visibility.query_mask is not None:
        exists = masks.fold_mask("query_mask", visibility.query_mask, query, axes)
        output = tf.where(exists[:, :, tf.newaxis, tf.newaxis], output, tf.zeros_like(output))
    output = unfold(output, axes, like=query)
    return (output, state) if return_state else output


def key_mask(visibility, key, axes):
    """Bool `[B', S]` of what `visibility` says about whole keys, or None if it says nothing."""
    named = {"value_mask": visibility.value_mask, "key_mask": visibility.key_mask}
    if visibility.attention_mask is not None and not visibility.is_general(len(axes)):
        named["attention_mask"] = masks.keys_of_attention_mask(visibility.attention_mask, axes)
    return masks.combine(
        [masks.fold_mask(name, mask, key, axes) for name, mask in named.items() if mask is not None]
    )


def _same_length(query, key):
    return query.shape[1] is not None and query.shape[1] == key.shape[1]


def _dropped_keys(key, rate, seed_generator):
    """Bias float32 `[B', G, S]`: -inf drops a key, with probability `rate`; 0 keeps it."""
    batch, length, heads, _ = dimensions(key)
    uniform = keras.random.uniform((batch, heads, length), dtype="float32", seed=seed_generator)
    return tf.where(uniform >= rate, 0.0, -float("inf"))
