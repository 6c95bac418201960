"""The masks of a call: their rules, and their layout for attention over one axis.

A mask that says which keys exist acts on the features of the keys, and so on the denominator too;
a mask of the queries acts on the output.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from performer import checks
from performer.layers._axes import fold, resolve_axes
from performer.shapes import dims


class FoldedMasks(NamedTuple):
    """Masks in the layout that `fold` gives to queries `[B', T, H, D]` and keys `[B', S, G, D]`.

    Attributes:
        queries: bool `[B', T]`, False where there is no query; None: all exist.
        keys: bool `[B', S]`, False where there is no key; None: all exist.
        prefix: bool `[B', S]`, True for keys that the causal mask does not hide; None: no key.
        segment_ids: integers `[B', S]`, equal ids in a run are one sequence; None: one sequence.
        causal: whether a query attends only to its own and earlier positions.
    """

    queries: tf.Tensor | None = None
    keys: tf.Tensor | None = None
    prefix: tf.Tensor | None = None
    segment_ids: tf.Tensor | None = None
    causal: bool = False


@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks of one call; a field is an argument of `Performer.call`, None or False if unset.

    A query attends to a key if all of them allow the pair. Everything but a general
    `attention_mask` acts on whole keys, whole queries or the order of the sequence, and stays
    linear.
    """

    query_mask: Any = None
    value_mask: Any = None
    key_mask: Any = None
    attention_mask: Any = None
    use_causal_mask: bool = False
    segment_ids: Any = None
    prefix_mask: Any = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "use_causal_mask" or value is None:
                continue
            if isinstance(value, keras.KerasTensor):  # a symbolic call
                continue
            # Frozen to all but this: from here on masks are tensors.
            object.__setattr__(self, field.name, checks.tensor(f"`{field.name}`", value))

    def check(self, query_shape, value_shape, attention_axes, key_shape=None):
        """Refuses what no form of attention can compute, from static shapes alone.

        Args:
            query_shape, value_shape, key_shape: shapes of the layer's inputs, channels included.
            attention_axes: the layer's argument.

        Returns:
            The attention axes, as `resolve_axes` returns them.

        Raises:
            ValueError: see the conditions.
        """
        rank = len(value_shape)
        shapes = f"query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}"
        if len(query_shape) != rank:
            raise ValueError(f"`query` and `value` must have the same rank. Received: {shapes}")
        axes = resolve_axes(attention_axes, rank)
        if key_shape is not None and not tf.TensorShape(key_shape[:-1]).is_compatible_with(
            value_shape[:-1]
        ):
            raise ValueError(
                "`key` must have the shape of `value`, channels excepted. "
                f"Received: key.shape={tuple(key_shape)}, value.shape={tuple(value_shape)}"
            )
        for axis in range(rank - 1):
            sizes = query_shape[axis], value_shape[axis]
            if None in sizes or sizes[0] == sizes[1]:
                continue
            if axis not in axes:
                raise ValueError(
                    f"`query` and `value` must agree on axis {axis}, over which there is no "
                    f"attention. Received: {shapes}"
                )
            for name in ("segment_ids", "prefix_mask"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` needs a query and a value of the same length. Received: {shapes}"
                    )
            if self.use_causal_mask and len(axes) > 1:
                raise ValueError(
                    "`use_causal_mask` over several axes needs a query and a value of the same "
                    f"sizes. Received: {shapes}"
                )
        if self.prefix_mask is not None and not self.use_causal_mask:
            raise ValueError(
                "`prefix_mask` lifts the causal mask for some keys, and needs it. "
                f"Received: use_causal_mask={self.use_causal_mask!r}"
            )
        if self.prefix_mask is not None and self.segment_ids is not None:
            raise ValueError(
                "`prefix_mask` must be None with `segment_ids`: a prefix to which all sequences of "
                "a row attend would join them. Received both"
            )
        if self.attention_mask is not None and len(self.attention_mask.shape) < 2 * len(axes):
            raise ValueError(
                "`attention_mask` must have shape (batch, <query axes>, <key axes>), batch and "
                f"heads optional, that is a rank of at least {2 * len(axes)}. "
                f"Received: attention_mask.shape={tuple(self.attention_mask.shape)}"
            )
        return axes

    def is_general(self, axes):
        """Whether `attention_mask` differs from query to query or from head to head."""
        if self.attention_mask is None:
            return False
        shape, count = tuple(self.attention_mask.shape), len(axes)
        return any(size != 1 for size in (*shape[1 : -2 * count], *shape[-2 * count : -count]))

    def check_when_run(self, query, value, key, axes):
        """`check`, for sizes that only a running graph knows, where no operator would see it.

        Operators get axes that are joined, and causal calls keys cut to the length of the queries.

        Returns:
            What must run before the tensors are used, for `tf.control_dependencies`.
        """
        found = []
        packed = self.segment_ids is not None or self.prefix_mask is not None
        joined = len(value.shape) > 3
        for axis in range(1, len(value.shape) - 1):
            if joined:
                found += checks.same_when_run("key", axis, key, "value", axis, value, "size")
            causal = self.use_causal_mask and len(axes) > 1
            if packed or axis not in axes or causal:
                found += checks.same_when_run("query", axis, query, "value", axis, value, "size")
        if joined:
            found += checks.same_when_run("query", 0, query, "value", 0, value, "B")
            found += checks.same_when_run("key", 0, key, "value", 0, value, "B")
        return found

    def fold(self, query, key, axes):
        """All masks but a general `attention_mask`, as `FoldedMasks`.

        Args:
            query, key: the layer's inputs `[B, d1, ..., dn, channels]`.
            axes: attention axes, as `resolve_axes` returns them.
        """
        prefix, segment_ids = self.prefix_mask, self.segment_ids
        return FoldedMasks(
            queries=self.fold_queries(query, axes),
            keys=self.fold_keys(key, axes),
            prefix=None if prefix is None else fold_mask("prefix_mask", prefix, key, axes),
            segment_ids=None if segment_ids is None else fold_segments(segment_ids, key, axes),
            causal=self.use_causal_mask,
        )

    def fold_queries(self, query, axes):
        """Bool `[B', T]`, which queries exist; None without `query_mask`. Arguments as `fold`."""
        mask = self.query_mask
        return None if mask is None else fold_mask("query_mask", mask, query, axes)

    def fold_keys(self, key, axes):
        """Bool `[B', S]`, which keys exist; None if no mask says so. Arguments as `fold`."""
        given = {"value_mask": self.value_mask, "key_mask": self.key_mask}
        if self.attention_mask is not None and not self.is_general(axes):
            given["attention_mask"] = _keys_of_attention_mask(self.attention_mask, axes)
        return combine(
            [fold_mask(name, mask, key, axes) for name, mask in given.items() if mask is not None]
        )


def mask_of(x):
    """The mask that Keras attached to `x`, or None."""
    return getattr(x, "_keras_mask", None)


def fold_mask(name, mask, like, axes):
    """A padding mask in the layout that `fold` gives to projected `like`.

    Args:
        name: the argument's name, for messages.
        mask: boolean or number (true where not 0), of shape `[B, d1, ..., dn]` or
            `[B, <attention axes>]`; a batch of 1 is broadcast.
        like: tensor `[B, d1, ..., dn, channels]` whose positions are masked.
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


def fold_segments(segment_ids, like, axes):
    """`segment_ids`, integers of a shape that `fold_mask` allows, as integers `[B', S]`.

    Raises:
        ValueError: ids of another rank, shape or type.
    """
    ids = tf.convert_to_tensor(segment_ids)
    if not ids.dtype.is_integer:
        raise ValueError(
            f"`segment_ids` must be integers. Received: segment_ids.dtype={ids.dtype.name}"
        )
    return _fold_positions("segment_ids", ids, like, axes)


def _fold_positions(name, x, like, axes):
    """One number for each position of `like`, folded; see `fold_mask`."""
    rank = len(like.shape) - 1
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
                f"{tuple(like.shape[:-1])} without channels. "
                f"Received: {name}.shape={tuple(x.shape)}"
            )
    found = []
    for axis in range(1, rank):
        if axis in axes or len(x.shape) == rank:
            found += checks.same_when_run(name, axis, expanded, "its tensor", axis, like, "size")
    found += checks.one_of_when_run(name, 0, expanded, {"1": 1, "B": dims(like)[0]})
    with tf.control_dependencies(found):
        expanded = tf.broadcast_to(expanded, tf.stack(dims(like)[:-1]))
    return fold(expanded[..., tf.newaxis, tf.newaxis], axes)[:, :, 0, 0]


def _keys_of_attention_mask(mask, axes):
    """An `attention_mask` that is the same for every query and head, as a mask of keys.

    `[B, 1, S]`, `[1, S]` or `[B, 1, 1, S]` (with as many 1s and sizes as there are attention axes)
    to `[B, S]`, S by attention axis.
    """
    mask = tf.convert_to_tensor(mask)
    count = len(axes)
    sizes = dims(mask)
    batch = sizes[0] if len(sizes) > 2 * count else 1
    return tf.reshape(mask, tf.stack([batch, *sizes[-count:]]))


def combine(masks):
    """Logical and of a list of bool tensors that broadcast; None for an empty list."""
    result = None
    for mask in masks:
        result = mask if result is None else tf.logical_and(result, mask)
    return result
