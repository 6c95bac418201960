"""The state of linear attention: what a set of keys says to any query, in constant size.

`summarize` makes one, `merge` joins two, `read` asks it: the halves that attention is made of.
"""

from typing import NamedTuple

import tensorflow as tf

from performer import checks
from performer.composition import logsumexp
from performer.counters import as_draw, as_position, same_draw
from performer.ops.dispatch import run


class AttentionState(NamedTuple):
    """Summary of a set of keys. N sequences, G key/value heads, M features, E value dim.

    Attributes:
        log_mass: [N, G, M], float32 (float64 for float64 inputs): log of the summed key features;
            -inf when empty.
        mean: [N, G, M, E], same type: average of the values under those features; 0 when empty.
        draw: int64 scalar, which draw of the projection the features belong to. States of different
            draws have nothing in common: joining or reading them is an error.
        position: int64 scalar, where the sequence goes on: one past the last position that was
            summarized, for who counts them, as the layer does. The functions know no positions;
            they hand it on, and `merge` takes the later one.

    A plain structure: `tf.nest`, loops and functions take it apart, `state._asdict()` gives what
    `np.savez` saves, and NumPy arrays do as well as tensors.

    Example:

    >>> import numpy as np
    >>> from performer.ops.state import AttentionState
    >>> nothing = AttentionState(np.full([1, 2, 8], -np.inf), np.zeros([1, 2, 8, 4]), draw=0)
    >>> sorted(nothing._asdict())
    ['draw', 'log_mass', 'mean', 'position']
    """

    log_mass: tf.Tensor
    mean: tf.Tensor
    draw: tf.Tensor
    position: tf.Tensor | int = 0


@tf.autograph.experimental.do_not_convert
def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """Joins the states of two disjoint sets of keys.

    Associative and commutative; the identity is `empty_state`.
    Streaming, splitting over the sequence and sequence parallelism all are this function.
    Differentiable to any order.

    Args:
        first, second: `AttentionState` of the same G, M, E and type; N equal, or 1 in one of them.

    Returns:
        The `AttentionState` of all their keys.

    Raises:
        TypeError: the types differ.
        ValueError: the shapes or the draws do.
        tf.errors.InvalidArgumentError: draws that are known only when the graph runs differ.

    Numerics: in log space, scaled by the larger mass: no overflow, rounding only. Merging with the
    identity is exact.

    Example:

    >>> import tensorflow as tf
    >>> from performer import state
    >>> nothing = state.empty_state(1, 2, 8, 4)
    >>> some = state.AttentionState(tf.zeros([1, 2, 8]), tf.ones([1, 2, 8, 4]), 0)
    >>> bool(tf.reduce_all(state.merge(some, nothing).mean == some.mean))
    True
    """
    first = checked_state("first", first)
    second = checked_state("second", second, first.log_mass.dtype)
    for field in ("log_mass", "mean"):
        one, two = getattr(first, field).shape, getattr(second, field).shape
        fits = one[1:].is_compatible_with(two[1:])
        if not fits or (not one[:1].is_compatible_with(two[:1]) and 1 not in (one[0], two[0])):
            raise ValueError(
                f"{field} of the states must agree, but for N = 1 on axis 0, got {one} and {two}"
            )
    draw = same_draw(first.draw, second.draw, "merged states")
    with tf.name_scope("merge"):
        return AttentionState(
            *logsumexp.merge(first.log_mass, first.mean, second.log_mass, second.mean),
            draw,
            tf.maximum(first.position, second.position),
        )


