"""Linear attention as a function of tensors.

The compiled operators do the work where their library is loaded; otherwise the plain TensorFlow
composition does.
"""

from __future__ import annotations

import tensorflow as tf

from performer import checks
from performer.composition import packed_blocks
from performer.counters import as_draw, same_draw
from performer.ops.dispatch import run
from performer.ops.state import AttentionState, checked_state, empty_state, merge, read, summarize
from performer.shapes import dims

__all__ = ["AttentionState", "empty_state", "favor_attention", "merge", "read", "summarize"]


def _segments(segment_ids, query, key):
    """Checked segment_ids [B, S] of self-attention."""
    segment_ids = checks.tensor("segment_ids", segment_ids, ("BS",))
    if not segment_ids.dtype.is_integer:
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype.name}")
    checks.same("query", 1, query, "key", 1, key, "length (L = S with segment_ids)")
    checks.same("segment_ids", 0, segment_ids, "key", 0, key, "B")
    checks.same("segment_ids", 1, segment_ids, "key", 1, key, "S")
    return segment_ids


def _laid_end_to_end(x):
    """[B, S, ...] to [1, B S, ...]."""
    batch, rows, *sizes = dims(x)
    return tf.reshape(x, [1, batch * rows, *sizes])


@tf.autograph.experimental.do_not_convert
def favor_attention(
    query,
    key,
    value,
    projection,
    *,
    causal=False,
    key_mask=None,
    key_bias=None,
    segment_ids=None,
    max_segments=None,
    feature_bias=None,
    initial_state=None,
    return_state=False,
    draw=0,
    feature_map="softmax",
    scale=None,
    key_norm=True,
    feature_epsilon=1e-3,
    name=None,
):
    """Linear attention with positive random features (FAVOR+).

    Time and memory are linear in the sequence length. With u(x) = sqrt(scale) w.x for the rows w of
    the projection, the softmax map gives query log-features a = u(query) + feature_bias and key
    log-features b = u(key) - scale |key|^2 / 2 + key_bias, and

        out[i] = sum_j A[i, j] value[j] / sum_j A[i, j],    A[i, j] = sum_m exp(a[i, m] + b[j, m]).

    For a projection of `performer.projections`, A estimates exp(scale query.key) without bias, up
    to a factor for each query. Source: Choromanski et al., "Rethinking Attention with Performers",
    https://arxiv.org/abs/2009.14794.

    Args:
        query: [B, L, H, D], float32, bfloat16, float16 or float64.
        key: [B, S, G, D], same type. H must be a multiple of G; query head h uses key/value head h
            // (H // G).
        value: [B, S, G, E], same type.
        projection: [M, D], one for each head ([H, M, D] or [G, M, D]), or a tuple of two, query
            side and key side (the key side takes [M, D] or [G, M, D]). Used in float32 (float64);
            for bfloat16 and float16 rounded once to it.
        causal: query i attends to keys 0 to i only (L must equal S).
        key_mask: bool [B, S], True: attend. What masked keys and values hold, NaN included, changes
            nothing.
        key_bias: floating, [B, S] or [B, G, S] (or 1 in any axis), added to b: the log of a weight
            of each key; -inf masks the key.
        segment_ids: integers [B, S]; runs of equal ids are separate sequences (self-attention: L
            must equal S).
        max_segments: int, the largest number of such runs in a row. Needed for speed under XLA,
            which otherwise, as it cannot count them, reserves memory for S states of each row.
        feature_bias: floating, [M], [G, M] or [H, M], added to a; default 0.
        initial_state: `AttentionState` of keys that come before, N = B (with segment_ids: one for
            each run; B max_segments) or 1.
        return_state: also return the state that includes all keys.
        draw: integer, which draw of the projection this is. It must equal that of `initial_state`.
        feature_map: "softmax"; "relu": b = log(max(u, 0) + feature_epsilon) + key_bias, "elu": b =
            log(elu(u) + 1) + key_bias, and a likewise; or a function f: b = f(u) + key_bias, in
            plain TensorFlow, slower and with features of size S M in memory.
        scale: factor of query.key, above 0; default D**-0.5 for softmax and 1 otherwise.
        key_norm: subtract scale |key|^2 / 2 (softmax only). False where the caller puts a norm into
            key_bias.
        feature_epsilon: see "relu"; finite, 0 or above.
        name: name scope.

    Returns:
        [B, L, H, E], of the type of query; 0, with gradient 0, on rows that may see no key. With
        `return_state` a pair of it and the `AttentionState`: log_mass [N, G, M], mean [N, G, M, E],
        N = B or, with segment_ids, the runs, row by row (with max_segments this many for each row,
        the last ones empty).

    Raises:
        ValueError: a rank, size, or option breaks its rule, or draws differ; the message names
            argument, rule, value.
        TypeError: a type does.
        tf.errors.InvalidArgumentError: sizes or draws that are known only when the graph runs do
            not fit.

    Numerics: everything in log space, scaled by the largest term of each sum: no epsilon, no clamp,
        and entries up to 1e4 stay finite. Sums and states are float32 (float64 for float64).
        Bounds: `performer.tolerances`. Causal rows do not depend on later keys, not even in their
        last bit. Differentiable to any order.

    Example:

    >>> import tensorflow as tf
    >>> from performer import ops, projections
    >>> x = tf.random.normal([2, 100, 4, 16])
    >>> w = projections.orthogonal_projection(64, 16, seed=1)
    >>> ops.favor_attention(x, x, x, w, causal=True).shape
    TensorShape([2, 100, 4, 16])
    """
    with tf.name_scope(name or "favor_attention"):
        attributes = checks.attributes(feature_map, scale, feature_epsilon)
        query = checks.tensor("query", query, ("BLHD",))
        key, value = checks.tensor("key", key, ("BSGD",)), checks.tensor("value", value, ("BSGE",))
        dtype = checks.accumulator(query.dtype)
        query_side = checks.projection_side(projection, 0, dtype)
        key_side = checks.projection_side(projection, 1, dtype)
        feature_bias = checks.feature_bias(feature_bias, query_side[1], dtype)
        checks.queries_and_keys(query, key, value, query_side, key_side, feature_bias)
        if causal:
            checks.same("query", 1, query, "key", 1, key, "length (L = S when causal)")
        bias = checks.key_bias(key, dtype, key_mask, key_bias)
        draw = as_draw(draw)
        if initial_state is not None:
            initial_state = checked_state(
                "initial_state", initial_state, dtype, key, value, key_side
            )
            if segment_ids is None:
                checks.one_of(
                    "initial_state.log_mass", 0, initial_state.log_mass, {"1": 1, "B": key.shape[0]}
                )
            draw = same_draw(draw, initial_state.draw, "projection and initial_state")

        most = checks.max_segments(max_segments, segment_ids)
        offsets, batch_shape = None, tf.shape(query)
        if segment_ids is not None:
            offsets = packed_blocks.segment_offsets(_segments(segment_ids, query, key), most)
            bias = tf.broadcast_to(bias, [batch_shape[0], tf.shape(bias)[1], batch_shape[1]])
            bias = tf.transpose(_laid_end_to_end(tf.transpose(bias, [0, 2, 1])), [0, 2, 1])
            query, key, value = (_laid_end_to_end(x) for x in (query, key, value))

        query_inputs = {
            "query": query,
            "query_projection": query_side[1],
            "feature_bias": feature_bias,
        }
        key_inputs = {"key": key, "value": value, "key_projection": key_side[1], "key_bias": bias}
        key_inputs["key_norm"] = bool(key_norm)
        if causal:
            before = initial_state
            if before is None:
                before = empty_state(
                    1, *(tf.shape(x)[i] for x, i in ((key, 2), (key_side[1], 1), (value, 3))), dtype
                )
            out, log_mass, mean = run(
                "causal",
                offsets,
                initial_log_mass=before.log_mass,
                initial_mean=before.mean,
                **query_inputs,
                **key_inputs,
                **attributes,
            )
            state = AttentionState(log_mass, mean, draw, before.position)
        else:
            log_mass, mean = run("summarize", offsets, **key_inputs, **attributes)
            state = AttentionState(log_mass, mean, draw, tf.zeros([], tf.int64))
            if initial_state is not None:
                state = merge(initial_state, state)
            out = run(
                "read",
                offsets,
                log_mass=state.log_mass,
                mean=state.mean,
                **query_inputs,
                **attributes,
            )
        if offsets is not None:
            out = tf.reshape(out, tf.concat([batch_shape[:3], tf.shape(out)[3:]], 0))
        return (out, state) if return_state else out
