"""Linear attention on projected inputs: axes, masks and dropped keys around the op."""

import keras
import tensorflow as tf

from performer.checks import accumulator
from performer.layers import _masks
from performer.layers._axes import fold, unfold
from performer.ops import favor_attention
from performer.ops.state import merge, read, summarize
from performer.shapes import dims


def attend(
    query,
    key,
    value,
    features,
    visibility,
    *,
    axes,
    dropout=None,
    initial_state=None,
    return_state=False,
    max_segments=None,
):
    """FAVOR+ over `axes` of projected inputs, with masks that need no scores.

    Args:
        query: `[B, q1, ..., qn, H, D]`; `key` `[B, s1, ..., sn, G, D]` and `value`
            `[B, s1, ..., sn, G, E]` likewise; not multiplied by any scale.
        features: the call's `Features`.
        visibility: the call's `Visibility`, not general.
        axes: attention axes, as `resolve_axes` returns them.
        dropout: a pair of rate and `keras.random.SeedGenerator`; None drops nothing.
        initial_state: `AttentionState` of earlier keys, by folded batch row; or None.
        return_state: whether to return the state after all keys, too.
        max_segments: as the layer's; used with `segment_ids` only.

    Returns:
        `[B, q1, ..., qn, H, E]` in the dtype of `query`; 0 where a query attends to no key. With
        `return_state` a pair of it and the `AttentionState`.
    """
    keys = key_mask(visibility, key, axes)
    folded_query, folded_key, folded_value = (fold(x, axes) for x in (query, key, value))
    causal = visibility.use_causal_mask
    # With a state no key may be left out; the op checks that there are as many as queries.
    if causal and initial_state is None and not return_state:
        length = dims(folded_query)[1]
        if keys is None and not _same_length(folded_query, folded_key):
            keys = tf.ones(dims(folded_key)[:2], tf.bool)
        folded_key, folded_value = (_masks.resize(x, length) for x in (folded_key, folded_value))
        keys = None if keys is None else _masks.resize(keys, length)
    bias = features.feature_map.key_bias(folded_key)
    if dropout is not None:
        none = tf.zeros([], accumulator(folded_key.dtype))
        dropped = tf.where(dropped_keys(folded_key, *dropout), none - float("inf"), none)
        bias = dropped if bias is None else dropped + _by_head(tf.cast(bias, none.dtype))
    if visibility.prefix_mask is not None:
        # The prefix is the past of every row, its own rows included; causal order is for the rest.
        prefix = _masks.fold_mask("prefix_mask", visibility.prefix_mask, key, axes)
        seen, later = prefix, ~prefix
        if keys is not None:
            seen, later = seen & keys, later & keys
        past = summarize(
            folded_key,
            folded_value,
            key_mask=seen,
            key_bias=bias,
            draw=features.draw,
            **features.of_keys(),
        )
        initial_state = past if initial_state is None else merge(initial_state, past)
        keys = later
    segments = visibility.segment_ids
    if segments is not None:
        segments = _masks.fold_ids("segment_ids", segments, key, axes)
    output = favor_attention(
        folded_query,
        folded_key,
        folded_value,
        causal=causal,
        key_mask=keys,
        key_bias=bias,
        segment_ids=segments,
        max_segments=None if segments is None else max_segments,
        initial_state=initial_state,
        return_state=return_state,
        draw=features.draw,
        **features.of_both(),
    )
    output, state = output if return_state else (output, None)
    output = unfold(hide_masked_queries(output, visibility, query, axes), axes, like=query)
    return (output, state) if return_state else output


def summarize_keys(key, value, features, visibility, *, axes, initial_state):
    """The state of projected keys and values, joined to `initial_state`; arguments as `attend`."""
    keys = key_mask(visibility, key, axes)
    folded_key, folded_value = fold(key, axes), fold(value, axes)
    state = summarize(
        folded_key,
        folded_value,
        key_mask=keys,
        key_bias=features.feature_map.key_bias(folded_key),
        draw=features.draw,
        **features.of_keys(),
    )
    return merge(initial_state, state)


def read_state(query, features, visibility, state, *, axes):
    """Attention of projected queries to the keys of a state; arguments and result as `attend`."""
    folded = fold(query, axes)
    output = read(folded, state=state, draw=features.draw, **features.of_queries())
    return unfold(hide_masked_queries(output, visibility, query, axes), axes, like=query)


def hide_masked_queries(output, visibility, query, axes):
    """Folded attention `[B', L, H, E]`, 0 where `query_mask` says that there is no query."""
    if visibility.query_mask is None:
        return output
    exists = _masks.fold_mask("query_mask", visibility.query_mask, query, axes)
    return tf.where(exists[:, :, tf.newaxis, tf.newaxis], output, tf.zeros_like(output))


def key_mask(visibility, key, axes):
    """Bool `[B', S]` of what `visibility` says about whole keys, or None if it says nothing."""
    named = {"value_mask": visibility.value_mask, "key_mask": visibility.key_mask}
    if visibility.attention_mask is not None and not visibility.is_general(len(axes)):
        named["attention_mask"] = _masks.keys_of_attention_mask(visibility.attention_mask, axes)
    return _masks.combine(
        [
            _masks.fold_mask(name, mask, key, axes)
            for name, mask in named.items()
            if mask is not None
        ]
    )


def _same_length(query, key):
    return query.shape[1] is not None and query.shape[1] == key.shape[1]


def _by_head(bias):
    """A key bias as `[B', 1|G, S]`."""
    return bias if len(bias.shape) == 3 else bias[:, tf.newaxis]


def dropped_keys(key, rate, seed_generator):
    """Bool `[B', G, S]` for a key `[B', S, G, D]`: True, with probability `rate`, drops it."""
    batch, length, heads, _ = dims(key)
    uniform = keras.random.uniform((batch, heads, length), dtype="float32", seed=seed_generator)
    return uniform < rate
