"""Packed sequences for the plain TensorFlow composition: into blocks of equal length, and back.

Sequence n of N occupies rows offsets[n] to offsets[n + 1]. It is divided into packed blocks of C
rows, the last of which is filled up. The number K of blocks follows from shapes alone, because XLA
has to know all shapes: there are as many as there could be. All blocks together have at most the
memory of S + min(N, S) C rows.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class PackedBlocks(NamedTuple):
    """Where the packed blocks lie. Those of one sequence follow each other; unused ones come last.

    Attributes:
        rows: int64 [K, C], the row of each place in a block; S where there is none.
        sequence: int64 [K], the sequence of each block; N for unused ones.
        first: bool [K], whether the block is the first of its sequence.
        last: int64 [N], the last block of each sequence; -1 for empty ones.
        position: int64 [S], the place of each row, counted over [K C]; K C for rows of no sequence.
    """

    rows: tf.Tensor
    sequence: tf.Tensor
    first: tf.Tensor
    last: tf.Tensor
    position: tf.Tensor

    def pack(self, x: tf.Tensor) -> tf.Tensor:
        """x [1, S, ...] to [K, C, ...]; what fills blocks up is 0."""
        return gather_or_zero(x[0], self.rows)

    def unpack(self, x: tf.Tensor, fill: float = 0) -> tf.Tensor:
        """x [K, C, ...] to [1, S, ...], the inverse of `pack`; rows of no sequence are `fill`."""
        flat = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))
        flat = tf.ensure_shape(flat, [None, *x.shape[2:]])
        return gather_or_zero(flat, self.position, fill)[None]

    def of_last_block(self, x: tf.Tensor, otherwise: tf.Tensor) -> tf.Tensor:
        """x [K, ...] to [N, ...], of each sequence's last block; `otherwise` for empty ones."""
        empty = tf.reshape(self.last < 0, [-1] + [1] * (len(x.shape) - 1))
        return tf.where(empty, otherwise, tf.gather(x, tf.maximum(self.last, 0)))


def packed_blocks(offsets: tf.Tensor, length: tf.Tensor | int, size: int) -> PackedBlocks:
    """The blocks of `size` rows C, of sequences with int64 offsets [N + 1] in `length` rows S."""
    starts, ends = offsets[:-1], offsets[1:]
    if isinstance(length, int) and offsets.shape[0] is not None:  # a known K makes smaller programs
        sequences = offsets.shape[0] - 1
        count = max((length + min(sequences, length) * (size - 1)) // size, 1)
    else:
        length = tf.cast(length, tf.int64)
        sequences = tf.size(offsets, tf.int64) - 1
        count = tf.maximum((length + tf.minimum(sequences, length) * (size - 1)) // size, 1)
    until = tf.cumsum(-(-tf.maximum(ends - starts, 0) // size))  # blocks up to each sequence
    before = tf.concat([[0], until], 0)

    block = tf.range(count, dtype=tf.int64)
    sequence = tf.searchsorted(until, block, side="right", out_type=tf.int64)
    number = block - tf.gather(before, sequence)  # of the block in its sequence
    rows = tf.gather(tf.concat([starts, [length]], 0), sequence) + number * size
    rows = rows[:, None] + tf.range(size, dtype=tf.int64)
    rows = tf.where(rows < tf.gather(tf.concat([ends, [0]], 0), sequence)[:, None], rows, length)

    row = tf.range(length, dtype=tf.int64)
    owner = tf.searchsorted(ends, row, side="right", out_type=tf.int64)
    position = tf.gather(before, owner) * size + row - tf.gather(offsets, owner)
    inside = (owner < sequences) & (row >= offsets[0])
    return PackedBlocks(
        rows,
        sequence,
        (sequence < sequences) & (number == 0),
        tf.where(ends > starts, until - 1, -1),
        tf.where(inside, position, count * size),
    )


def gather_or_zero(x: tf.Tensor, index: tf.Tensor, fill: float = 0) -> tf.Tensor:
    """Entries of x [X, ...] along its first axis; 0, or `fill`, where the index is X."""
    padding = [[0, 1]] + [[0, 0]] * (len(x.shape) - 1)
    return tf.gather(tf.pad(x, padding, constant_values=fill), index)


def run_starts(ids: tf.Tensor) -> tf.Tensor:
    """Bool [B, S], whether a run of equal ids [B, S] begins there."""
    changes = tf.not_equal(ids[:, 1:], ids[:, :-1])
    return tf.concat([tf.ones_like(ids[:, :1], tf.bool), changes], 1)


def segment_offsets(segment_ids: tf.Tensor, maximum: int | None = None) -> tf.Tensor:
    """int64 offsets [N + 1] of the runs of equal ids in segment_ids [B, S], rows end to end.

    A run ends where the id changes and at the end of its batch row. N is their number, known only
    when the graph runs. Or N = B maximum, `maximum` for each batch row, the last of
    which are empty. Where a row has more, the offsets do not reach the end, and an assertion fails
    (not under XLA, which has none).
    """
    starts = run_starts(segment_ids)
    if maximum is None:
        starts = tf.where(tf.reshape(starts, [-1]))[:, 0]
        return tf.concat([starts, [tf.size(segment_ids, tf.int64)]], 0)
    batch = tf.shape(segment_ids)[0] if segment_ids.shape[0] is None else segment_ids.shape[0]
    run = tf.cumsum(tf.cast(starts, tf.int32), axis=1) - 1
    check = tf.debugging.assert_less(
        run, maximum, message="max_segments must be at least the runs in a row of segment_ids"
    )
    with tf.control_dependencies([] if check is None else [check]):
        sequence = tf.where(run < maximum, tf.range(batch)[:, None] * maximum + run, -1)
        lengths = tf.math.unsorted_segment_sum(
            tf.ones_like(sequence, tf.int64), sequence, batch * maximum
        )
    return tf.concat([[0], tf.cumsum(lengths)], 0)