@tf.autograph.experimental.do_not_convert
def empty_state(batch, heads, features, value_dim, dtype=tf.float32, draw=0) -> AttentionState:
    """The state of no keys, identity of `merge`.

    Args:
        batch: N, int or int scalar tensor, as the other sizes.
        heads: G, the key/value heads.
        features: M, rows of the projection.
        value_dim: E.
        dtype: tf.float32, or tf.float64 for float64 inputs.
        draw: draw of the projection the state is going to be used with.

    Returns:
        `AttentionState` with log_mass -inf [N, G, M] and mean 0 [N, G, M, E].

    Raises:
        ValueError: a size below 0, or 0 for the features; another type.

    Example:

    >>> from performer import state
    >>> state.empty_state(1, 2, 8, 4).mean.shape
    TensorShape([1, 2, 8, 4])
    """
    dtype = tf.as_dtype(dtype)
    if dtype not in (tf.float32, tf.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype.name}")
    sizes = {"batch": batch, "heads": heads, "features": features, "value_dim": value_dim}
    for name, size in sizes.items():
        least, known = int(name == "features"), tf.get_static_value(tf.convert_to_tensor(size))
        if known is not None and known < least:
            raise ValueError(f"{name} must be at least {least}, got {known}")
    return AttentionState(
        tf.fill([batch, heads, features], tf.constant(logsumexp.NONE, dtype)),
        tf.zeros([batch, heads, features, value_dim], dtype),
        as_draw(draw),
        tf.zeros([], tf.int64),
    )


def checked_state(name, state, dtype=None, key=None, value=None, projection=None):
    """Checks a state's own shapes, and that it fits the type, key, value and projection given."""
    if not isinstance(state, AttentionState):
        raise TypeError(f"{name} must be an AttentionState, got {type(state).__name__}")
    log_mass, mean = tf.convert_to_tensor(state.log_mass), tf.convert_to_tensor(state.mean)
    checks.state(name, log_mass, mean, log_mass.dtype if dtype is None else dtype)
    if projection is not None:
        checks.same(f"{name}.log_mass", 2, log_mass, projection[0], 1, projection[1], "M")
    if key is not None:
        checks.same(f"{name}.log_mass", 1, log_mass, "key", 2, key, "G")
        checks.same(f"{name}.mean", 3, mean, "value", 3, value, "E")
    return AttentionState(log_mass, mean, as_draw(state.draw), as_position(state.position))


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
    draw=0,
    name=None,
) -> AttentionState:
    """Summarizes keys and values into a state of constant size, the first half of linear attention.

    log_mass[m] = logsumexp_j b[m, j] and mean[m] = softmax_j(b[m, :]) @ value over the keys j.

    Args:
        key: [B, S, G, D], float32, bfloat16, float16 or float64. S may be 0.
        value: [B, S, G, E], of the type of key.
        projection: [M, D], [G, M, D], or a pair (query side, key side), of which the key side is
            used.
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
        attributes = checks.attributes(feature_map, scale, feature_epsilon)
        key, value = checks.tensor("key", key, ("BSGD",)), checks.tensor("value", value, ("BSGE",))
        dtype = checks.accumulator(key.dtype)
        key_side = checks.projection_side(projection, 1, dtype)
        checks.keys(key, value, key_side)
        log_mass, mean = run(
            "summarize",
            None,
            key=key,
            value=value,
            key_projection=key_side[1],
            key_bias=checks.key_bias(key, dtype, key_mask, key_bias),
            key_norm=bool(key_norm),
            **attributes,
        )
        return AttentionState(log_mass, mean, as_draw(draw), tf.zeros([], tf.int64))


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
    draw=0,
    name=None,
) -> tf.Tensor:
    """Attention of queries to the keys of a state, the second half of linear attention.

    out[i] = softmax_m(a[i, :] + log_mass) @ mean.

    Args:
        query: [B, L, H, D], float32, bfloat16, float16 or float64.
        projection: [M, D], [G|H, M, D], or a pair (query side, key side), of which the query side
            is used.
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
        attributes = checks.attributes(feature_map, scale, feature_epsilon)
        query = checks.tensor("query", query, ("BLHD",))
        dtype = checks.accumulator(query.dtype)
        query_side = checks.projection_side(projection, 0, dtype)
        state = checked_state("state", state, dtype, projection=query_side)
        feature_bias = checks.feature_bias(feature_bias, query_side[1], dtype)
        checks.queries(query, state.log_mass.shape[1], query_side, feature_bias)
        checks.same("state.log_mass", 0, state.log_mass, "query", 0, query, "B")
        same_draw(as_draw(draw), state.draw, "projection and state")
        return run(
            "read",
            None,
            query=query,
            query_projection=query_side[1],
            feature_bias=feature_bias,
            log_mass=state.log_mass,
            mean=state.mean,
            **attributes,
        )
