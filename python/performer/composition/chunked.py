"""Attention on log-features, in chunks: the core of the plain TensorFlow composition.

Letters: B batch, G key/value heads, R query heads of each, L rows, S keys, M features, E value dim,
X any leading axes. `a` holds the log-features of queries, `b` those of keys (-inf: masked), and `v`
the values (0 where masked).

Causal attention keeps no [L, M, E]. Chunks of 64 rows are joined by a scan over their states.
Inside a chunk, the second half of every block of 2, 4, ..., 64 rows reads the first half. So a row
meets earlier keys only, and every sum is scaled by its own largest term. The future cannot change a
bit of the past, and no spread of keys can overflow.
"""

from __future__ import annotations

import operator

import tensorflow as tf

from performer.composition import logsumexp
from performer.shapes import dims

_CHUNK = 64  # rows between two states of the causal scan, a power of two
_UNROLLED = 4  # as many chunks need no loop, which, with its gradients, takes seconds to compile
_DIRECT = 8  # smaller blocks form all their weights: cheaper than a state of each


def chunk_rows(length) -> int:
    """Rows of a chunk, a power of two, where there are `length` rows altogether."""
    if isinstance(length, int):
        return min(_CHUNK, 1 << max(length - 1, 0).bit_length())
    return _CHUNK


