"""Linear attention of heads over one axis: masks and dropped keys around the operators."""

import keras
import tensorflow as tf

from performer.checks import accumulator
from performer.ops import favor_attention, merge, summarize
from performer.shapes import dims


def attend(
    query,
    key,
    value,
    features,
    masks,
    *,
    dropout=None,
    initial_state=None,
    return_state=False,
    max_segments=None,
):
    """FAVOR+ with masks that need no scores.

    Args:
        query: `[B', T, H, D]`; `key` `[B', S, G, D]` and `value` `[B', S, G, E]` likewise; not
            multiplied by any scale.
        features: the call's `Features`.
        masks: the call's `FoldedMasks`.
        dropout: a pair of rate and `keras.random.SeedGenerator`; None drops nothing.
        initial_state: `AttentionState` of earlier keys, or None.
        return_state: whether to return the state after all keys, too.
        max_segments: as the layer's; used with `segment_ids` only.

    Returns:
        `[B', T, H, E]` in the dtype of `query`, 0 where a query attends to no key; and the
        `AttentionState`, or None without `return_state`.
    """
    keys = masks.keys
    # With a state no key may be left out: the operator checks that there are as many as queries.
    if masks.causal and initial_state is None and not return_state:
        key, value, keys = _resize_keys(query, key, value, keys)
    bias = _key_bias(key, features.feature_map, dropout)
    if masks.prefix is not None:
        # Every query attends to the keys of the prefix: they enter as an initial state. The causal
        # mask then acts on the other keys only.
        in_prefix, others = masks.prefix, ~masks.prefix
        if keys is not None:
            in_prefix, others = in_prefix & keys, others & keys
        prefix = summarize_keys(key, value, features, in_prefix, bias)
        initial_state = prefix if initial_state is None else merge(initial_state, prefix)
        keys = others
    output = favor_attention(
        query,
        key,
        value,
        causal=masks.causal,
        key_mask=keys,
        key_bias=bias,
        segment_ids=masks.segment_ids,
        max_segments=None if masks.segment_ids is None else max_segments,
        initial_state=initial_state,
        return_state=return_state,
        draw=features.draw,
        **features.for_attention(),
    )
    output, state = output if return_state else (output, None)
    return hide_queries(output, masks.queries), state


def summarize_keys(key, value, features, keys, bias):
    """The state of keys and values.

    Args:
        key, value, features: as `attend`.
        keys: bool `[B', S]`, which keys exist; None: all.
        bias: of the keys' log-features, as the operators take it; None for 0.
    """
    return summarize(
        key, value, key_mask=keys, key_bias=bias, draw=features.draw, **features.for_keys()
    )


def hide_queries(output, queries):
    """`output` `[B', T, H, E]`, 0 where `queries` (bool `[B', T]`, or None) is False."""
    if queries is None:
        return output
    return tf.where(queries[:, :, tf.newaxis, tf.newaxis], output, tf.zeros_like(output))


def dropped_keys(key, rate, seed_generator):
    """Bool `[B', G, S]` for a key `[B', S, G, D]`: True, with probability `rate`, drops it."""
    batch, length, heads, _ = dims(key)
    uniform = keras.random.uniform((batch, heads, length), dtype="float32", seed=seed_generator)
    return uniform < rate


def _key_bias(key, feature_map, dropout):
    """Bias of the keys' log-features: that of the feature map, and -inf for dropped keys."""
    bias = feature_map.key_bias(key)
    if dropout is None:
        return bias
    zero = tf.zeros([], accumulator(key.dtype))
    dropped = tf.where(dropped_keys(key, *dropout), zero - float("inf"), zero)
    if bias is None:
        return dropped
    by_head = bias if len(bias.shape) == 3 else bias[:, tf.newaxis]
    return dropped + tf.cast(by_head, zero.dtype)


def _resize_keys(query, key, value, keys):
    """Key, value and the mask of keys for a causal call: as many keys as there are queries.

    No query attends to the keys after the last query; masked keys stand for missing ones.
    """
    length = dims(query)[1]
    same = query.shape[1] is not None and query.shape[1] == key.shape[1]
    if keys is None and not same:
        keys = tf.ones(dims(key)[:2], tf.bool)
    keys = None if keys is None else _resize(keys, length)
    return _resize(key, length), _resize(value, length), keys


def _resize(x, length):
    """`[B, S, ...]` to `[B, length, ...]`: cut at the end, or filled with 0 (False)."""
    if x.shape[1] is not None and x.shape[1] == length:
        return x
    x = x[:, :length]
    missing = length - tf.shape(x)[1]
    x = tf.pad(x, [[0, 0], [0, missing]] + [[0, 0]] * (len(x.shape) - 2))
    return tf.ensure_shape(
        x, [x.shape[0], length if isinstance(length, int) else None, *x.shape[2:]]
    )
