"""The state of linear attention: what a set of keys says to any query, in constant size.

`summarize` makes one, `merge` joins two, `read` asks it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from performer import checks
from performer.composition import logsumexp
from performer.shapes import dims


class _Fields(NamedTuple):
    log_mass: tf.Tensor
    mean: tf.Tensor
    draw: tf.Tensor
    position: tf.Tensor | int = 0
    near_key: tf.Tensor | tuple = ()
    near_value: tf.Tensor | tuple = ()
    near_bias: tf.Tensor | tuple = ()


class AttentionState(_Fields):
    """Summary of a set of keys. N sequences, G key/value heads, M features, E value dim.

    Attributes:
        log_mass: [N, G, M], float32 (float64 for float64 inputs): log of the summed key features;
            -inf when empty.
        mean: [N, G, M, E], same type: average of the values under those features; 0 when empty.
        draw: int64 scalar, which draw of the projection the features belong to. States of different
            draws have nothing in common: joining or reading them is an error.
        position: int64 scalar, where the sequence goes on: one past the last position that was
            summarized, for who counts them, as the layer does. Without `exact_window` the functions
            know no positions; they hand it on, and `merge` takes the later one. With it they count
            rows: blocks of the window begin at its multiples.
        near_key, near_value, near_bias: [N, R, G, D], [N, R, G, E] of the keys' type, and [N, G, R]
            of the type of log_mass: the last R = 2 exact_window - 1 keys, values and their biases,
            in order. They are not in log_mass yet where their bias is not -inf. Of the size of no
            row, whatever has been read, where there is no window: an empty tuple.

    A plain structure: `tf.nest`, loops and functions take it apart, `state._asdict()` gives what
    `np.savez` saves, and NumPy arrays do as well as tensors.

    Example:

    >>> import numpy as np
    >>> from performer.ops.state import AttentionState
    >>> nothing = AttentionState(np.full([1, 2, 8], -np.inf), np.zeros([1, 2, 8, 4]), draw=0)
    >>> sorted(nothing._asdict())
    ['draw', 'log_mass', 'mean', 'position']
    """

    __slots__ = ()

    def _asdict(self):
        """The fields by name; those of near rows only where there are some."""
        return {name: x for name, x in super()._asdict().items() if not isinstance(x, tuple)}


NEAR_FIELDS = ("near_key", "near_value", "near_bias")


def near_rows(state) -> list:
    """near_key, near_value and near_bias of a state; an empty list where it has none."""
    rows = [getattr(state, field) for field in NEAR_FIELDS]
    rank = rows[0].shape.rank if tf.is_tensor(rows[0]) else len(np.shape(rows[0]))
    return [] if rank == 1 else rows  # of (), also as an empty array, the rank is 1


@tf.autograph.experimental.do_not_convert
def merge(first: AttentionState, second: AttentionState) -> AttentionState:
    """Joins the states of two disjoint sets of keys.

    Associative and commutative; the identity is `empty_state`.
    Streaming, splitting over the sequence and sequence parallelism all are this function.
    Differentiable to any order.

    Near rows of one state stay near. The keys of the other, and those of log_mass, are far from
    every query that reads the result. Two states that both have near rows do not join: those of the
    earlier one would have to become features, for which a state has no projection.

    Args:
        first, second: `AttentionState` of the same G, M, E and type; N equal, or 1 in one of them.

    Returns:
        The `AttentionState` of all their keys.

    Raises:
        TypeError: the types differ.
        ValueError: the shapes or the draws do; both have near rows.
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
    if near_rows(first) and near_rows(second):
        raise ValueError(
            "first and second must not both have near rows (of exact_window): the rows at the end "
            "of the earlier one would have to become features. Give the earlier one to the call "
            "over the later keys as its initial_state, or make one of them by `summarize`. Got "
            f"{near_rows(first)[0].shape[1]} and {near_rows(second)[0].shape[1]} near rows"
        )
    return join(first, second, same_draw(first.draw, second.draw, "merged states"))


def join(first, second, draw):
    """`merge` of states that fit, and whose common draw is `draw`."""
    with tf.name_scope("merge"):
        log_mass, mean = logsumexp.merge(first.log_mass, first.mean, second.log_mass, second.mean)
        near = near_rows(first) or near_rows(second)
        count = dims(log_mass)[0]
        return AttentionState(
            log_mass,
            mean,
            draw,
            tf.maximum(first.position, second.position),
            *(tf.broadcast_to(x, [count, *dims(x)[1:]]) for x in near),
        )


