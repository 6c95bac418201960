"""Packed sequences for the plain TensorFlow composition: to pieces of equal length, and back.

Sequence n of N occupies rows offsets[n] to offsets[n + 1]. It is cut into pieces of C rows, the
last of which is filled up. Their number K follows from shapes alone, so that XLA, which has to know
all shapes, can compile it: as many as there could be. Memory of the cut form: at most that of
S + min(N, S) C rows.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class Pieces(NamedTuple):
    """Where the pieces lie. The pieces of one sequence follow each other; unused ones come last."""

    rows: tf.Tensor  # [K, C] row of each position; S where there is none
    sequence: tf.Tensor  # [K] which one each piece is of; N for unused ones
    first: tf.Tensor  # bool [K], whether it is the first of its sequence
    last: tf.Tensor  # [N] the last piece of each sequence; -1 for empty ones
    position: tf.Tensor  # [S] where each row is, counted over [K C]; K C for rows of no sequence


def pieces(offsets: tf.Tensor, length: tf.Tensor | int, size: int) -> Pieces:
    """The pieces, of `size` rows C, of sequences with int64 offsets [N + 1] in `length` rows S."""
    starts, ends = offsets[:-1], offsets[1:]
    if isinstance(length, int) and offsets.shape[0] is not None:  # a known K makes smaller programs
        sequences = offsets.shape[0] - 1
        count = max((length + min(sequences, length) * (size - 1)) // size, 1)
    else:
        length = tf.cast(length, tf.int64)
        sequences = tf.size(offsets, tf.int64) - 1
        count = tf.maximum((length + tf.minimum(sequences, length) * (size - 1)) // size, 1)
    until = tf.cumsum(-(-tf.maximum(ends - starts, 0) // size))  # pieces up to each sequence
    before = tf.concat([[0], until], 0)

    piece = tf.range(count, dtype=tf.int64)
    sequence = tf.searchsorted(until, piece, side="right", out_type=tf.int64)
    number = piece - tf.gather(before, sequence)  # of the piece in its sequence
    rows = tf.gather(tf.concat([starts, [length]], 0), sequence) + number * size
    rows = rows[:, None] + tf.range(size, dtype=tf.int64)
    rows = tf.where(rows < tf.gather(tf.concat([ends, [0]], 0), sequence)[:, None], rows, length)

    row = tf.range(length, dtype=tf.int64)
    owner = tf.searchsorted(ends, row, side="right", out_type=tf.int64)
    position = tf.gather(before, owner) * size + row - tf.gather(offsets, owner)
    inside = (owner < sequences) & (row >= offsets[0])
    return Pieces(
        rows,
        sequence,
        (sequence < sequences) & (number == 0),
        tf.where(ends > starts, until - 1, -1),
        tf.where(inside, position, count * size),
    )


def take(x: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
    """Entries of x [X, ...] along its first axis; 0 where index is X."""
    return tf.gather(tf.pad(x, [[0, 1]] + [[0, 0]] * (len(x.shape) - 1)), index)


def cut(x: tf.Tensor, where: Pieces) -> tf.Tensor:
    """x [1, S, ...] to [K, C, ...]; what fills pieces up is 0."""
    return take(x[0], where.rows)


def lay(x: tf.Tensor, where: Pieces) -> tf.Tensor:
    """x [K, C, ...] to [1, S, ...], the inverse of `cut`; rows of no sequence are 0."""
    flat = tf.reshape(x, tf.concat([[-1], tf.shape(x)[2:]], 0))
    flat = tf.ensure_shape(flat, [None, *x.shape[2:]])
    return take(flat, where.position)[None]


def last_of(x: tf.Tensor, otherwise: tf.Tensor, where: Pieces) -> tf.Tensor:
    """x [K, ...] of each sequence's last piece: [N, ...]; `otherwise` [N, ...] for empty ones."""
    empty = tf.reshape(where.last < 0, [-1] + [1] * (len(x.shape) - 1))
    return tf.where(empty, otherwise, tf.gather(x, tf.maximum(where.last, 0)))


def run_starts(ids: tf.Tensor) -> tf.Tensor:
    """bool [B, S]: where a run of equal ids [B, S] begins."""
    changes = tf.not_equal(ids[:, 1:], ids[:, :-1])
    return tf.concat([tf.ones_like(ids[:, :1], tf.bool), changes], 1)


def segment_offsets(segment_ids: tf.Tensor, most: int | None = None) -> tf.Tensor:
    """int64 offsets [N + 1] of the runs of equal ids in segment_ids [B, S], rows end to end.

    A run ends where the id changes and at the end of its batch row. N is their number, known only
    when the graph runs. Or N = B most, `most` for each batch row, the last of which are empty;
    where one has more, the offsets do not reach the end (and, but for XLA, an assertion fails).
    """
    starts = run_starts(segment_ids)
    if most is None:
        starts = tf.where(tf.reshape(starts, [-1]))[:, 0]
        return tf.concat([starts, [tf.size(segment_ids, tf.int64)]], 0)
    batch = tf.shape(segment_ids)[0] if segment_ids.shape[0] is None else segment_ids.shape[0]
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
