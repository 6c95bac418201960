"""Attention through landmarks on log-features: the core of the plain TensorFlow composition.

Letters: B batch, G key/value heads, R query heads of each, L rows, S keys, M features, E value dim,
X any leading axes. a are query log-features, b key log-features (-inf: masked), v the values (0
where masked).

Causal attention keeps no [L, M, E]: chunks of 64 rows are joined by a scan over their states, and
inside a chunk the second half of every block of 2, 4, ..., 64 rows reads the first. A row thus
meets earlier keys only, and every sum is scaled by its own largest term: the future cannot change a
bit of the past, and no spread of keys can overflow.
"""

from __future__ import annotations

import tensorflow as tf

from performer import logspace

_CHUNK = 64  # rows between two states of the causal scan, a power of two
_DIRECT = 8  # smaller blocks form all their weights: cheaper than a state of each


def dims(x: tf.Tensor) -> list:
    """Shape of x, as int where it is known and as scalar tensor where it is not."""
    dynamic = tf.shape(x)
    return [dynamic[i] if size is None else size for i, size in enumerate(x.shape)]


def state_of_keys(b: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """b [X, S, M] and v [X, S, E] to log_mass [X, M] and mean [X, M, E]."""
    return logspace.average(tf.linalg.matrix_transpose(b), v)


def attend_to_state(a: tf.Tensor, log_mass: tf.Tensor, mean: tf.Tensor):
    """a [X, L, M] and a state to the log weight of what is seen [X, L], its average [X, L, E]."""
    return logspace.average(a + log_mass[..., None, :], mean)


def _attend_to_keys(a, b, v):
    """As `attend_to_state`, weight by weight: a [X, L, M], b [X, S, M], v [X, S, E]."""
    return logspace.average(logspace.logsumexp(a[..., :, None, :] + b[..., None, :, :], -1), v)


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

    weight = logspace.logsumexp(a + b[:, :, None], -1)  # each row sees its own key,
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
        seen_weight, seen = logspace.merge(seen_weight, seen, more_weight, more)
        weight, out = join(weight, seen_weight), join(out, seen)
        block *= 2
    return weight, out


def attend_causally(a, b, v, log_mass, mean):
    """Row i attends to keys 0 to i and to an initial state.

    Args:
        a, b, v: [B, G, L, R, M], [B, G, L, M], [B, G, L, E].
        log_mass, mean: [1|B, G, M], [1|B, G, M, E].

    Returns:
        out [B, G, L, R, E], log_mass [B, G, M], mean [B, G, M, E] after the last row.
    """
    batch, groups, length, repeats, features = dims(a)
    value_dim = dims(v)[-1]
    if isinstance(length, int):
        size = min(_CHUNK, 1 << max(length - 1, 0).bit_length())
        chunks = max(-(-length // size), 1)
    else:
        size = _CHUNK
        chunks = tf.maximum(-(-length // size), 1)
    rows = chunks * size

    def padded(x, fill):  # [B, G, L, ...] to [B G, rows, ...]
        padding = [[0, 0], [0, 0], [0, rows - length]] + [[0, 0]] * (len(x.shape) - 3)
        x = tf.pad(x, padding, constant_values=fill)
        return tf.reshape(x, [batch * groups, rows, *dims(x)[3:]])

    def in_chunks(x):  # [B G, rows, ...] to [B G, chunks, size, ...]
        return tf.reshape(x, [batch * groups, chunks, size, *dims(x)[2:]])

    def by_chunk(x):  # exchanges axes 0 and 1
        return tf.transpose(x, [1, 0, *range(2, len(x.shape))])

    a, b, v = padded(a, 0), padded(b, logspace.NONE), padded(v, 0)
    initial = [tf.broadcast_to(x, [batch, *dims(x)[1:]]) for x in (log_mass, mean)]
    initial = [tf.reshape(x, [batch * groups, *dims(x)[2:]]) for x in initial]
    ends = [by_chunk(x) for x in state_of_keys(in_chunks(b), in_chunks(v))]
    if (
        isinstance(chunks, int) and chunks == 1
    ):  # a loop, and its gradients, cost seconds to compile
        ends = [x[None] for x in logspace.merge(*initial, *(end[0] for end in ends))]
    else:
        ends = tf.scan(lambda past, new: logspace.merge(*past, *new), tuple(ends), tuple(initial))
    states = [tf.concat([x[None], end], 0) for x, end in zip(initial, ends, strict=True)]

    queries = tf.reshape(a, [batch * groups, chunks, size * repeats, features])
    past_weight, past = attend_to_state(queries, *(by_chunk(x[:-1]) for x in states))
    past_weight = tf.reshape(past_weight, [batch * groups, rows, repeats])
    past = tf.reshape(past, [batch * groups, rows, repeats, value_dim])
    weight, out = _within(a, b, v, size)
    _, out = logspace.merge(weight, out, past_weight, past)
    out = tf.reshape(out, [batch, groups, rows, repeats, value_dim])[:, :, :length]
    last = [tf.reshape(x[-1], [batch, groups, *dims(x)[2:]]) for x in states]
    return out, *last
