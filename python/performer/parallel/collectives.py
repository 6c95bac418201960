"""Exchange between the replicas of a group: a gather, and its transpose, which is its gradient.

Both are TensorFlow's own collective operations, those that `tf.distribute` runs: between devices of
one process, and over the network between the workers of a cluster.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from performer.shapes import dims


class Group(NamedTuple):
    """The replicas that share a sequence, as one of them sees them.

    Attributes:
        size: P, how many there are.
        place: which of them this one is, 0 to P - 1.
        key: integer that identifies the group in all processes.
        token: resource on the replica's device, which orders its collectives and places them.
        timeout: seconds after which a collective gives up; 0 for never.
    """

    size: int
    place: int
    key: int
    token: tf.Tensor
    timeout: float


def exchange(parts: list[tf.Tensor], group: Group) -> list[list[tf.Tensor]]:
    """Gives every replica the `parts` of all, in one collective; differentiable to any order.

    Args:
        parts: tensors of the same shapes and types on all replicas; the first is float32 or
            float64, the type in which floating ones travel. Integers arrive bit by bit.
        group: the replicas.

    Returns:
        One list of parts for each replica of the group, by index.
    """
    carrier = parts[0].dtype
    packed = [_packed(x, carrier) for x in parts]
    sizes = [tf.size(x) for x in packed]
    gathered = gather(tf.concat(packed, 0), group)
    return [
        [_unpacked(flat, x) for flat, x in zip(tf.split(row, sizes), parts, strict=True)]
        for row in tf.unstack(gathered, group.size)
    ]


def gather(x: tf.Tensor, group: Group) -> tf.Tensor:
    """[...] of every replica of the group: [P, ...]."""

    @tf.custom_gradient
    def run(x):
        return _all_gather(x, group), lambda upstream: sum_of_own(upstream, group)

    return run(x)


def sum_of_own(x: tf.Tensor, group: Group) -> tf.Tensor:
    """The sum over the group, in its order, of what each replica's [P, ...] has for this one."""

    @tf.custom_gradient
    def run(x):
        received = tf.unstack(_all_to_all(x, group), group.size)
        total = received[0]
        for part in received[1:]:
            total += part
        return total, lambda upstream: gather(upstream, group)

    return run(x)


def _all_gather(x, group):
    out = tf.raw_ops.CollectiveGatherV2(input=x[tf.newaxis], **_arguments(x, group, kind=0))
    return tf.ensure_shape(out, [group.size, *x.shape])


def _all_to_all(x, group):
    out = tf.raw_ops.CollectiveAllToAllV2(input=x, **_arguments(x, group, kind=1))
    return tf.ensure_shape(out, x.shape)


def _arguments(x, group, kind):
    """What a collective of `x` is given besides.

    The instance key is that of its kind, type and size, because TensorFlow remembers the size of an
    instance. The token keeps the collectives of a replica in order, so that no two that share a key
    are under way at the same time, and no process has to count them.
    """
    size = tf.cast(tf.size(x, tf.int64) % 2**28, tf.int32)
    return {
        "group_size": group.size,
        "group_key": group.key,
        "instance_key": size * 4 + 2 * int(x.dtype == tf.float64) + kind,
        "ordering_token": [group.token],
        "communication_hint": "auto",
        "timeout_seconds": group.timeout,
    }


def _packed(x, carrier):
    """A tensor as a vector of the type in which it travels."""
    if x.dtype.is_floating:
        return tf.reshape(tf.cast(x, carrier), [-1])
    return tf.reshape(tf.bitcast(tf.cast(x, tf.int64), carrier), [-1])


def _unpacked(flat, like):
    """The inverse of `_packed`, with the shape and type of `like`."""
    if like.dtype.is_floating:
        return tf.cast(tf.reshape(flat, dims(like)), like.dtype)
    # int64 travels as two float32, or as one float64; no other integers are sent.
    flat = tf.stop_gradient(flat)
    if flat.dtype == tf.float32:
        flat = tf.reshape(flat, [-1, 2])
    return tf.reshape(tf.bitcast(flat, tf.int64), dims(like))
