"""Whole attention and its gradients in the shapes of the operators, over the one-head reference.

Letters and types: as `heads`.
"""

from __future__ import annotations

import numpy as np

from performer.reference import one_head
from performer.reference.heads import bias_of_keys, entry, rounded, spans
from performer.reference.near_far import NearFar, near_far_gradients, near_far_in_blocks
from performer.reference.one_head import FeatureMap
from performer.reference.one_head_gradients import gradients


def _calls(
    query,
    key,
    value,
    query_projection,
    key_projection,
    feature_bias,
    key_bias,
    offsets,
    initial_state,
):
    """Where each (sequence, query head) reads, and the arguments of its one-head call."""
    w_q, w_k = rounded(query_projection, query), rounded(key_projection, key)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    if feature_bias is None:
        feature_bias = np.zeros((1, w_q.shape[1]))
    f_bias = np.asarray(feature_bias, np.float64)
    k_bias, heads, groups = bias_of_keys(key, key_bias), query.shape[2], key.shape[2]
    for n, b, rows in spans(len(query), offsets):
        for h in range(heads):
            g = h // (heads // groups)
            state = None
            if initial_state is not None:
                state = tuple(np.asarray(x, np.float64)[n % len(x), g] for x in initial_state)
            at = {"n": n, "b": b, "rows": rows, "h": h, "g": g, "first": h % (heads // groups) == 0}
            arguments = {
                "q": query[b, rows, h],
                "k": key[b, rows, g],
                "v": value[b, rows, g],
                "w_q": w_q[entry(w_q, h, heads)],
                "w_k": w_k[entry(w_k, g, groups)],
                "feature_bias": f_bias[entry(f_bias, h, heads)],
                "key_bias": k_bias[b, g, rows],
            }
            yield at, arguments, state


def attention(
    query,
    key,
    value,
    query_projection,
    key_projection=None,
    *,
    feature_bias=None,
    key_bias=None,
    offsets=None,
    initial_state=None,
    causal=False,
    chunk=64,
    **attributes,
):
    """Attention as `Performer>Causal`, or as Summarize, merge and Read.

    Args:
        query, key, value: [B, L, H, D], [B, S, G, D], [B, S, G, E].
        query_projection, key_projection: [M, D] or [1|G|H, M, D]; the key side defaults to the
            query side.
        feature_bias: None or [1|G|H, M].
        key_bias: None or [1|B, 1|G, 1|S]; -inf masks.
        offsets: None, or int [N + 1]: packed sequences in B = 1.
        initial_state: None or (log_mass [1|N, G, M], mean [1|N, G, M, E]).
        causal: query i sees keys 0 to i (L == S).
        chunk: rows of a chunk of the causal form.
        **attributes: fields of `FeatureMap`.

    Returns:
        out, (log_mass [N, G, M], mean [N, G, M, E]).
    """
    options = FeatureMap(**attributes)
    key_projection = query_projection if key_projection is None else key_projection
    (batch, length, heads), groups, value_dim = (
        np.shape(query)[:3],
        np.shape(key)[2],
        np.shape(value)[-1],
    )
    sequences = batch if offsets is None else len(offsets) - 1
    out = np.zeros((batch, length, heads, value_dim))
    log_mass = np.empty((sequences, groups, np.shape(query_projection)[-2]))
    mean = np.empty((*log_mass.shape, value_dim))
    calls = _calls(
        query,
        key,
        value,
        query_projection,
        key_projection,
        feature_bias,
        key_bias,
        offsets,
        initial_state,
    )
    for at, x, state in calls:
        if causal:
            result, final = one_head.causal(**x, options=options, state=state, chunk=chunk)
        else:
            final = one_head.summarize(x["k"], x["v"], x["w_k"], x["key_bias"], options)
            final = one_head.merge(state, final) if state else final
            result = one_head.read(x["q"], x["w_q"], x["feature_bias"], final, options)
        out[at["b"], at["rows"], at["h"]] = result
        log_mass[at["n"], at["g"]], mean[at["n"], at["g"]] = final
    return out, (log_mass, mean)


def attention_gradients(
    query,
    key,
    value,
    query_projection,
    key_projection,
    feature_bias,
    key_bias,
    grad_out,
    *,
    offsets=None,
    initial_state=None,
    grad_state=None,
    causal=False,
    **attributes,
):
    """Gradients of sum(out * grad_out) + sum(final state * grad_state), by input of `attention`.

    Every gradient has the shape of its input, summed over broadcast axes. Here the projections, the
    biases and (where its gradient is wanted) the initial state must be given in full rank:
    [1|G|H, M, D], [1|G|H, M], [1|B, 1|G, 1|S].
    """
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "query_projection": query_projection,
        "key_projection": key_projection,
        "feature_bias": feature_bias,
        "key_bias": key_bias,
    }

    def of_head(at, arguments, state):
        return gradients(
            **arguments,
            dout=_entry_of(grad_out, at),
            options=FeatureMap(**attributes),
            causal=causal,
            state=state,
            dfinal=_final_of(grad_state, at),
        )

    return _sum_over_heads(inputs, offsets, initial_state, of_head)


def _entry_of(x, at):
    """Rows of x [B, L, H, ...] in one call."""
    return np.asarray(x, np.float64)[at["b"], at["rows"], at["h"]]


def _final_of(grad_state, at):
    """The gradient of the final state in one call: it belongs to the group, so count it once."""
    if grad_state is None or not at["first"]:
        return None
    return tuple(np.asarray(x, np.float64)[at["n"], at["g"]] for x in grad_state)


def _sum_over_heads(inputs, offsets, initial_state, of_head):
    """Gradients of the operator's inputs, from those of each one-head call."""
    calls = _calls(*[*inputs.values(), offsets, initial_state])
    if initial_state is not None:
        state = dict(zip(("initial_log_mass", "initial_mean"), initial_state, strict=True))
        inputs = {**inputs, **state}
    total = {name: np.zeros(np.shape(x)) for name, x in inputs.items()}
    key, key_bias = inputs["key"], inputs["key_bias"]
    heads, groups = np.shape(inputs["query"])[2], np.shape(key)[2]
    bias_grad = np.zeros((len(key), groups, np.shape(key)[1]))
    for at, arguments, state in calls:
        n, b, rows, h, g = (at[name] for name in ("n", "b", "rows", "h", "g"))
        grads = of_head(at, arguments, state)
        total["query"][b, rows, h] += grads["query"]
        total["key"][b, rows, g] += grads["key"]
        total["value"][b, rows, g] += grads["value"]
        for name in ("query_projection", "feature_bias"):
            total[name][entry(total[name], h, heads)] += grads[name]
        w_k = total["key_projection"]
        w_k[entry(w_k, g, groups)] += grads["key_projection"]
        bias_grad[b, g, rows] += grads["key_bias"]
        if initial_state is not None:
            for name in ("initial_log_mass", "initial_mean"):
                total[name][n % len(total[name]), g] += grads[name]
    broadcast = tuple(axis for axis, size in enumerate(np.shape(key_bias)) if size == 1)
    total["key_bias"] += bias_grad.sum(broadcast, keepdims=True)
    return total


def near_far_attention(
    query,
    key,
    value,
    query_projection,
    key_projection=None,
    *,
    feature_bias=None,
    key_bias=None,
    offsets=None,
    initial_state=None,
    form=near_far_in_blocks,
    **attributes,
):
    """Attention as `Performer>NearFar`.

    Args:
        query, key, value: [B, L, H, D], [B, S, G, D], [B, S, G, E].
        others: as `attention`.
        form: `near_far_in_blocks` or `near_far_direct`, which is quicker where blocks are small.
        **attributes: fields of `NearFar`.

    Returns:
        out [B, L, H, E], log_weight [B, L, H], (log_mass [N, G, M], mean [N, G, M, E]). Rows of no
        sequence have 0 and -inf.
    """
    key_projection = query_projection if key_projection is None else key_projection
    (batch, length, heads), value_dim = np.shape(query)[:3], np.shape(value)[-1]
    sequences = batch if offsets is None else len(offsets) - 1
    out = np.zeros((batch, length, heads, value_dim))
    log_weight = np.full((batch, length, heads), one_head.NONE)
    log_mass = np.empty((sequences, np.shape(key)[2], np.shape(query_projection)[-2]))
    mean = np.empty((*log_mass.shape, value_dim))
    calls = _calls(
        query,
        key,
        value,
        query_projection,
        key_projection,
        feature_bias,
        key_bias,
        offsets,
        initial_state,
    )
    for at, x, state in calls:
        place = at["b"], at["rows"], at["h"]
        out[place], log_weight[place], final = form(**x, options=NearFar(**attributes), state=state)
        log_mass[at["n"], at["g"]], mean[at["n"], at["g"]] = final
    return out, log_weight, (log_mass, mean)


def near_far_attention_gradients(
    query,
    key,
    value,
    query_projection,
    key_projection,
    feature_bias,
    key_bias,
    grad_out,
    grad_log_weight=None,
    *,
    offsets=None,
    initial_state=None,
    grad_state=None,
    **attributes,
):
    """Gradients of sum(out grad_out) + sum(log_weight grad_log_weight) + sum(state grad_state).

    By input of `near_far_attention`. Shapes: as `attention_gradients`; grad_log_weight [B, L, H],
    which is ignored on rows that see nothing.
    """
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "query_projection": query_projection,
        "key_projection": key_projection,
        "feature_bias": feature_bias,
        "key_bias": key_bias,
    }

    def of_head(at, arguments, state):
        return near_far_gradients(
            **arguments,
            dout=_entry_of(grad_out, at),
            options=NearFar(**attributes),
            state=state,
            dlog_weight=None if grad_log_weight is None else _entry_of(grad_log_weight, at),
            dfinal=_final_of(grad_state, at),
        )

    return _sum_over_heads(inputs, offsets, initial_state, of_head)
