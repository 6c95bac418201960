"""The operator NearFar as plain TensorFlow: near keys exactly and far keys through features.

Blocks of W = exact_window rows, counted from position 0, decide. Keys in the block of a query and
in the ones beside it are near. Those of all other blocks are far: M features stand for them, and
their state is complete before a block of queries reads it. One softmax is over near keys and
features.

Letters as in `operators`; K is the number of blocks, n a block, X = B G heads. Memory is linear in
S: log-features O(S M), logits O(L (3 W + M)), and one state for each block.

A key or value that holds no numbers is kept out of the products with its block, and leaves a NaN in
the rows that see it, so that it cannot change earlier rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from performer.composition import logsumexp
from performer.composition.chunked import carried, state_of_keys
from performer.composition.log_features import key_features, query_features, scale_for
from performer.composition.packed_blocks import PackedBlocks, gather_or_zero, packed_blocks
from performer.shapes import dims


@tf.autograph.experimental.do_not_convert
def near_far(
    *,
    query,
    key,
    value,
    query_projection,
    key_projection,
    feature_bias,
    key_bias,
    initial_log_mass,
    initial_mean,
    offsets=None,
    start=0,
    exact_window,
    causal,
    scale=0.0,
    key_norm=True,
    query_norm=True,
    packed=False,
    name=None,
):
    """`Performer>NearFar`: exact attention to near keys and linear attention to far ones, in one.

    Key row j has the position start + j; query row i stands where key row i + S - L does. With
    a = sqrt(scale) w.query + feature_bias - scale |query|^2 / 2 - log M, and b as in `summarize`,

        A[i, j] = exp(scale query.key + key_bias)    in the same block of W positions or the next
                = sum_m exp(a[i, m] + b[j, m])       otherwise, and for all of the initial state

    with j not after i if causal.

    Args:
        query, key, value: T[B, L, H, D], T[B, S, G, D], T[B, S, G, E]; S >= L if causal, else
            S = L.
        query_projection, key_projection: U[1|G|H, M, D], U[1|G, M, D].
        feature_bias: U[1|G|H, M].
        key_bias: U[1|B, 1|G, 1|S]; -inf masks.
        initial_log_mass, initial_mean: U[1|N, G, M], U[1|N, G, M, E]; (-inf, 0) for none.
        offsets: int64 [N + 1], used when `packed` (B = 1, S = L, start = 0): blocks are counted
            from the start of each sequence.
        start: int64 scalar, 0 or above.
        exact_window, causal, scale, key_norm, query_norm, packed: attributes of the operator.

    Returns:
        out T[B, L, H, E]; log_weight U[B, L, H], the log of the sum of a row's A, -inf where it
        sees nothing; and the final state log_mass U[N, G, M], mean U[N, G, M, E]: if causal, of the
        initial state and the blocks up to the second before that of position start + S; otherwise
        of all keys.
    """
    with tf.name_scope(name or "near_far"):
        dtype, initial = query.dtype, [initial_log_mass, initial_mean]
        (batch, rows, groups, _), (_, length, heads, _) = dims(key), dims(query)
        places = _places(rows, exact_window, start, offsets if packed else None)
        heads = _Heads(places.count, batch, groups, heads // groups, exact_window)
        bias = heads.flat(places.to_blocks(_bias_by_row(key_bias, batch, rows), logsumexp.NONE))
        bias = tf.transpose(places.masked(bias), [0, 2, 1])
        query, key, value = (
            heads.flat(places.to_blocks(x)) for x in (_padded_in_front(query, rows), key, value)
        )

        features = tf.cast(tf.shape(query_projection)[1], feature_bias.dtype)
        of_map = {"feature_map": "softmax", "scale": scale, "feature_epsilon": 0.0}
        feature_bias = feature_bias - tf.math.log(features)
        a = query_features(query, query_projection, feature_bias, groups, **of_map, norm=query_norm)
        b, v = key_features(key, value, key_projection, bias, **of_map, key_norm=key_norm)
        sequences = _sequences(places, batch, initial)
        ends = [heads.by_block(x) for x in state_of_keys(b, v)]
        far, after = sequences.far_states(ends, causal)

        near = [
            sequences.neighbours(heads.by_block(x), causal, fill)
            for x, fill in _near_keys(key, v, bias, groups)
        ]
        logits, values, poison = _near_logits(
            heads.queries(_grouped(tf.cast(query, b.dtype), groups)),
            near,
            scale_for(scale, "softmax", dims(key)[-1], b.dtype),
            heads.repeats if causal else None,
        )
        logits = tf.concat([logits, heads.queries(a) + far[0][:, :, None]], -1)
        terms, top, total, empty = logsumexp.scaled_exp(logits, -1)
        count = dims(values)[-2]
        out = tf.matmul(terms[..., :count], values) + tf.matmul(terms[..., count:], far[1])
        log_weight = logsumexp.log_sum(top, total, empty, -1)[..., None] + poison

        out = places.from_blocks(heads.rows(out / total + poison))
        log_weight = places.from_blocks(heads.rows(log_weight), logsumexp.NONE)
        state = _final_state(places, initial, sequences.initial, after, causal)
        count = tf.size(offsets) - 1 if packed else batch
        state = [
            tf.reshape(x, [count, groups, *dims(y)[2:]])
            for x, y in zip(state, initial, strict=True)
        ]
        first = rows - length
        return tf.cast(out[:, first:], dtype), log_weight[:, first:, :, 0], *state


class _Places(NamedTuple):
    """Where the rows [B, S, ...] of sequences, or packed ones [1, S, ...], are in blocks.

    Attributes:
        blocks: `PackedBlocks`, or None.
        offsets: of packed sequences.
        rows: S.
        window: W.
        count: K.
        shift: place of row 0 in its block; 0 when packed.
    """

    blocks: PackedBlocks | None
    offsets: tf.Tensor | None
    rows: Any
    window: int
    count: Any
    shift: Any

    def to_blocks(self, x, fill=0.0):
        """x [B, S, ...] to [K, B, W, ...]; places without a row hold `fill` (0 when packed)."""
        if self.blocks is not None:
            return self.blocks.pack(x)[:, None]
        batch, rows, *rest = dims(x)
        padding = [[0, 0], [0, self.count * self.window - rows]] + [[0, 0]] * len(rest)
        x = self._rolled(tf.pad(x, padding, constant_values=fill), self.shift)
        x = tf.reshape(x, [batch, self.count, self.window, *rest])
        return tf.transpose(x, [1, 0, *range(2, len(x.shape))])

    def from_blocks(self, x, fill=0.0):
        """The inverse; rows of no sequence hold `fill`."""
        if self.blocks is None:
            x = tf.transpose(x, [1, 0, *range(2, len(x.shape))])
            batch, _, _, *rest = dims(x)
            x = tf.reshape(x, [batch, self.count * self.window, *rest])
            return self._rolled(x, -self.shift)[:, : self.rows]
        return self.blocks.unpack(x[:, 0], fill)

    def masked(self, bias):
        """bias [K B, W, G] with -inf where no row is, which `to_blocks` leaves 0 when packed."""
        if self.blocks is None:
            return bias
        is_row = self.blocks.rows < tf.cast(self.rows, tf.int64)
        return tf.where(is_row[..., None], bias, tf.constant(logsumexp.NONE, bias.dtype))

    def _rolled(self, x, shift):
        return x if isinstance(shift, int) and shift == 0 else tf.roll(x, shift, 1)


def _places(rows, window, start, offsets) -> _Places:
    """Places of `rows` rows, of which the first has the position `start`; or of packed ones."""
    if offsets is not None:
        blocks = packed_blocks(offsets, rows, window)
        return _Places(blocks, offsets, rows, window, dims(blocks.rows)[0], 0)
    known = tf.get_static_value(start)
    shift = tf.cast(start % window, tf.int32) if known is None else int(known) % window
    # The number of blocks must not depend on a start that is known only when the graph runs.
    count = -(-(rows + (window - 1 if known is None else shift)) // window)
    count = max(count, 1) if isinstance(count, int) else tf.maximum(count, 1)
    return _Places(None, None, rows, window, count, shift)


class _Heads(NamedTuple):
    """The layouts of blocks: K blocks, B batch, G groups, R query heads of each, W rows."""

    count: Any
    batch: Any
    groups: Any
    repeats: Any
    window: int

    def flat(self, x):
        """[K, B, W, ...] to [K B, W, ...]."""
        return tf.reshape(x, [self.count * self.batch, *dims(x)[2:]])

    def by_block(self, x):
        """[K B, G, ...] to [K, X, ...]."""
        return tf.reshape(x, [self.count, self.batch * self.groups, *dims(x)[2:]])

    def queries(self, x):
        """[K B, G, W, R, ...] to [K, X, W R, ...]."""
        outer = [self.count, self.batch * self.groups, self.window * self.repeats]
        return tf.reshape(x, [*outer, *dims(x)[4:]])

    def rows(self, x):
        """[K, X, W R, Z] to [K, B, W, H, Z]."""
        last = dims(x)[-1]
        sizes = [self.count, self.batch, self.groups, self.window, self.repeats, last]
        x = tf.transpose(tf.reshape(x, sizes), [0, 1, 3, 2, 4, 5])
        return tf.reshape(x, [*sizes[:2], self.window, self.groups * self.repeats, last])


def _grouped(query, groups):
    """[Y, W, H, D] to [Y, G, W, R, D]."""
    outer, rows, heads, dim = dims(query)
    query = tf.reshape(query, [outer, rows, groups, heads // groups, dim])
    return tf.transpose(query, [0, 2, 1, 3, 4])


def _bias_by_row(key_bias, batch, rows):
    """[1|B, 1|G, 1|S] to [B, S, 1|G]."""
    key_bias = tf.broadcast_to(key_bias, [batch, dims(key_bias)[1], rows])
    return tf.transpose(key_bias, [0, 2, 1])


def _padded_in_front(x, rows):
    """x [B, L, ...] to [B, S, ...], 0 in the first S - L rows."""
    length = dims(x)[1]
    if isinstance(length, int) and isinstance(rows, int) and length == rows:
        return x
    x = tf.pad(x, [[0, 0], [rows - length, 0]] + [[0, 0]] * (len(x.shape) - 2))
    return tf.ensure_shape(x, [x.shape[0], rows if isinstance(rows, int) else None, *x.shape[2:]])


def _before(x, first):
    """x [K, ...] to [K, ...]: what block n - 1 has, and `first` [1, ...] for block 0."""
    return tf.concat([first, x[:-1]], 0)


def _after(x, last):
    """x [K, ...] to [K, ...]: what block n + 1 has, and `last` [1, ...] for the last one."""
    return tf.concat([x[1:], last], 0)


def _where(condition, x, y):
    """tf.where for a condition [K] and y [K, ...]."""
    return tf.where(tf.reshape(condition, [-1] + [1] * (len(y.shape) - 1)), x, y)


class _Sequences(NamedTuple):
    """Which blocks belong together, and what comes before them.

    Attributes:
        first, last: bool [K], whether a block is the first or the last of its sequence; None where
            all K blocks are one sequence.
        initial: log_mass and mean [K, X, M(, E)], the initial state of the block's sequence; [X,
            M(, E)] where all are one.
    """

    first: tf.Tensor | None
    last: tf.Tensor | None
    initial: list

    def neighbours(self, x, causal, fill):
        """x [K, X, W, Z] to [K, X, 2 W or 3 W, Z].

        The rows of the block before, of the block, and (not causal) of the block after; `fill`
        where there is no such block.
        """
        nothing = tf.fill(tf.shape(x[:1]), tf.cast(fill, x.dtype))
        parts = [_before(x, nothing), x, *([] if causal else [_after(x, nothing)])]
        for part, at_the_end in ((0, self.first), (2, self.last)):
            if at_the_end is not None and part < len(parts):
                parts[part] = _where(at_the_end, nothing, parts[part])
        return tf.concat(parts, -2)

    def far_states(self, ends, causal):
        """States of the far keys of each block, and states after each block.

        Args:
            ends: log_mass and mean [K, X, M(, E)] of the keys of each block.
            causal: only blocks before it are far from a block.
        """
        if self.first is None:
            after = carried(ends, self.initial)
            initial = [x[None] for x in self.initial]
            far = [_before(_before(x, s), s) for x, s in zip(after, initial, strict=True)]
        else:
            after = carried(ends, [tf.zeros_like(x[0]) for x in ends], self.initial, self.first)
            far = [_before(_before(x, x[:1]), x[:1]) for x in after]
            early = self.first | _before(self.first, [True])
            far = [_where(early, s, x) for s, x in zip(self.initial, far, strict=True)]
        if causal:
            return far, after
        nothing = [tf.zeros_like(ends[0]) + logsumexp.NONE, tf.zeros_like(ends[1])]
        breaks = () if self.last is None else (nothing, self.last[::-1])
        from_here = carried([x[::-1] for x in ends], [x[0] for x in nothing], *breaks)
        later = [
            _after(_after(x[::-1], s[:1]), s[:1]) for x, s in zip(from_here, nothing, strict=True)
        ]
        if self.last is not None:
            late = self.last | _after(self.last, [True])
            later = [_where(late, s, x) for s, x in zip(nothing, later, strict=True)]
        return logsumexp.merge(*far, *later), after


def _sequences(places, batch, initial) -> _Sequences:
    """The sequences of `places`, with the initial states [1|N, G, M(, E)]."""
    if places.blocks is None:
        states = [tf.broadcast_to(x, [batch, *dims(x)[1:]]) for x in initial]
        states = [tf.reshape(x, [batch * dims(x)[1], *dims(x)[2:]]) for x in states]
        return _Sequences(None, None, states)
    sequence = places.blocks.sequence
    states = [tf.broadcast_to(x, [tf.size(places.offsets) - 1, *dims(x)[1:]]) for x in initial]
    last = tf.not_equal(sequence, _after(sequence, sequence[:1] - 1))
    return _Sequences(places.blocks.first, last, [gather_or_zero(x, sequence) for x in states])


def _near_keys(key, value, bias, groups):
    """What near keys are in a softmax, each with what stands where there is no block.

    Args:
        key, value: [K B, W, G, D] in T, and [K B, G, W, E] in U, 0 where masked.
        bias: [K B, 1|G, W] in U; -inf masks.

    Returns:
        Pairs of a tensor [K B, G, W, ...] in U and its fill: keys and values (0 where masked, or
        where one of them holds no numbers), bias [..., 1], and bool [..., 1] for such a key.
    """
    key = tf.transpose(tf.cast(key, value.dtype), [0, 2, 1, 3])
    masked = tf.equal(bias, logsumexp.NONE)[..., None]
    numbers = tf.reduce_all(tf.math.is_finite(key), -1, keepdims=True)
    numbers &= tf.reduce_all(tf.math.is_finite(value), -1, keepdims=True)
    bias = tf.broadcast_to(bias, [dims(bias)[0], groups, dims(bias)[2]])[..., None]
    zero = tf.zeros([], value.dtype)
    return [
        (tf.where(masked | ~numbers, zero, key), 0.0),
        (tf.where(numbers, value, zero), 0.0),
        (bias, logsumexp.NONE),
        (~masked & ~numbers, False),
    ]


def _near_logits(query, near, scale, repeats):
    """Logits of near keys.

    Args:
        query: [K, X, W R, D].
        near: key, value, bias, poisoned [K, X, Y, ...], as `_near_keys` makes them, Y near rows.
        scale: factor of query.key.
        repeats: R if causal: a row then sees the keys up to its own; else None.

    Returns:
        Logits [K, X, W R, Y], -inf where a row does not see the key; value; and what to add to rows
        [K, X, W R, 1]: NaN where one sees a poisoned key, else 0.
    """
    key, value, bias, poisoned = near
    bias, poisoned = tf.linalg.matrix_transpose(bias), tf.linalg.matrix_transpose(poisoned)
    seen = tf.not_equal(bias, logsumexp.NONE)
    if repeats is not None:
        rows, keys = dims(query)[2], dims(key)[2]
        row, place = tf.range(rows) // repeats, tf.range(keys)
        seen &= place <= row[:, None] + (keys - rows // repeats)
    zero = tf.zeros([], query.dtype)
    logits = tf.matmul(query, key, transpose_b=True) * scale + tf.where(seen, bias, zero)
    logits = tf.where(seen, logits, tf.constant(logsumexp.NONE, query.dtype))
    nan = tf.reduce_any(seen & poisoned, -1, keepdims=True)
    nan = tf.broadcast_to(nan, [*dims(logits)[:3], 1])
    return logits, value, tf.where(nan, tf.constant(float("nan"), query.dtype), zero)


def _final_state(places, initial, starts, after, causal):
    """The state that goes on, from those after each block.

    Args:
        initial: log_mass and mean [1|N, G, M(, E)].
        starts: the same as `_Sequences.initial`.
        after: [K, X, M(, E)].
    """
    window, blocks = places.window, places.blocks
    if blocks is None:
        if not causal:
            return [x[-1] for x in after]
        whole = (places.shift + places.rows) // window  # blocks that are complete
        known = isinstance(whole, int)
        index = max(whole - 1, 0) if known else tf.maximum(whole - 1, 0)
        return [tf.concat([s[None], x], 0)[index] for s, x in zip(starts, after, strict=True)]
    lengths = places.offsets[1:] - places.offsets[:-1]
    initial = [tf.broadcast_to(x, [tf.size(lengths), *dims(x)[1:]]) for x in initial]
    if not causal:
        return list(map(blocks.of_last_block, after, initial))
    whole = tf.maximum(lengths, 0) // window
    unfinished = tf.cast(tf.maximum(lengths, 0) % window > 0, tf.int64)
    # The last block less those that are not complete, and less one more: the second before next.
    index = tf.where(whole >= 2, blocks.last - unfinished - 1, -1)
    return list(map(blocks._replace(last=index).of_last_block, after, initial))
