"""Attention over any axes, as attention over one axis.

A projected input is `[B, d1, ..., dn, H, D]`. `fold` joins the attention axes among `d1 ... dn` to
one sequence axis and all others to the batch: `[B', L, H, D]`. `unfold` restores the layout. Both
are reshapes, with a transposition only where an attention axis stands before another axis.
"""

import math
import operator
from collections.abc import Sequence

import tensorflow as tf

from performer.shapes import dims


def resolve_axes(attention_axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Attention axes of an input of rank `rank` (batch and channels included), non-negative.

    Args:
        attention_axes: axes, negative ones counted from the end of the input; `None` means all
            but the first (batch) and the last (channels). Their order is the order of the
            sequence: with `(2, 1)`, axis 1 varies fastest.
        rank: rank of the layer's input, at least 3.

    Raises:
        ValueError: no axis, an axis twice, the batch or channel axis, an axis beyond the rank, or
            one that is no integer.
    """
    if rank < 3:
        raise ValueError(
            "The inputs need at least three axes (batch, sequence, channels). "
            f"Received an input of rank {rank}"
        )
    if attention_axes is None:
        return tuple(range(1, rank - 1))
    axes = tuple(
        operator.index(axis) + rank * (axis < 0) if hasattr(axis, "__index__") else 0
        for axis in attention_axes
    )
    if not axes or len(set(axes)) < len(axes) or not all(0 < axis < rank - 1 for axis in axes):
        raise ValueError(
            "`attention_axes` must name at least one axis, none of them twice, between the batch "
            f"axis 0 and the channel axis {rank - 1}, for an input of rank {rank}. "
            f"Received: attention_axes={tuple(attention_axes)}"
        )
    return axes


def fold(x: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """`[B, d1, ..., dn, H, D]` to `[B', L, H, D]`, L the product of the attention axes.

    Args:
        x: projected input of known rank.
        axes: attention axes as `resolve_axes` returns them.

    Returns:
        A tensor of the same dtype; `x` itself where it already has this layout.

    Example:

    >>> import tensorflow as tf
    >>> from performer.layers._axes import fold
    >>> fold(tf.zeros([2, 5, 3, 4, 8, 16]), (2, 3)).shape
    TensorShape([10, 12, 8, 16])
    """
    if len(x.shape) == 4:
        return x
    order = _batch_axes_first(len(x.shape), axes)
    sizes = [dims(x)[axis] for axis in order]
    split = len(order) - len(axes) - 2
    folded = [math.prod(sizes[:split]), math.prod(sizes[split:-2]), *sizes[-2:]]
    return tf.reshape(_transpose(x, order), folded)


def unfold(x: tf.Tensor, axes: tuple[int, ...], like: tf.Tensor) -> tf.Tensor:
    """`[B', L, H, E]` to `[B, d1, ..., dn, H, E]`: the inverse of `fold`.

    Args:
        x: folded tensor.
        axes: the axes that `fold` was given.
        like: tensor `[B, d1, ..., dn, channels]`, of which all sizes but the last count.
    """
    rank = len(like.shape) + 1
    if rank == 4:
        return x
    order = _batch_axes_first(rank, axes)
    sizes = dims(like)
    unfolded = [sizes[axis] for axis in order[:-2]] + dims(x)[-2:]
    inverse = [order.index(axis) for axis in range(rank)]
    return _transpose(tf.reshape(x, unfolded), inverse)


def _batch_axes_first(rank: int, axes: tuple[int, ...]) -> list[int]:
    """Order of a projected tensor's axes: batch, other axes, attention axes, H, D."""
    others = [axis for axis in range(1, rank - 2) if axis not in axes]
    return [0, *others, *axes, rank - 2, rank - 1]


def _transpose(x: tf.Tensor, order: list[int]) -> tf.Tensor:
    return x if order == sorted(order) else tf.transpose(x, order)
