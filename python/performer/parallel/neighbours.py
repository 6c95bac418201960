"""What a replica has to know of the parts before its own, besides their keys and values."""

from __future__ import annotations

import tensorflow as tf

from performer.composition.packed_blocks import run_starts
from performer.parallel.collectives import exchange
from performer.parallel.mesh import Mesh


def row_before(x: tf.Tensor, mesh: Mesh) -> tf.Tensor:
    """The last row of the part before, `[B, 1, ...]` of x `[B, L, ...]`; 0 for the first part."""
    carrier = tf.float64 if x.dtype == tf.float64 else tf.float32
    received = exchange([tf.cast(x[:, -1:], carrier)], mesh.group())
    index = mesh.index()
    row = received[max(index - 1, 0)][0]
    # Selected, so that the first replica takes part in the exchange of gradients, too.
    row = tf.where(index > 0, row, tf.zeros_like(row))
    return tf.cast(row, x.dtype)


def rows_before_runs(segment_ids: tf.Tensor, mesh: Mesh) -> tf.Tensor:
    """int64 `[B]`: how many elements the first run of ids `[B, L]` has in earlier parts."""
    ids = tf.cast(segment_ids, tf.int64)
    length = tf.shape(ids, tf.int64)[1]
    starts = run_starts(ids)
    begin = tf.reduce_max(tf.where(starts, tf.range(length), 0), axis=1)  # of the last run
    told = tf.stack([ids[:, 0], ids[:, -1], length - begin, tf.cast(begin == 0, tf.int64)])
    received = exchange([tf.zeros([1], tf.float32), told], mesh.group())
    parts = [given[1] for given in received]
    count, connected = tf.zeros_like(begin), None
    for j in range(mesh.index() - 1, -1, -1):
        on = tf.equal(parts[j][1], parts[j + 1][0])
        connected = on if connected is None else connected & tf.equal(parts[j + 1][3], 1) & on
        count += tf.where(connected, parts[j][2], 0)
    return count
