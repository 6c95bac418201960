"""Linear attention of heads over one axis: masks and dropped keys around the operators."""

import keras
import tensorflow as tf

from performer import parallel
from performer.checks import accumulator
from performer.ops import favor_attention, merge, merge_outputs, summarize
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
    bias = _key_bias(key, features, dropout)
    options = {
        "key_bias": bias,
        "draw": features.draw,
        **features.for_attention(),
        **features.for_window(),
    }
    if masks.prefix is not None and features.exact_window is not None:
        output, state = _attend_to_near_prefix(
            *(query, key, value, masks.prefix, keys, initial_state, return_state), options
        )
        return hide_queries(output, masks.queries), state
    if masks.prefix is not None:
        # Every query attends to the keys of the prefix: they enter as an initial state. The causal
        # mask then acts on the other keys only.
        in_prefix, others = masks.prefix, ~masks.prefix
        if keys is not None:
            in_prefix, others = in_prefix & keys, others & keys
        prefix = summarize_keys(key, value, features, in_prefix, bias)
        initial_state = prefix if initial_state is None else merge(initial_state, prefix)
        keys = others
    function = favor_attention if parallel.current() is None else parallel.favor_attention
    output = function(
        query,
        key,
        value,
        causal=masks.causal,
        key_mask=keys,
        segment_ids=masks.segment_ids,
        max_segments=None if masks.segment_ids is None else max_segments,
        initial_state=initial_state,
        return_state=return_state,
        **options,
    )
    output, state = output if return_state else (output, None)
    return hide_queries(output, masks.queries), state


def _attend_to_near_prefix(query, key, value, prefix, keys, state, return_state, options):
    """Causal attention with a window, in which every query attends to the keys of a prefix, too.

    Attention to those keys is not causal, attention to the others is. Their results are joined.

    Args:
        query, key, value: as `attend`, of one length.
        prefix, keys: bool `[B', S]`: the keys of the prefix; the keys that exist, or None.
        state, return_state: as `attend`. The state after the call has all keys in order, as if none
            were of the prefix.
        options: further arguments of `favor_attention`.
    """
    others = ~prefix if keys is None else ~prefix & keys
    prefix = prefix if keys is None else prefix & keys
    if state is None:
        place = {}
    else:  # no key, at the position where this call begins
        nothing = tf.constant(float("-inf"), state.log_mass.dtype)
        empty = state._replace(
            log_mass=tf.fill(tf.shape(state.log_mass), nothing),
            mean=tf.zeros_like(state.mean),
            near_key=(),
            near_value=(),
            near_bias=(),
        )
        place = {"initial_state": empty}

    def call(causal, mask, **more):
        return favor_attention(query, key, value, causal=causal, key_mask=mask, **more, **options)

    results = [
        call(True, others, initial_state=state, return_log_weight=True),
        call(False, prefix, return_log_weight=True, **place),
    ]
    output, _ = merge_outputs(*zip(*results, strict=True))
    after = None
    if return_state:
        after = call(True, keys, initial_state=state, return_state=True)[1]
    return output, after


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


def _key_bias(key, features, dropout):
    """Bias of the keys' log-features: that of the feature map, and -inf for dropped keys."""
    bias = map_bias(key, features)
    if dropout is None:
        return bias
    zero = tf.zeros([], accumulator(key.dtype))
    dropped = tf.where(dropped_keys(key, *dropout), zero - float("inf"), zero)
    if bias is None:
        return dropped
    by_head = bias if len(bias.shape) == 3 else bias[:, tf.newaxis]
    return dropped + tf.cast(by_head, zero.dtype)


def map_bias(key, features):
    """The feature map's bias of the keys; None for none.

    Raises:
        ValueError: it stands for the norm of the keys, in a layer with a window.
    """
    bias = features.feature_map.key_bias(key)
    if bias is not None and features.has_exact_keys and not features.feature_map.key_norm:
        raise ValueError(
            "`feature_map` must have key_norm=True, or no `key_bias`, with `exact_window` and "
            "`exact_keys`: a norm in the bias of the keys would count in exact attention, too. "
            f"Received: feature_map={features.feature_map!r}"
        )
    return bias


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
