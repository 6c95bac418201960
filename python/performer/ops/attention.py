"""Linear attention as functions of tensors: `favor_attention` and its halves.

The compiled operators do the work where their library is loaded. Otherwise the plain TensorFlow
composition does.
"""

from __future__ import annotations

import tensorflow as tf

from performer import checks, composition
from performer.composition.log_features import scale_for
from performer.composition.packed_blocks import segment_offsets
from performer.ops import chosen_keys, near_far
from performer.ops.arguments import prepare
from performer.ops.dispatch import run
from performer.ops.outputs import merge_outputs
from performer.ops.state import AttentionState, empty_state, join
from performer.shapes import dims


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
    draw=None,
    feature_map="softmax",
    scale=None,
    key_norm=True,
    feature_epsilon=1e-3,
    exact_window=None,
    far_bias=None,
    exact_keys=None,
    query_norm=True,
    return_log_weight=False,
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

    With `exact_window` = W, keys near a query have their exact weight. Rows stand in blocks of W,
    counted from the start of the sequence. Near are the keys of the query's own block and of the
    blocks beside it, so at least the W before it (and after it, if not causal) and at most twice as
    many; all others are far:

        A[i, j] = exp(scale query[i].key[j] + key_bias[j])                                    near
                = (1/M) sum_m exp(a[i, m] - scale |query[i]|^2 / 2 + far_bias + b[j, m])      far

    One softmax is over both, in linear time.

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
            each run; B max_segments) or 1. Its keys are far from every query, but for those in near
            rows, which a causal call with `exact_window` left there: such a state may only go into
            another causal call with the same window, which continues the sequence.
        return_state: also return the state that includes all keys. With causal and `exact_window`
            it has near rows, and counts positions; then without segment_ids.
        draw: integer that identifies the projection in states; it must equal that of
            `initial_state`. Default: `fingerprint(projection)`, computed in calls that take or
            return a state. A number of one's own saves this time, and lets a state be used with
            changed projections.
        feature_map: "softmax"; "relu": b = log(max(u, 0) + feature_epsilon) + key_bias, "elu": b =
            log(elu(u) + 1) + key_bias, and a likewise; or a function f: b = f(u) + key_bias, in
            plain TensorFlow, slower and with features of size S M in memory.
        scale: factor of query.key, above 0; default D**-0.5 for softmax and 1 otherwise.
        key_norm: subtract scale |key|^2 / 2 (softmax only). False where the caller puts a norm into
            key_bias.
        feature_epsilon: see "relu"; finite, 0 or above.
        exact_window: None, or W: a multiple of 64, up to 65536. Only with the softmax map, the
            features of which estimate the weights that near keys have exactly; those of other maps
            are their kernel, exactly, so that there is nothing to make exact.
        far_bias: floating, a number or [H], with `exact_window` or `exact_keys`: the log of a
            factor of all weights through features. Below 0 it favours near keys; a trained model
            may learn it.
        exact_keys: None, or n of at least 1: every query attends exactly to the n keys of each
            key/value head with the largest expected weight, for queries that are normal with the
            mean and covariance of those given: exp(scale k.mu + scale^2 k'C k / 2 + key_bias). Its
            other keys are as without it. Not causal, without segment_ids and return_state, softmax
            map only. The choice has no gradient. In plain TensorFlow, L n logits in memory.
        query_norm: subtract scale |query|^2 / 2 from a, where it counts: with `exact_window`,
            `exact_keys` and `return_log_weight`. False for features that estimate
            exp(scale query.key) without it.
        return_log_weight: also return the log of each row's total weight, sum_j A[i, j], with the
            constants of the far weights above (other maps than softmax: as A is defined for them).
            Results over disjoint sets of keys join by it: `merge_outputs`. Without `exact_window`
            in plain TensorFlow, with features of size L M in memory.
        name: name scope.

    Returns:
        [B, L, H, E], of the type of query; 0, with gradient 0, on rows that may see no key. With
        `return_log_weight` followed by log weights [B, L, H], float32 (float64 for float64), -inf
        on such rows; with `return_state` by the `AttentionState`: log_mass [N, G, M], mean
        [N, G, M, E], N = B or, with segment_ids, the runs, row by row (with max_segments this many
        for each row, the last ones empty).

    Raises:
        ValueError: a rank, size, or option breaks its rule, or draws differ; the message names
            argument, rule, value.
        TypeError: a type does.
        tf.errors.InvalidArgumentError: sizes or draws that are known only when the graph runs do
            not fit.

    Numerics: everything in log space, scaled by the largest term of each sum: no epsilon, no clamp,
        and entries up to 1e4 stay finite. Sums and states are float32 (float64 for float64).
        Bounds: `performer.tolerances`. Causal rows do not depend on later keys, not even in their
        last bit; only a single token (L = 1, without segments) is rounded otherwise than the same
        row of a longer call, on the CPU. Differentiable to any order.

    Example:

    >>> import tensorflow as tf
    >>> from performer import ops, projections
    >>> x = tf.random.normal([2, 100, 4, 16])
    >>> w = projections.orthogonal_projection(64, 16, seed=1)
    >>> ops.favor_attention(x, x, x, w, causal=True).shape
    TensorShape([2, 100, 4, 16])
    """
    with tf.name_scope(name or "favor_attention"):
        call = prepare(
            projection,
            query=checks.tensor("query", query),
            key=checks.tensor("key", key),
            value=value,
            causal=causal,
            feature_bias=feature_bias,
            key_mask=key_mask,
            key_bias=key_bias,
            state=initial_state,
            segment_ids=segment_ids,
            max_segments=max_segments,
            draw=draw,
            returns_state=return_state,
            feature_map=feature_map,
            scale=scale,
            key_norm=key_norm,
            feature_epsilon=feature_epsilon,
            exact_window=exact_window,
            far_bias=far_bias,
            exact_keys=exact_keys,
            query_norm=query_norm,
        )
        offsets, packed = None, call
        if call.segment_ids is not None:
            _check_state_of_segments(return_state, causal, call.exact_window)
            offsets = segment_offsets(call.segment_ids, call.max_segments)
            packed = _pack(call)
        return_log_weight = checks.flag("return_log_weight", return_log_weight)
        weighed = return_log_weight or call.exact_keys is not None
        out, log_weight, state = _attend(packed, offsets, causal, weighed, return_state)
        if offsets is not None:
            rows = tf.shape(call.queries["query"])[:3]
            out = tf.reshape(out, tf.concat([rows, tf.shape(out)[3:]], 0))
            log_weight = None if log_weight is None else tf.reshape(log_weight, rows)
        results = [out, *([log_weight] if return_log_weight else [])]
        results += [state] if return_state else []
        return out if len(results) == 1 else tuple(results)


@tf.autograph.experimental.do_not_convert
def summarize(
    key,
    value,
    projection,
    *,
    key_mask=None,
    key_bias=None,
    feature_map="softmax",
    scale=None,
    key_norm=True,
    feature_epsilon=1e-3,
    draw=None,
    name=None,
) -> AttentionState:
    """Summarizes keys and values into a state of constant size, the first half of linear attention.

    log_mass[m] = logsumexp_j b[m, j] and mean[m] = softmax_j(b[m, :]) @ value over the keys j.

    Args:
        key: [B, S, G, D], float32, bfloat16, float16 or float64. S may be 0.
        value: [B, S, G, E], of the type of key.
        projection: [M, D], [G, M, D], or a pair (query side, key side), of which the key side is
            used. The fingerprint is that of the pair: give the same one to `read`.
        key_mask, key_bias, feature_map, scale, key_norm, feature_epsilon, draw, name: as
            `favor_attention`.

    Returns:
        `AttentionState` with log_mass [B, G, M] and mean [B, G, M, E], float32 (float64 for
        float64).

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names argument, rule and
            value.

    Example:

    >>> import tensorflow as tf
    >>> from performer import projections, state
    >>> x, w = tf.random.normal([2, 10, 4, 8]), projections.orthogonal_projection(16, 8, seed=1)
    >>> halves = [state.summarize(part, part, w) for part in (x[:, :7], x[:, 7:])]
    >>> state.read(x, w, state.merge(*halves)).shape
    TensorShape([2, 10, 4, 8])
    """
    with tf.name_scope(name or "summarize"):
        return _summarize(
            prepare(
                projection,
                key=checks.tensor("key", key),
                value=value,
                key_mask=key_mask,
                key_bias=key_bias,
                draw=draw,
                returns_state=True,
                feature_map=feature_map,
                scale=scale,
                key_norm=key_norm,
                feature_epsilon=feature_epsilon,
            )
        )


@tf.autograph.experimental.do_not_convert
def read(
    query,
    projection,
    state,
    *,
    feature_bias=None,
    feature_map="softmax",
    scale=None,
    feature_epsilon=1e-3,
    draw=None,
    name=None,
) -> tf.Tensor:
    """Attention of queries to the keys of a state, the second half of linear attention.

    out[i] = softmax_m(a[i, :] + log_mass) @ mean.

    Args:
        query: [B, L, H, D], float32, bfloat16, float16 or float64.
        projection: [M, D], [G|H, M, D], or a pair (query side, key side), of which the query side
            is used. Either what `summarize` was given, or with an explicit `draw`.
        state: `AttentionState` with log_mass [B, G, M], mean [B, G, M, E]; H a multiple of G.
        feature_bias, feature_map, scale, feature_epsilon, draw, name: as `favor_attention`.

    Returns:
        [B, L, H, E], of the type of query; 0 where the state is empty.

    Raises:
        ValueError, TypeError: an argument breaks its rule, or the draws differ.
        tf.errors.InvalidArgumentError: draws that are known only when the graph runs differ.

    Example: see `summarize`.
    """
    with tf.name_scope(name or "read"):
        return _read(
            prepare(
                projection,
                query=checks.tensor("query", query),
                state=state,
                feature_bias=feature_bias,
                draw=draw,
                feature_map=feature_map,
                scale=scale,
                feature_epsilon=feature_epsilon,
            )
        )


def _attend(call, offsets, causal, return_log_weight, return_state):
    """Output, log weights and state of a prepared call; None for what is not wanted."""
    if call.exact_keys is not None:
        chosen = chosen_keys.choose(call)
        others = chosen_keys.without(call, chosen)
        parts = [chosen_keys.attend_to(call, chosen), _attend(others, None, False, True, False)[:2]]
        return *merge_outputs(*zip(*parts, strict=True)), None
    if call.exact_window is not None:
        return near_far.attend(call, offsets, causal, return_state)
    if return_log_weight:
        return _with_log_weight(call, offsets, causal)
    out, state = (_causal if causal else _bidirectional)(call, offsets)
    return out, None, state


def _causal(call, offsets):
    """Output and final state of a prepared causal call."""
    before = _state_before(call)
    out, log_mass, mean = run(
        "causal",
        offsets,
        initial_log_mass=before.log_mass,
        initial_mean=before.mean,
        **call.queries,
        **call.keys,
        **call.attributes,
    )
    return out, AttentionState(log_mass, mean, call.draw, before.position)


def _check_state_of_segments(return_state, causal, exact_window):
    """Refuses the state of sequences that end at different places of their blocks."""
    if return_state and causal and exact_window is not None:
        raise ValueError(
            "return_state must be False with segment_ids, causal and exact_window: the sequences "
            "end at different positions, of which a state has one. Got return_state=True"
        )


def _with_log_weight(call, offsets, causal):
    """Output, log weights and state of a prepared call without a window, as plain TensorFlow.

    The log weights are those of the features, with what cancels in the output: the norm of the
    query and the number of features.
    """
    options = {"offsets": offsets, "packed": offsets is not None}
    attributes = {**call.attributes, **options, "return_log_weight": True}
    if causal:
        before = _state_before(call)
        initial = {"initial_log_mass": before.log_mass, "initial_mean": before.mean}
        out, log_weight, log_mass, mean = composition.causal(
            **call.queries, **call.keys, **initial, **attributes
        )
        state = AttentionState(log_mass, mean, call.draw, before.position)
    else:
        state = _state_of_all(call, offsets)
        out, log_weight = composition.read(
            **call.queries, log_mass=state.log_mass, mean=state.mean, **attributes
        )
    if call.attributes["feature_map"] == "softmax":
        query = tf.cast(call.queries["query"], log_weight.dtype)
        features = tf.shape(call.queries["query_projection"])[1]
        log_weight -= tf.math.log(tf.cast(features, log_weight.dtype))
        if call.query_norm:
            scale = scale_for(call.attributes["scale"], "softmax", dims(query)[-1], query.dtype)
            log_weight -= scale / 2 * tf.reduce_sum(query**2, -1)
    return out, log_weight, state


def _bidirectional(call, offsets):
    """Output and state of a prepared call in which every query sees every key."""
    state = _state_of_all(call, offsets)
    return _read(call._replace(state=state), offsets), state


def _state_before(call):
    """The initial state of a prepared call; an empty one where it has none."""
    if call.state is not None:
        return call.state
    groups, features = tf.shape(call.keys["key"])[2], tf.shape(call.keys["key_projection"])[1]
    value_dim = tf.shape(call.keys["value"])[3]
    return empty_state(1, groups, features, value_dim, call.keys["key_projection"].dtype)


def _state_of_all(call, offsets):
    """The state of all keys of a prepared call, and of its initial state."""
    state = _summarize(call, offsets)
    return state if call.state is None else join(call.state, state, call.draw)


def _summarize(call, offsets=None):
    """The state of the keys of a prepared call."""
    log_mass, mean = run("summarize", offsets, **call.keys, **call.attributes)
    return AttentionState(log_mass, mean, call.draw, tf.zeros([], tf.int64))


def _read(call, offsets=None):
    """The output of the queries of a prepared call that read its state."""
    log_mass, mean = call.state.log_mass, call.state.mean
    return run("read", offsets, log_mass=log_mass, mean=mean, **call.queries, **call.attributes)


def _pack(call):
    """The call with all rows of the batch one after another, as the operators take segments."""
    keys = call.keys
    batch, length = dims(keys["key"])[:2]
    bias = keys["key_bias"]
    bias = tf.broadcast_to(bias, [batch, dims(bias)[1], length])
    bias = tf.transpose(_end_to_end(tf.transpose(bias, [0, 2, 1])), [0, 2, 1])
    key, value = _end_to_end(keys["key"]), _end_to_end(keys["value"])
    query = _end_to_end(call.queries["query"])
    return call._replace(
        queries={**call.queries, "query": query},
        keys={**keys, "key": key, "value": value, "key_bias": bias},
    )


def _end_to_end(x):
    """[B, S, ...] to [1, B S, ...]."""
    batch, rows, *sizes = dims(x)
    return tf.reshape(x, [1, batch * rows, *sizes])
