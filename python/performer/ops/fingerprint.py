"""The number that tells one projection from another."""

from __future__ import annotations

import contextlib

import numpy as np
import tensorflow as tf

from performer import checks

# Odd factors with bits all over: multiples of 2**64 over the golden ratio, and of its powers.
_INDEX, _FIRST, _SECOND, _PAIR = (
    int(np.uint64(x).astype(np.int64))
    for x in (
        0x9E3779B97F4A7C15,
        0xBF58476D1CE4E5B9,
        0x94D049BB133111EB,
        0xD6E8FEB86659FD93,
    )
)


@tf.autograph.experimental.do_not_convert
def fingerprint(projection) -> tf.Tensor:
    """A number that identifies a projection: what `AttentionState.draw` holds by default.

    States are sums over random features, and mean something only together with the projection that
    made the features. This number is computed from all bits of the projection, so that two
    projections have the same one only by a chance of 2**-63.

    Args:
        projection: as in `favor_attention`: [M, D], [H, M, D], or a tuple of two, query side and
            key side. A pair of equal sides has the number of one side; a pair of different ones
            depends on both, because a state is read right only with the query side that belongs to
            it.

    Returns:
        int64 scalar, odd; the same eagerly, in graphs and under XLA. A float32 projection has the
        number of the same values in float64. Where the values are known (always in eager calls) it
        is a constant. Otherwise it is computed in the graph that the projection belongs to: a loop
        around which a projection stays the same has one number for all of its steps.

    Raises:
        ValueError, TypeError: as `favor_attention`.

    Example:

    >>> from performer import ops, orthogonal_projection
    >>> w, other = (orthogonal_projection(16, 4, seed=seed) for seed in (1, 2))
    >>> bool(ops.fingerprint(w) == ops.fingerprint((w, w)))
    True
    >>> bool(ops.fingerprint(w) == ops.fingerprint(other))
    False
    """
    sides = projection if isinstance(projection, tuple) else (projection,)
    names = ("projection",) if len(sides) == 1 else ("projection[0]", "projection[1]")
    if len(sides) > 2:
        raise ValueError(
            "projection must be one tensor, or a pair of them (query side, key side), "
            f"got a tuple of {len(sides)}"
        )
    tensors = []
    for name, side in zip(names, sides, strict=True):
        side = checked_side(name, side)
        if not side.dtype.is_floating:
            raise TypeError(f"{name} must be floating, got {side.dtype.name}")
        tensors.append(side)
    return fingerprint_of_sides(*tensors)


def checked_side(name: str, side, dtype: tf.DType | None = None) -> tf.Tensor:
    """One side of a projection as `fingerprint_of_sides` takes it: `checks.tensor`.

    A tensor with values stays one: as an input of a graph that is being built it would have none.
    """
    has_values = isinstance(side, tf.Tensor) and not tf.is_symbolic_tensor(side)
    with tf.init_scope() if has_values else contextlib.nullcontext():
        return checks.tensor(name, side, ("MD", "HMD"), dtype)


def fingerprint_of_sides(query_side: tf.Tensor, key_side: tf.Tensor | None = None) -> tf.Tensor:
    """`fingerprint` of tensors that were checked; one of them stands for both sides."""
    key_side = query_side if key_side is None else key_side
    numbers = [_of_side(key_side)]
    if query_side is not key_side:
        numbers.append(_of_side(query_side))
    known = [tf.get_static_value(number) for number in numbers]
    if any(number is None for number in known):
        with _where_all_are(*numbers):
            return _of_pair(*numbers)
    with np.errstate(over="ignore"):
        return tf.constant(_of_pair(*map(np.int64, known)), tf.int64)


def _of_pair(key_side, query_side=None):
    return key_side if query_side is None else key_side + _PAIR * (query_side - key_side)


def _of_side(projection: tf.Tensor) -> tf.Tensor:
    """The number of one side: a sum over its entries of a hash of value and place."""
    known = tf.get_static_value(projection)
    if known is not None:
        # float64: that of float32 and of float64 projections is the same.
        bits = np.ascontiguousarray(known, np.float64).reshape(-1).view(np.int64)
        with np.errstate(over="ignore"):
            hashed = _hash(
                bits, np.arange(bits.size, dtype=np.int64), np.right_shift, np.bitwise_xor
            )
            return tf.constant(np.sum(hashed, dtype=np.int64) | np.int64(1), tf.int64)
    with _where_all_are(projection):
        bits = tf.bitcast(tf.reshape(tf.cast(projection, tf.float64), [-1]), tf.int64)
        places = tf.range(tf.size(bits, tf.int64), dtype=tf.int64)
        hashed = _hash(bits, places, tf.bitwise.right_shift, tf.bitwise.bitwise_xor)
        return tf.bitwise.bitwise_or(tf.reduce_sum(hashed), tf.ones([], tf.int64))


def _where_all_are(*tensors):
    """A context in which operations join the graph of `tensors`, if that is the same for all.

    A tensor from outside of a loop is not one of the loop's graph until an operation there takes
    it.
    """
    graphs = {id(x.graph): x.graph for x in tensors if tf.is_symbolic_tensor(x)}
    if len(graphs) != 1:
        return contextlib.nullcontext()
    return next(iter(graphs.values())).as_default()


def _hash(bits, places, right_shift, xor):
    """int64 of int64, products and sums modulo 2**64."""
    x = (bits + _INDEX * (places + 1)) * _FIRST
    x = xor(x, right_shift(x, 29))
    x = x * _SECOND
    return xor(x, right_shift(x, 32))
