"""The state of linear attention: what a set of keys says to any query, in constant size.

`summarize` makes one, `merge` joins two, `read` asks it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from performer import checks
from performer.composition import logsumexp
from performer.shapes import dims

ANY_DRAW = -(2**63)  # fits every projection; even, which no fingerprint is


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
        draw: int64 scalar that identifies the projection of the features: its `fingerprint`, unless
            the caller numbers projections otherwise. States of different projections have nothing
            in common: joining or reading them is an error. `ANY_DRAW`, of a state of no keys: it
            fits all.
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
    >>> import tensorflow as tf
    >>> from performer.ops.state import AttentionState
    >>> nothing = AttentionState(np.full([1, 2, 8], -np.inf), np.zeros([1, 2, 8, 4]), draw=0)
    >>> list(nothing._asdict())
    ['log_mass', 'mean', 'draw', 'position', 'near_key', 'near_value', 'near_bias']
    >>> len(tf.nest.flatten(nothing))  # near rows only with a window
    4
    """

    __slots__ = ()

    def __new__(cls, log_mass, mean, draw, position=0, near_key=(), near_value=(), near_bias=()):
        """A state; what `np.savez` made of an empty tuple is one again."""
        near = [() if _is_nothing(x) else x for x in (near_key, near_value, near_bias)]
        return super().__new__(cls, log_mass, mean, draw, position, *near)


def _is_nothing(x):
    return isinstance(x, np.ndarray) and x.shape == (0,)


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
        tf.errors.InvalidArgumentError: shapes or draws that are known only when the graph runs do.

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
                f"first and second must agree in {field}, but for N = 1 on axis 0, got {one} and "
                f"{two}"
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
        with tf.control_dependencies(_fit_when_run(first, second)):
            log_mass, mean = tf.identity(first.log_mass), tf.identity(first.mean)
        log_mass, mean = logsumexp.merge(log_mass, mean, second.log_mass, second.mean)
        near = near_rows(first) or near_rows(second)
        count = dims(log_mass)[0]
        return AttentionState(
            log_mass,
            mean,
            draw,
            tf.maximum(first.position, second.position),
            *(tf.broadcast_to(x, [count, *dims(x)[1:]]) for x in near),
        )


def _fit_when_run(first, second):
    """Checks of sizes that only a running graph knows, and that would broadcast if they were 1."""
    found = []
    for name, state in (("first", first), ("second", second)):
        for axis, letter in enumerate("NGM"):
            found += checks.same_when_run(
                f"{name}.mean", axis, state.mean, f"{name}.log_mass", axis, state.log_mass, letter
            )
    for axis, letter in ((1, "G"), (2, "M"), (3, "E")):
        found += checks.same_when_run(
            "second.mean", axis, second.mean, "first.mean", axis, first.mean, letter
        )
    return found


@tf.autograph.experimental.do_not_convert
def empty_state(
    batch,
    heads,
    features,
    value_dim,
    dtype=tf.float32,
    draw=ANY_DRAW,
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
        draw: `draw` of the states that it is going to be joined with; by default it fits all.
        exact_window: None, or that of the calls that go on from the state. It then has masked near
            rows, so that its shapes are those of every later state.
        key_dim: D, with `exact_window`.
        key_dtype: type of keys and values, with `exact_window`; defaults to `dtype`.

    Returns:
        `AttentionState` with log_mass -inf [N, G, M] and mean 0 [N, G, M, E].

    Raises:
        ValueError: a size below 0, or 0 for the features; another type; a window that
            `favor_attention` refuses, or one without `key_dim`.
        TypeError: a size or `draw` that is no integer.

    Example:

    >>> from performer import state
    >>> state.empty_state(1, 2, 8, 4).mean.shape
    TensorShape([1, 2, 8, 4])
    """
    dtype = checks.dtype("dtype", dtype, (tf.float32, tf.float64))
    sizes = {"batch": batch, "heads": heads, "features": features, "value_dim": value_dim}
    for name, size in sizes.items():
        checks.size_tensor(name, size, least=int(name == "features"))
    elements = [x for x in sizes.values() if isinstance(x, int)]
    if math.prod(elements) >= 2**63:
        raise ValueError(
            "batch, heads, features and value_dim must have a product below 2**63, "
            f"got {', '.join(map(str, sizes.values()))}"
        )
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
    log_mass = checks.tensor(f"{name}.log_mass", state.log_mass)
    mean = checks.tensor(f"{name}.mean", state.mean)
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
        if x.dtype not in (tf.float32, tf.float64):
            raise TypeError(f"{name}.{field} must be float32 or float64, got {x.dtype.name}")
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
    x = checks.tensor(name, x)
    if not x.dtype.is_integer:
        raise TypeError(f"{name} must be an integer, got {x.dtype.name}")
    if x.shape.rank not in (0, None):
        raise ValueError(f"{name} must be a scalar, got shape {x.shape}")
    return tf.cast(x, tf.int64)


def same_draw(first, second, what: str) -> tf.Tensor:
    """Returns the common draw of two states.

    Args:
        first, second: int64 scalars; `ANY_DRAW` fits every other one.
        what: what they belong to, for the message.

    Raises:
        ValueError: both are known and differ.
        tf.errors.InvalidArgumentError: they differ when the graph runs.
    """
    known = tf.get_static_value(first)
    if known is not None and known == ANY_DRAW:
        return second
    with tf.control_dependencies(_fit(first, second, what)):
        if known is not None:
            return tf.identity(first)
        return tf.where(tf.equal(first, ANY_DRAW), second, first)


def fit_projection(draw, state_draw, what: str) -> tf.Tensor:
    """Returns `draw`, that of a projection, after a check that a state's is the same.

    Arguments and errors as `same_draw`.
    """
    with tf.control_dependencies(_fit(draw, state_draw, what)):
        return tf.identity(draw)


def _fit(first, second, what: str) -> list:
    """Refuses different draws that are known; returns the check of those that are not."""
    message = (
        f"draw: {what} must come from the same draw of the projection (in every call the same "
        "projection or the same pair of projections; or the same explicit `draw`)"
    )
    known = tf.get_static_value(first), tf.get_static_value(second)
    if None not in known:
        if known[0] != known[1] and ANY_DRAW not in known:
            raise ValueError(f"{message}, got {known[0]} and {known[1]}")
        return []
    fits = tf.equal(first, second)
    for draw, value in zip((first, second), known, strict=True):
        if value is None:
            fits |= tf.equal(draw, ANY_DRAW)
        elif value == ANY_DRAW:
            return []
    return checks.when_run(fits, message, first, second)
