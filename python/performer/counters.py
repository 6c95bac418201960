"""The two counters of a state: the draw of its projection, and its position in the sequence.

Features of different draws have nothing in common.
"""

from __future__ import annotations

import tensorflow as tf


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
