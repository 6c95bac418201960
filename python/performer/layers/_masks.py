"""Keras masks, brought to the forms that attention can apply.

A mask that says which keys exist acts on the features of the keys, in the denominator too; a mask
of the queries acts on the output. Both come here in the layout of projected inputs.
"""

import tensorflow as tf

from performer.layers._axes import fold
from performer.shapes import dims


def mask_of(x):
    """The mask that Keras attached to `x`, or None."""
    return getattr(x, "_keras_mask", None)


def fold_mask(name: str, mask: tf.Tensor, like: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """A padding mask in the layout that `axes.fold` gives to `like`.

    Args:
        name: the argument's name, for messages.
        mask: boolean or number (true where not 0), of shape `[B, d1, ..., dn]` or
            `[B, <attention axes>]`; a batch of 1 is broadcast.
        like: projected tensor `[B, d1, ..., dn, H, D]` that the mask belongs to.
        axes: attention axes.

    Returns:
        bool `[B', S]`.

    Raises:
        ValueError: a mask of another rank, shape or type.
    """
    mask = tf.convert_to_tensor(mask)
    dtype = mask.dtype
    if not (dtype.is_bool or dtype.is_integer or dtype.is_floating):
        raise ValueError(f"`{name}` must be boolean. Received: {name}.dtype={dtype.name}")
    return _fold_positions(name, tf.cast(mask, tf.bool), like, axes)


def fold_ids(name: str, ids: tf.Tensor, like: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """Integers for every position, in the layout that `axes.fold` gives to `like`.

    Args:
        ids: integers of a shape that `fold_mask` allows; others as there.

    Returns:
        Integers `[B', S]`.

    Raises:
        ValueError: ids of another rank, shape or type.
    """
    ids = tf.convert_to_tensor(ids)
    if not ids.dtype.is_integer:
        raise ValueError(f"`{name}` must be integers. Received: {name}.dtype={ids.dtype.name}")
    return _fold_positions(name, ids, like, axes)


def _fold_positions(name, x, like, axes):
    rank = len(like.shape) - 2
    if len(x.shape) == rank:
        expanded = x
    elif len(x.shape) == 1 + len(axes):
        by_position = sorted(range(len(axes)), key=axes.__getitem__)
        expanded = tf.transpose(x, [0, *(1 + i for i in by_position)])
        for axis in range(1, rank):
            if axis not in axes:
                expanded = tf.expand_dims(expanded, axis)
    else:
        raise ValueError(
            f"`{name}` must have shape (batch, <all axes but the channels>) or (batch, <attention "
            f"axes>), that is rank {rank} or {1 + len(axes)}. "
            f"Received: {name}.shape={tuple(x.shape)}"
        )
    for axis in range(rank):
        size, expected = expanded.shape[axis], like.shape[axis]
        may_broadcast = axis == 0 or (axis not in axes and len(x.shape) != rank)
        if None not in (size, expected) and size != expected and not (size == 1 and may_broadcast):
            raise ValueError(
                f"`{name}` must agree with the tensor that it belongs to, of shape "
                f"{tuple(like.shape[:-2])} without channels. "
                f"Received: {name}.shape={tuple(x.shape)}"
            )
    expanded = tf.broadcast_to(expanded, tf.stack(dims(like)[:-2]))
    return fold(expanded[..., tf.newaxis, tf.newaxis], axes)[:, :, 0, 0]


def resize(x: tf.Tensor, length) -> tf.Tensor:
    """`[B, S, ...]` to `[B, length, ...]`: cut at the end, or filled with 0 (False).

    In causal attention of `length` queries the keys after the last query are seen by nobody, and
    masked keys may fill the places where there are none.
    """
    if x.shape[1] is not None and x.shape[1] == length:
        return x
    x = x[:, :length]
    missing = length - tf.shape(x)[1]
    x = tf.pad(x, [[0, 0], [0, missing]] + [[0, 0]] * (len(x.shape) - 2))
    return tf.ensure_shape(
        x, [x.shape[0], length if isinstance(length, int) else None, *x.shape[2:]]
    )


def keys_of_attention_mask(mask: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """An `attention_mask` that is the same for every query and head, as a mask of keys.

    `[B, 1, S]`, `[1, S]` or `[B, 1, 1, S]` (with as many 1s and sizes as there are attention axes)
    to `[B, S]`, S by attention axis.
    """
    mask = tf.convert_to_tensor(mask)
    count = len(axes)
    sizes = dims(mask)
    batch = sizes[0] if len(sizes) > 2 * count else 1
    return tf.reshape(mask, tf.stack([batch, *sizes[-count:]]))


def combine(masks: list[tf.Tensor]) -> tf.Tensor | None:
    """Logical and of bool tensors of one shape; None for no mask at all."""
    result = None
    for mask in masks:
        result = mask if result is None else tf.logical_and(result, mask)
    return result