@tf.autograph.experimental.do_not_convert
def empty_state(
    batch,
    heads,
    features,
    value_dim,
    dtype=tf.float32,
    draw=0,
    *,
    exact_window=None,
    key_dim=None,
    key_dtype=None,
) -> AttentionState:
    """The state of no keys, identity of `merge`.

    Args:
        batch: N, int or int scalar tensor, as the other sizes.
        heads: G, the key/value heads.
        features: M, rows of the projection.
        value_dim: E.
        dtype: tf.float32, or tf.float64 for float64 inputs.
        draw: draw of the projection the state is going to be used with.
        exact_window: None, or that of the calls that go on from the state. It then has masked near
            rows, so that its shapes are those of every later state.
        key_dim: D, with `exact_window`.
        key_dtype: type of keys and values, with `exact_window`; defaults to `dtype`.

    Returns:
        `AttentionState` with log_mass -inf [N, G, M] and mean 0 [N, G, M, E].

    Raises:
        ValueError: a size below 0, or 0 for the features; another type; a window that
            `favor_attention` refuses, or one without `key_dim`.

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
    near: list[tf.Tensor] = []
    if exact_window is not None:
        rows = stored_rows(checks.exact_window(exact_window))
        key_dim = checks.size("key_dim", key_dim)
        key_dtype = dtype if key_dtype is None else key_dtype
        near = [tf.zeros([batch, rows, heads, dim], key_dtype) for dim in (key_dim, value_dim)]
        near.append(tf.fill([batch, heads, rows], tf.constant(logsumexp.NONE, dtype)))
    return AttentionState(
        tf.fill([batch, heads, features], tf.constant(logsumexp.NONE, dtype)),
        tf.zeros([batch, heads, features, value_dim], dtype),
        as_draw(draw),
        tf.zeros([], tf.int64),
        *near,
    )


def stored_rows(exact_window: int) -> int:
    """R: the most rows that a later query may have to meet exactly, in two blocks with itself."""
    return 2 * exact_window - 1


def checked_state(name, state, dtype=None, key=None, value=None, projection=None):
    """Checks a state's own shapes, and that it fits the type, key, value and projection given."""
    if not isinstance(state, AttentionState):
        raise TypeError(f"{name} must be an AttentionState, got {type(state).__name__}")
    log_mass, mean = tf.convert_to_tensor(state.log_mass), tf.convert_to_tensor(state.mean)
    _check_shapes(name, log_mass, mean, log_mass.dtype if dtype is None else dtype)
    if projection is not None:
        checks.same(f"{name}.log_mass", 2, log_mass, projection[0], 1, projection[1], "M")
    if key is not None:
        checks.same(f"{name}.log_mass", 1, log_mass, "key", 2, key, "G")
        checks.same(f"{name}.mean", 3, mean, "value", 3, value, "E")
    near = _checked_near_rows(name, state, log_mass, mean, key, value)
    return AttentionState(log_mass, mean, as_draw(state.draw), as_position(state.position), *near)


def _checked_near_rows(name, state, log_mass, mean, key, value) -> list[tf.Tensor]:
    """The near rows of a state, which fit its own shapes and those of key and value."""
    near = [
        checks.tensor(f"{name}.{field}", x, (layout,))
        for field, x, layout in zip(
            NEAR_FIELDS, near_rows(state), ("NRGD", "NRGE", "NGR"), strict=False
        )
    ]
    if not near:
        return []
    names = [f"{name}.{field}" for field in NEAR_FIELDS]
    for i, group_axis in enumerate((2, 2, 1)):
        checks.same(names[i], 0, near[i], f"{name}.log_mass", 0, log_mass, "N")
        checks.same(names[i], group_axis, near[i], f"{name}.log_mass", 1, log_mass, "G")
    checks.same(names[1], 3, near[1], f"{name}.mean", 3, mean, "E")
    checks.same(names[1], 1, near[1], names[0], 1, near[0], "R")
    checks.same(names[2], 2, near[2], names[0], 1, near[0], "R")
    checks.same_dtype(names[2], near[2], f"{name}.log_mass", log_mass)
    checks.same_dtype(names[1], near[1], names[0], near[0])
    if key is not None:
        checks.same_dtype(names[0], near[0], "key", key)
        checks.same(names[0], 3, near[0], "key", 3, key, "D")
    return near


def _check_shapes(name: str, log_mass, mean, dtype: tf.DType) -> None:
    """A state must be log_mass [N, G, M] and mean [N, G, M, E], both of `dtype`."""
    for field, x, layout in (("log_mass", log_mass, "NGM"), ("mean", mean, "NGME")):
        if x.dtype != dtype:
            raise TypeError(f"{name}.{field} must be {dtype.name}, got {x.dtype.name}")
        if x.shape.rank is not None and x.shape.rank != len(layout):
            raise ValueError(
                f"{name}.{field} must have shape [{', '.join(layout)}], got shape {x.shape}"
            )
    for axis, letter in enumerate("NGM"):
        checks.same(f"{name}.mean", axis, mean, f"{name}.log_mass", axis, log_mass, letter)


def as_draw(draw) -> tf.Tensor:
    """`draw` as an int64 scalar tensor.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is not a scalar.
    """
    return _as_counter("draw", draw)


def as_position(position) -> tf.Tensor:
    """`position` as an int64 scalar tensor; raises as `as_draw`."""
    return _as_counter("position", position)


def _as_counter(name, x):
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_integer:
        raise TypeError(f"{name} must be an integer, got {x.dtype.name}")
    if x.shape.rank not in (0, None):
        raise ValueError(f"{name} must be a scalar, got shape {x.shape}")
    return tf.cast(x, tf.int64)


def same_draw(first, second, what: str) -> tf.Tensor:
    """Returns the common draw of two states (or of a state and a projection).

    Args:
        first, second: int64 scalars.
        what: what they belong to, for the message.

    Raises:
        ValueError: both are known and differ.
        tf.errors.InvalidArgumentError: they differ when the graph runs.
    """
    known = tf.get_static_value(first), tf.get_static_value(second)
    message = f"draw: {what} must come from the same draw of the projection"
    if None not in known:
        if known[0] != known[1]:
            raise ValueError(f"{message}, got {known[0]} and {known[1]}")
        return first
    check = tf.debugging.assert_equal(first, second, message=message, summarize=1)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(first)