def state_of_keys(b: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """b [X, S, M] and v [X, S, E] to log_mass [X, M] and mean [X, M, E]."""
    return logsumexp.average(tf.linalg.matrix_transpose(b), v)


def attend_to_state(a: tf.Tensor, log_mass: tf.Tensor, mean: tf.Tensor):
    """a [X, L, M] and a state to the log weight of what is seen [X, L], its average [X, L, E]."""
    return logsumexp.average(a + log_mass[..., None, :], mean)


def _attend_to_keys(a, b, v):
    """As `attend_to_state`, weight by weight: a [X, L, M], b [X, S, M], v [X, S, E]."""
    return logsumexp.average(logsumexp.logsumexp(a[..., :, None, :] + b[..., None, :, :], -1), v)


def _within(a, b, v, size):
    """Causal attention inside blocks of `size` rows (a divisor of L).

    a [X, L, R, M], b [X, L, M], v [X, L, E] to log weights [X, L, R] and averages [X, L, R, E].
    """
    groups, rows, repeats, features = dims(a)

    def halves(x, block):  # [X, L, ...] to two of [X, L / (2 block), block, ...]
        shape = [groups, rows // (2 * block), 2, block, *dims(x)[2:]]
        return tf.unstack(tf.reshape(x, shape), axis=2)

    def join(first, second):  # and back
        return tf.reshape(tf.stack([first, second], 2), [groups, rows, *dims(first)[3:]])

    weight = logsumexp.logsumexp(a + b[:, :, None], -1)  # each row sees its own key,
    out = tf.repeat(v[:, :, None], repeats, 2)
    block = 1
    while block < size:  # and the rows of every second block see the block before
        outer = [groups, rows // (2 * block)]
        queries = tf.reshape(halves(a, block)[1], [*outer, block * repeats, features])
        keys, values = halves(b, block)[0], halves(v, block)[0]
        if block < _DIRECT:
            more_weight, more = _attend_to_keys(queries, keys, values)
        else:
            more_weight, more = attend_to_state(queries, *state_of_keys(keys, values))
        more_weight = tf.reshape(more_weight, [*outer, block, repeats])
        more = tf.reshape(more, [*outer, block, repeats, dims(v)[-1]])
        (weight, seen_weight), (out, seen) = halves(weight, block), halves(out, block)
        seen_weight, seen = logsumexp.merge(seen_weight, seen, more_weight, more)
        weight, out = join(weight, seen_weight), join(out, seen)
        block *= 2
    return weight, out


def carried(ends, initial, starts=None, first=None):
    """States after each of K chunks.

    Args:
        ends: log_mass [K, ...] and mean [K, ..., E] of the keys of each chunk.
        initial: the state before chunk 0, without K.
        starts, first: states as `ends`, and bool [K]: where `first`, the chunk follows the state of
            `starts` instead of the chunk before.
    """

    def step(past, new):
        (log_mass, mean), *begun = new
        for start, begins in [begun] if begun else []:
            past = [tf.where(begins, x, y) for x, y in zip(start, past, strict=True)]
        return logsumexp.merge(past[0], past[1], log_mass, mean)

    chunks: list = [tuple(ends)] if starts is None else [tuple(ends), tuple(starts), first]
    count = ends[0].shape[0]
    if count is not None and 0 < count <= _UNROLLED:
        after = [tuple(initial)]
        for i in range(count):
            after.append(step(after[-1], tf.nest.map_structure(operator.itemgetter(i), chunks)))
        return [tf.stack(x) for x in zip(*after[1:], strict=True)]
    return tf.scan(step, chunks, tuple(initial))


def _before(after, initial):
    """States before each chunk, from those after it."""
    return [tf.concat([x[None], y[:-1]], 0) for x, y in zip(initial, after, strict=True)]


def _attend_in_chunks(a, b, v, log_mass, mean):
    """Causal attention inside each of X chunks, and to the state before it.

    a [X, C, R, M], b [X, C, M], v [X, C, E], state [X, M], [X, M, E] to log weights [X, C, R] and
    averages [X, C, R, E].
    """
    chunks, size, repeats, features = dims(a)
    queries = tf.reshape(a, [chunks, size * repeats, features])
    past_weight, past = attend_to_state(queries, log_mass, mean)
    past_weight = tf.reshape(past_weight, [chunks, size, repeats])
    past = tf.reshape(past, [chunks, size, repeats, dims(v)[-1]])
    weight, out = _within(a, b, v, size)
    return logsumexp.merge(weight, out, past_weight, past)


def _swapped(x):
    """x with axes 0 and 1 exchanged."""
    return tf.transpose(x, [1, 0, *range(2, len(x.shape))])


def attend_causally(a, b, v, log_mass, mean):
    """Row i attends to keys 0 to i and to an initial state.

    Args:
        a, b, v: [B, G, L, R, M], [B, G, L, M], [B, G, L, E].
        log_mass, mean: [1|B, G, M], [1|B, G, M, E].

    Returns:
        log weights of what is seen [B, G, L, R], out [B, G, L, R, E]; log_mass [B, G, M] and mean
        [B, G, M, E] after the last row.
    """
    batch, groups, length, repeats, _ = dims(a)
    size = chunk_rows(length)
    if isinstance(length, int):
        chunks = max(-(-length // size), 1)
    else:
        chunks = tf.maximum(-(-length // size), 1)
    heads, rows = batch * groups, chunks * size

    def in_chunks(x, fill):  # [B, G, L, ...] to [B G chunks, size, ...]
        padding = [[0, 0], [0, 0], [0, rows - length]] + [[0, 0]] * (len(x.shape) - 3)
        x = tf.pad(x, padding, constant_values=fill)
        return tf.reshape(x, [heads * chunks, size, *dims(x)[3:]])

    def chunks_first(x):  # [B G chunks, ...] to [chunks, B G, ...]
        return _swapped(tf.reshape(x, [heads, chunks, *dims(x)[1:]]))

    def chunks_last(x):  # and back
        return tf.reshape(_swapped(x), [chunks * heads, *dims(x)[2:]])

    a, b, v = in_chunks(a, 0), in_chunks(b, logsumexp.NONE), in_chunks(v, 0)
    initial = [tf.broadcast_to(x, [batch, *dims(x)[1:]]) for x in (log_mass, mean)]
    initial = [tf.reshape(x, [heads, *dims(x)[2:]]) for x in initial]
    after = carried([chunks_first(x) for x in state_of_keys(b, v)], initial)
    weight, out = _attend_in_chunks(a, b, v, *(chunks_last(x) for x in _before(after, initial)))
    weight = tf.reshape(weight, [batch, groups, rows, repeats])[:, :, :length]
    out = tf.reshape(out, [batch, groups, rows, repeats, dims(v)[-1]])[:, :, :length]
    return weight, out, *(tf.reshape(x[-1], [batch, groups, *dims(x)[2:]]) for x in after)


def attend_causally_in_blocks(a, b, v, log_mass, mean, first):
    """As `attend_causally`, for sequences in K packed blocks of C rows, one after the other.

    Args:
        a, b, v: [K, G, C, R, M], [K, G, C, M], [K, G, C, E].
        log_mass, mean: [K, G, M], [K, G, M, E], the initial state of the block's sequence.
        first: bool [K], whether the block is the first of its sequence.

    Returns:
        log weights of what is seen [K, G, C, R], out [K, G, C, R, E]; log_mass [K, G, M] and mean
        [K, G, M, E] after each block.
    """
    starts = [log_mass, mean]
    zeros = [tf.zeros_like(x[0]) for x in starts]
    after = carried(state_of_keys(b, v), zeros, starts, first)
    before = [
        tf.where(tf.reshape(first, [-1] + [1] * (len(start.shape) - 1)), start, past)
        for start, past in zip(starts, _before(after, zeros), strict=True)
    ]
    flat = [tf.reshape(x, [-1, *dims(x)[2:]]) for x in (a, b, v, *before)]
    weight, out = _attend_in_chunks(*flat)
    sizes = dims(a)[:4]
    return tf.reshape(weight, sizes), tf.reshape(out, [*sizes, dims(v)[-1]]), *after
