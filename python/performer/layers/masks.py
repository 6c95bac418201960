"""Keras masks, brought to the two forms that linear attention can apply.

A mask that says which keys exist acts on the features of the keys, in the denominator too; a mask
of the queries acts on the output. A mask that differs from query to query (other than causally)
would need the `[T, S]` scores that linear attention never forms.
"""

import tensorflow as tf

from performer.layers.axes import dimensions, fold


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
    rank = len(like.shape) - 2
    dtype = mask.dtype
    if not (dtype.is_bool or dtype.is_integer or dtype.is_floating):
        raise ValueError(f"`{name}` must be boolean. Received: {name}.dtype={dtype.name}")
    mask = tf.cast(mask, tf.bool)
    if len(mask.shape) == rank:
        expanded = mask
    elif len(mask.shape) == 1 + len(axes):
        by_position = sorted(range(len(axes)), key=axes.__getitem__)
        expanded = tf.transpose(mask, [0, *(1 + i for i in by_position)])
        for axis in range(1, rank):
            if axis not in axes:
                expanded = tf.expand_dims(expanded, axis)
    else:
        raise ValueError(
            f"`{name}` must have shape (batch, <all axes but the channels>) or (batch, <attention "
            f"axes>), that is rank {rank} or {1 + len(axes)}. "
            f"Received: {name}.shape={tuple(mask.shape)}"
        )
    for axis in range(rank):
        size, expected = expanded.shape[axis], like.shape[axis]
        may_broadcast = axis == 0 or (axis not in axes and len(mask.shape) != rank)
        if None not in (size, expected) and size != expected and not (size == 1 and may_broadcast):
            raise ValueError(
                f"`{name}` must agree with the tensor that it masks, of shape "
                f"{tuple(like.shape[:-2])} without channels. "
                f"Received: {name}.shape={tuple(mask.shape)}"
            )
    expanded = tf.broadcast_to(expanded, tf.stack(dimensions(like)[:-2]))
    return fold(expanded[..., tf.newaxis, tf.newaxis], axes)[:, :, 0, 0]


def check_attention_mask(shape: tuple[int | None, ...], axes: tuple[int, ...]) -> None:
    """Refuses an `attention_mask` that is not the same for every query.

    Raises:
        ValueError: unless the shape is `[B, 1, S]`, `[1, S]` or `[B, 1, 1, S]` (with as many 1s
            and sizes as there are attention axes).
    """
    count = len(axes)
    ones = shape[len(shape) - 2 * count : len(shape) - count]
    head = shape[1 : -2 * count]
    if not 2 * count <= len(shape) <= 2 * count + 2 or any(size != 1 for size in (*ones, *head)):
        raise ValueError(
            "`attention_mask` must be the same for every query, of shape (batch, 1, keys), with "
            "attention_method='linear': a mask for every pair of query and key does not factor "
            "into masks of the features. Use `use_causal_mask`, `query_mask`, `value_mask` or "
            "`key_mask`, or attention_method='quadratic'. "
            f"Received: attention_mask.shape={tuple(shape)}"
        )


def keys_of_attention_mask(mask: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """`[B, 1, S]` (or as `check_attention_mask` allows) to `[B, S]`, S by attention axis."""
    count = len(axes)
    sizes = dimensions(mask)
    batch = sizes[0] if len(sizes) > 2 * count else 1
    return tf.reshape(mask, tf.stack([batch, *sizes[-count:]]))


def combine(masks: list[tf.Tensor]) -> tf.Tensor | None:
    """Logical and of bool tensors of one shape; None for no mask at all."""
    result = None
    for mask in masks:
        result = mask if result is None else tf.logical_and(result, mask)
    return result
