"""Packed sequences for the plain TensorFlow composition: to a padded batch, and back.

Sequence n of N occupies rows offsets[n] to offsets[n + 1]. Memory of the padded form is N x the
longest sequence.
"""

from __future__ import annotations

import tensorflow as tf


def row_index(offsets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Rows [N, P] of every sequence, padded to the longest P, and whether each is one (bool)."""
    lengths = offsets[1:] - offsets[:-1]
    longest = tf.maximum(tf.reduce_max(lengths), 0)
    steps = tf.range(longest, dtype=offsets.dtype)[None, :]
    valid = steps < lengths[:, None]
    return tf.where(valid, offsets[:-1, None] + steps, 0), valid


def unpack(x: tf.Tensor, rows: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """x [1, S, ...] to [N, P, ...]; padding is 0. `rows` and `valid` come from `row_index`."""
    padded = tf.pad(x[0], [[0, 1]] + [[0, 0]] * (len(x.shape) - 2))  # so that row 0 exists
    taken = tf.gather(padded, rows)
    valid = tf.reshape(
        valid, tf.concat([tf.shape(valid), tf.ones([len(x.shape) - 2], tf.int32)], 0)
    )
    return tf.where(valid, taken, tf.zeros([], x.dtype))


def pack(x: tf.Tensor, offsets: tf.Tensor, length: tf.Tensor | int) -> tf.Tensor:
    """x [N, P, ...] to [1, length, ...], the inverse of `unpack`; rows of no sequence are 0."""
    offsets = tf.cast(offsets, tf.int64)
    row = tf.range(tf.cast(length, tf.int64))
    sequence = tf.searchsorted(offsets[1:], row, side="right", out_type=tf.int64)
    known = (sequence < tf.shape(x, tf.int64)[0]) & (row >= offsets[0])
    sequence = tf.where(known, sequence, 0)
    step = tf.where(known, row - tf.gather(offsets, sequence), 0)
    padded = tf.pad(
        x, [[0, 1], [0, 1]] + [[0, 0]] * (len(x.shape) - 2)
    )  # so that index (0, 0) exists
    taken = tf.gather_nd(padded, tf.stack([sequence, step], -1))
    known = tf.reshape(
        known, tf.concat([tf.shape(known), tf.ones([len(x.shape) - 2], tf.int32)], 0)
    )
    return tf.where(known, taken, tf.zeros([], x.dtype))[None]


def segment_offsets(segment_ids: tf.Tensor, most: int | None = None) -> tf.Tensor:
    """int64 offsets [N + 1] of the runs of equal ids in segment_ids [B, S], rows end to end.

    A run ends where the id changes and at the end of its batch row. N is their number, known only
    when the graph runs. Or N = B most, `most` for each batch row, the last of which are empty;
    where one has more, the offsets do not reach the end (and, but for XLA, an assertion fails).
    """
    starts = tf.concat(
        [
            tf.ones_like(segment_ids[:, :1], tf.bool),
            tf.not_equal(segment_ids[:, 1:], segment_ids[:, :-1]),
        ],
        1,
    )
    if most is None:
        starts = tf.where(tf.reshape(starts, [-1]))[:, 0]
        return tf.concat([starts, [tf.size(segment_ids, tf.int64)]], 0)
    batch = tf.shape(segment_ids)[0]
    run = tf.cumsum(tf.cast(starts, tf.int32), axis=1) - 1
    check = tf.debugging.assert_less(
        run, most, message="max_segments must be at least the runs in a row of segment_ids"
    )
    with tf.control_dependencies([] if check is None else [check]):
        sequence = tf.where(run < most, tf.range(batch)[:, None] * most + run, -1)
        lengths = tf.math.unsorted_segment_sum(
            tf.ones_like(sequence, tf.int64), sequence, batch * most
        )
    return tf.concat([[0], tf.cumsum(lengths)], 0)
