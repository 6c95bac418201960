"""Prepared calls with `exact_window`: what the operator NearFar is given, and the state after it.

Letters as in `favor_attention`; W = exact_window, R = 2 W - 1 near rows of a state.
"""

from __future__ import annotations

import tensorflow as tf

from performer.composition import logsumexp
from performer.ops.dispatch import append_rows, run
from performer.ops.state import AttentionState, empty_state, near_rows, stored_rows
from performer.shapes import dims


def attend(call, offsets, causal, return_state):
    """Output, log weights and (with `return_state`) the state of a prepared call with a window.

    A causal call that goes on from near rows has them before its own keys. The operator counts
    blocks from the position of its first key, of which the place in a block is all that matters:
    with R rows before position p that is p - R, or p + 1.
    """
    call = _with_equal_lengths(call)
    keys, before, start = call.keys, call.state, 0
    if offsets is None and before is not None:
        start = before.position % call.exact_window
        if near_rows(before):
            keys = _after_near_rows(keys, before)
            start = (before.position + 1) % call.exact_window
    if before is None:
        (groups, value_dim), features = dims(keys["value"])[2:], dims(keys["key_projection"])[1]
        before = empty_state(1, groups, features, value_dim, keys["key_projection"].dtype)
    out, log_weight, log_mass, mean = run(
        "near_far",
        offsets,
        **call.queries,
        **keys,
        initial_log_mass=before.log_mass,
        initial_mean=before.mean,
        start=start,
        exact_window=call.exact_window,
        causal=causal,
        scale=call.attributes["scale"],
        query_norm=call.query_norm,
    )
    if not return_state:
        return out, log_weight, None
    position, near = before.position, []
    if causal:
        position += tf.cast(dims(call.queries["query"])[1], tf.int64)
        near = _last_rows(keys, position, call.exact_window)
    return out, log_weight, AttentionState(log_mass, mean, call.draw, position, *near)


def _with_equal_lengths(call):
    """The call, with a check that L = S where that is known only when the graph runs.

    The operator takes more keys than queries, because of near rows.
    """
    query, key = call.queries["query"], call.keys["key"]
    if None not in (query.shape[1], key.shape[1]):
        return call
    message = "query and key must have the same length (L = S with exact_window)"
    check = tf.debugging.assert_equal(tf.shape(query)[1], tf.shape(key)[1], message=message)
    with tf.control_dependencies([] if check is None else [check]):
        return call._replace(queries={**call.queries, "query": tf.identity(query)})


def _after_near_rows(keys, state):
    """The keys of a call with the near rows of a state before them."""
    batch = dims(keys["key"])[0]
    key, value, bias = near_rows(state)

    def of_batch(x):
        return x if x.shape[0] == batch else tf.broadcast_to(x, [batch, *dims(x)[1:]])

    return {
        **keys,
        "key": append_rows(of_batch(key), keys["key"]),
        "value": append_rows(of_batch(value), keys["value"]),
        "key_bias": tf.concat([of_batch(bias), _bias_of_rows(keys)], 2),
    }


def _bias_of_rows(keys):
    """key_bias in full: [B, G, S]."""
    batch, rows, groups, _ = dims(keys["key"])
    bias, full = keys["key_bias"], [batch, groups, rows]
    is_full = all(isinstance(size, int) for size in full) and bias.shape == full
    return bias if is_full else tf.broadcast_to(bias, full)


def _last_rows(keys, position, window):
    """near_key, near_value and near_bias after the keys of a call, which end before `position`.

    Rows two blocks before that of `position` are in the far state already: their bias is -inf.
    """
    stored = stored_rows(window)

    def last(x, axis, fill=0.0):  # the last R, after others that stand for what never was
        rows = dims(x)[axis]
        if isinstance(rows, int) and rows >= stored:
            if axis == 1 and x.shape[0] == 1:  # a slice of the first axis is no copy
                rest = dims(x)[2:]
                return tf.reshape(tf.reshape(x, [rows, *rest])[rows - stored :], [1, stored, *rest])
            return x[:, rows - stored :] if axis == 1 else x[:, :, rows - stored :]
        padding = [[0, 0]] * axis + [[stored, 0]] + [[0, 0]] * (len(x.shape) - axis - 1)
        x = tf.pad(x, padding, constant_values=fill)
        return tf.gather(x, tf.range(stored) + dims(x)[axis] - stored, axis=axis)

    bias = last(_bias_of_rows(keys), 2, logsumexp.NONE)
    begins = tf.cast(window - 1 - position % window, tf.int32)  # the block before the next row's
    near = tf.range(stored) >= begins
    bias = tf.where(near, bias, tf.constant(logsumexp.NONE, bias.dtype))
    return last(keys["key"], 1), last(keys["value"], 1), bias
