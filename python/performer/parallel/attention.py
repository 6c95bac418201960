"""Linear attention over sequences of which every replica has a part."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from performer import checks, ops
from performer.composition import logsumexp
from performer.composition.packed_blocks import run_starts
from performer.ops.state import (
    AttentionState,
    as_draw,
    as_position,
    checked_state,
    join,
    near_rows,
    same_draw,
    stored_rows,
)
from performer.parallel.collectives import exchange
from performer.parallel.mesh import Mesh, current
from performer.shapes import dims

_FEATURES = ("feature_map", "scale", "key_norm", "feature_epsilon", "draw")
_READ = ("feature_bias", "feature_map", "scale", "feature_epsilon", "draw")


@tf.autograph.experimental.do_not_convert
def favor_attention(
    query,
    key,
    value,
    projection,
    *,
    mesh=None,
    causal=False,
    key_mask=None,
    key_bias=None,
    segment_ids=None,
    max_segments=None,
    initial_state=None,
    return_state=False,
    exact_window=None,
    name=None,
    **options,
):
    """`performer.favor_attention` over whole sequences, called by each replica with its part.

    A state is exchanged in place of keys and values: M (E + 1) numbers for each key/value head and
    sequence, whatever the length. Each replica summarizes its keys, gathers the states of all, and
    attends with those of the others. One collective does it, and one more its gradient. Source: Sun
    et al., "LASP-2", https://arxiv.org/abs/2502.07563, for states that merge exactly.

    Args:
        query: [B, L, H, D], the replica's part; B equal on all replicas of a group.
        key: [B, S, G, D], its part of the keys.
        value: [B, S, G, E].
        projection: the same on all replicas.
        mesh: `Mesh`. Defaults to that of the scope `sequence`.
        causal, key_mask, key_bias, max_segments: as `performer.favor_attention`, of the part.
        segment_ids: integers [B, S]: the ids of the part. A run that ends with the part goes on in
            the next one if that begins with the same id.
        initial_state: state of keys before the whole sequence, the same on all replicas.
        return_state: also return the state after the whole sequence, the same on all replicas.
        exact_window: W, as there. All parts but the last must be a multiple of it (with a causal
            `return_state` the last one, too); without `causal`, all of at least 2 W. The blocks
            beside a part come from the replicas beside this one, in the same collective: W keys,
            values and biases, and two or three states in place of one.
        name: name scope.
        **options: feature_bias, draw, feature_map, scale, key_norm, feature_epsilon, far_bias and
            query_norm, as there, the same on all replicas.

    Returns:
        As `performer.favor_attention`: the output of the replica's part.

    Raises:
        ValueError: an argument breaks its rule; there is no mesh; `exact_keys`,
            `return_log_weight`, or `segment_ids` together with a state or a window.
        RuntimeError: it is not called in a replica.
        tf.errors.InvalidArgumentError: parts of different lengths, with a mesh without `lengths`.
        tf.errors.DeadlineExceededError, UnavailableError: a replica does not answer.

    Numerics: as there. With another number of replicas sums are rounded otherwise: in float32
        by some 1e-6 of the largest entry. The same number gives the same bits.

    Example:

    >>> import tensorflow as tf
    >>> from performer import parallel, projections
    >>> mesh = parallel.Mesh(tf.distribute.MirroredStrategy(["CPU:0"]))
    >>> w = projections.orthogonal_projection(64, 16, seed=1)
    >>> x = tf.random.normal([2, 100, 4, 16])
    >>> def step(x):
    ...     part = mesh.shard(x)
    ...     return parallel.favor_attention(part, part, part, w, mesh=mesh, causal=True)
    >>> mesh.strategy.run(step, [x]).shape
    TensorShape([2, 100, 4, 16])
    """
    mesh = _checked_mesh(mesh)
    for refused in ("exact_keys", "return_log_weight"):
        if options.pop(refused, None):
            raise ValueError(f"{refused} is not there for sequences in parts, got it set")
    known = (*_FEATURES, *_READ, "far_bias", "query_norm")
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"favor_attention of sequences in parts has no argument {unknown[0]!r}")
    if options.get("far_bias") is not None and exact_window is None:
        raise ValueError("far_bias needs exact_window, got far_bias without it")
    keys = {"key_mask": key_mask, "key_bias": key_bias}
    call = {"causal": causal, **options}
    if mesh.sequence == 1:
        return ops.favor_attention(
            query,
            key,
            value,
            projection,
            **keys,
            **call,
            segment_ids=segment_ids,
            max_segments=max_segments,
            initial_state=initial_state,
            return_state=return_state,
            exact_window=exact_window,
            name=name,
        )
    with tf.name_scope(name or "parallel_favor_attention"):
        query, key = checks.tensor("query", query), checks.tensor("key", key, ("BSGD",))
        value = checks.tensor("value", value, ("BSGE",))
        mesh.check_length(key.shape[1])
        draw = options.get("draw")
        options["draw"] = call["draw"] = ops.fingerprint(projection) if draw is None else draw
        if initial_state is not None:
            dtype = checks.accumulator(key.dtype)
            initial_state = checked_state("initial_state", initial_state, dtype, key, value)
            draw = same_draw(initial_state.draw, as_draw(options["draw"]), "projection and state")
            initial_state = initial_state._replace(draw=draw)
        features = {k: v for k, v in options.items() if k in _FEATURES}
        shard = _Shard(mesh, key, value, projection, keys, features)
        if segment_ids is not None:
            if initial_state is not None or return_state or exact_window is not None:
                raise ValueError(
                    "segment_ids of sequences in parts go without initial_state, return_state and "
                    "exact_window, got one of them"
                )
            segments = {"segment_ids": segment_ids, "max_segments": max_segments}
            before = _before_runs(shard, **segments, causal=causal)
            return ops.favor_attention(
                query, key, value, projection, **keys, **call, **segments, initial_state=before
            )
        if exact_window is not None:
            exact_window = checks.exact_window(exact_window)
            attend = _attend_near_causal if causal else _attend_near
            out, state = attend(query, shard, call, initial_state, return_state, exact_window)
        elif causal:
            out, state = _attend_causal(query, shard, call, initial_state, return_state)
        else:
            out, state = _attend_to_all(query, shard, call, initial_state)
        return (out, state) if return_state else out


class _Shard(NamedTuple):
    """A replica's keys and values, and what `summarize` is given besides."""

    mesh: Mesh
    key: tf.Tensor
    value: tf.Tensor
    projection: Any
    keys: dict
    features: dict

    def summarize(self, mask=None):
        """The state of the keys, or of those where `mask` [B, S] says so."""
        keys = dict(self.keys)
        if mask is not None:
            given = keys["key_mask"]
            keys["key_mask"] = mask if given is None else given & mask
        return ops.summarize(self.key, self.value, self.projection, **keys, **self.features)

    def split(self, sizes):
        """Shards of so many keys, one after another; their gradients are joined in one pass."""
        names = [name for name, x in self.keys.items() if x is not None]
        columns = [tf.split(self.key, sizes, 1), tf.split(self.value, sizes, 1)]
        columns += [_split_bias(self.keys[name], self.key, sizes) for name in names]
        return [
            self._replace(key=k, value=v, keys={**self.keys, **dict(zip(names, rest, strict=True))})
            for k, v, *rest in zip(*columns, strict=True)
        ]

    def no_keys(self):
        """A shard of no keys. It has a gradient, so that all take part in that of an exchange."""
        keys = dict.fromkeys(self.keys)
        return self._replace(key=self.key[:, :0], value=self.value[:, :0], keys=keys)

    def exchange(self, states, others=()):
        """The states, and other tensors, of all replicas, which also tell who and how long."""
        group = self.mesh.group()
        length = dims(self.key)[1]
        told = tf.cast(tf.stack([group.place, length]), tf.int64)
        parts = [x for state in states for x in (state.log_mass, state.mean)]
        received = exchange([*parts, told, *others], group)
        with tf.control_dependencies(self._checks(received, len(parts))):
            found = []
            for given in received:
                pairs = [tf.identity(x) for x in given[: len(parts)]]
                made = [
                    AttentionState(pairs[i], pairs[i + 1], states[0].draw)
                    for i in range(0, len(pairs), 2)
                ]
                found.append((made, given[len(parts) + 1 :]))
        return group, found

    def _checks(self, received, at):
        told = tf.stack([given[at] for given in received])
        rule = "replicas must be in the order of their devices in an exchange"
        expected = tf.range(self.mesh.sequence, dtype=tf.int64)
        found = [tf.debugging.assert_equal(told[:, 0], expected, message=rule)]
        rule = (
            "parts of a sequence must have the same length, or those that the mesh was given as "
            "`lengths`"
        )
        lengths = self.mesh.lengths or [told[0, 1]] * self.mesh.sequence
        expected = tf.cast(tf.stack(lengths), tf.int64)
        found.append(tf.debugging.assert_equal(told[:, 1], expected, message=rule))
        return [check for check in found if check is not None]


def _checked_mesh(mesh):
    """The mesh of a call, which a replica of its strategy makes."""
    if mesh is None:
        mesh = current()
        if mesh is None:
            raise ValueError(
                "mesh must be given where no scope `performer.parallel.sequence` is entered by a "
                "replica of its strategy, got None"
            )
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a performer.parallel.Mesh, got {type(mesh).__name__}")
    mesh.index()
    return mesh


def _split_bias(x, key, sizes):
    """key_mask [B, S] or key_bias [B, S] or [B, G, S], or size 1, of the parts of the keys."""
    x = tf.convert_to_tensor(x)
    return [x] * len(sizes) if x.shape[-1] == 1 and key.shape[1] != 1 else tf.split(x, sizes, -1)


def _join(states):
    """States of one draw joined one after another; those of no keys change no bit."""
    total = states[0]
    for state in states[1:]:
        total = join(total, state, total.draw)
    return total


def _where(state, keep):
    """A state where `keep`, a bool or [N], and the state of no keys elsewhere."""
    keep = tf.reshape(tf.convert_to_tensor(keep), [-1])
    nothing = tf.constant(logsumexp.NONE, state.log_mass.dtype)
    return state._replace(
        log_mass=tf.where(keep[:, None, None], state.log_mass, nothing),
        mean=tf.where(keep[:, None, None, None], state.mean, tf.zeros([], state.mean.dtype)),
    )


def _given(state):
    return [] if state is None else [state]


def _attend_to_all(query, shard, call, initial):
    """Every query attends to every key: all replicas read the same state."""
    _, received = shard.exchange([shard.summarize()])
    state = _join([*_given(initial), *(states[0] for states, _ in received)])
    read = {k: call[k] for k in _READ if k in call}
    return ops.read(query, shard.projection, state, **read), state


def _attend_causal(query, shard, call, initial, return_state):
    """The states of earlier replicas come before a replica's keys."""
    index, size = shard.mesh.index(), shard.mesh.sequence
    # Nobody asks for the state of the last part, but for the state after it.
    asked = return_state or index < size - 1
    _, received = shard.exchange([(shard if asked else shard.no_keys()).summarize()])
    states = [states[0] for states, _ in received]
    # The first replica, too, has a gradient of what it received, 0: all take part in its exchange.
    earlier = states[:index] or [_where(states[0], False)]
    before = _join([*_given(initial), *earlier])
    out = ops.favor_attention(
        query, shard.key, shard.value, shard.projection, **shard.keys, **call, initial_state=before
    )
    return out, _join([*_given(initial), *states]) if return_state else None


def _before_runs(shard, segment_ids, max_segments, causal):
    """The state that each run of a part has from other parts, [N] as `favor_attention` takes it."""
    mesh = shard.mesh
    ids = tf.cast(checks.tensor("segment_ids", segment_ids, ("BS",)), tf.int64)
    run = tf.cumsum(tf.cast(run_starts(ids), tf.int32), axis=1) - 1
    last_run = run[:, -1]
    states = [shard.summarize(mask=run == last_run[:, None])]
    if not causal:
        states.append(shard.summarize(mask=run == 0))
    border = tf.stack([ids[:, 0], ids[:, -1], tf.cast(last_run == 0, tf.int64)])
    _, received = shard.exchange(states, [border])
    borders = [others[0] for _, others in received]

    def goes_on(j):  # [B]: whether a run of part j goes on in part j + 1
        return tf.equal(borders[j][1], borders[j + 1][0])

    def is_one_run(j):
        return tf.equal(borders[j][2], 1)

    index, connected = mesh.index(), None
    earlier: list = []
    for j in range(index - 1, -1, -1):
        connected = goes_on(j) if connected is None else connected & is_one_run(j + 1) & goes_on(j)
        earlier.insert(0, _where(received[j][0][0], connected))
    before = _join(earlier or [_where(received[0][0][0], False)])
    batch = dims(ids)[0]
    if max_segments is None:
        ends = tf.cumsum(last_run + 1)
        first, count = ends - last_run - 1, ends[-1]
    else:
        first, count = tf.range(batch) * max_segments, batch * max_segments
    result = _of_runs(before, first, count)
    if causal:
        return result
    later, connected = [], None
    for j in range(index + 1, mesh.sequence):
        on = goes_on(j - 1)
        connected = on if connected is None else connected & is_one_run(j - 1) & on
        later.append(_where(received[j][0][1], connected))
    after = _join(later or [_where(received[0][0][1], False)])
    return _join([result, _of_runs(after, first + last_run, count)])


def _of_runs(state, place, count):
    """[B, ...] to [N, ...], N = `count`: the state of row b is that of run place[b]."""

    def spread(x, fill):
        full = tf.fill(tf.stack([count, *dims(x)[1:]]), tf.constant(fill, x.dtype))
        return tf.tensor_scatter_nd_update(full, place[:, None], x)

    return state._replace(
        log_mass=spread(state.log_mass, logsumexp.NONE), mean=spread(state.mean, 0.0)
    )


def _rows(shard):
    """The keys, values and biases [B, G, S], -inf where masked; each with the axis of its rows."""
    return (shard.key, 1), (shard.value, 1), (_bias_in_full(shard), 2)


def _bias_in_full(shard):
    """The bias of all keys, -inf where they are masked: [B, G, S]."""
    batch, rows, groups, _ = dims(shard.key)
    dtype = checks.accumulator(shard.key.dtype)
    bias = shard.keys["key_bias"]
    bias = tf.zeros([1, 1], dtype) if bias is None else tf.cast(bias, dtype)
    bias = tf.broadcast_to(bias if bias.shape.rank == 3 else bias[:, None], [batch, groups, rows])
    mask = shard.keys["key_mask"]
    if mask is None:
        return bias
    return tf.where(mask[:, None], bias, tf.constant(logsumexp.NONE, dtype))


def _check_blocks(shard, window, least, all_whole):
    """Refuses parts that end inside of a block, where the next one needs whole ones."""
    length, index = shard.key.shape[1], shard.mesh.index()
    if length is None:
        raise ValueError(
            "key must have a known length with exact_window for sequences in parts, got shape "
            f"{shard.key.shape}"
        )
    whole = all_whole or index < shard.mesh.sequence - 1
    if length < least or (whole and length % window):
        raise ValueError(
            f"part {index} of a sequence must have at least {least} rows"
            f"{f', a multiple of exact_window={window}' if whole else ''}, got {length}"
        )


def _attend_near_causal(query, shard, call, initial, return_state, window):
    """The last block of the part before is near; all that comes before that is far."""
    mesh, length = shard.mesh, shard.key.shape[1]
    index, size = mesh.index(), mesh.sequence
    is_last = index == size - 1 and not return_state
    _check_blocks(shard, window, 1 if is_last else window, return_state)
    if is_last:  # nobody asks for its keys
        inner = block = shard.no_keys()
        halo = [_to_rows(x, window, axis) for x, axis in _rows(block)]
    else:
        inner, block = shard.split([length - window, window])
        halo = [x for x, _ in _rows(block)]
    _, received = shard.exchange([inner.summarize(), block.summarize()], halo)

    def far_before(i):  # the keys that are far from the first query of part i
        parts = [x for j in range(i) for x in received[j][0][: 1 if j == i - 1 else 2]]
        return parts or [_where(received[0][0][0], False)]

    start = tf.zeros([], tf.int64) if initial is None else as_position(initial.position)
    if initial is not None:
        whole = tf.debugging.assert_equal(
            start % window,
            tf.zeros([], tf.int64),
            message="initial_state must end with a block of exact_window, for sequences in parts",
        )
        with tf.control_dependencies([] if whole is None else [whole]):
            start = tf.identity(start)

    def state_before(i, position):
        if i == 0:
            return _first_state(initial, far_before(0)[0], shard, window)
        return _join([*_far_of(initial, shard), *far_before(i)])._replace(
            position=position,
            **dict(
                zip(
                    ("near_key", "near_value", "near_bias"),
                    _near_rows(received[i - 1][1], window),
                    strict=True,
                )
            ),
        )

    before = state_before(index, start + tf.cast(mesh.start(length), tf.int64))
    out = ops.favor_attention(
        query,
        shard.key,
        shard.value,
        shard.projection,
        **shard.keys,
        **call,
        initial_state=before,
        exact_window=window,
    )
    after = None
    if return_state:
        after = state_before(size, start + tf.cast(mesh.total(length), tf.int64))
    return out, after


def _first_state(initial, nothing, shard, window):
    """The state before the first part: that of the call, or an empty one with near rows."""
    if initial is not None:
        return _join([initial, nothing])
    batch, _, groups, key_dim = dims(shard.key)
    empty = ops.empty_state(
        batch,
        groups,
        dims(nothing.log_mass)[2],
        dims(shard.value)[3],
        nothing.log_mass.dtype,
        exact_window=window,
        key_dim=key_dim,
        key_dtype=shard.key.dtype,
    )
    return _join([empty._replace(draw=nothing.draw), nothing])


def _far_of(initial, shard):
    """The state of a call, all keys of which are far from a part that is not the first."""
    if initial is None:
        return []
    near = near_rows(initial)
    if not near:
        return [initial]
    key, value, bias = near
    far = initial._replace(near_key=(), near_value=(), near_bias=())
    rows = ops.summarize(key, value, shard.projection, key_bias=bias, **shard.features)
    return [_join([far, rows])]


def _near_rows(halo, window):
    """The near rows of a state that ends with a block, from that block: [N, R, ...]."""
    rows = stored_rows(window)
    key, value, bias = halo
    fill = logsumexp.NONE
    return [_to_rows(key, rows), _to_rows(value, rows), _to_rows(bias, rows, axis=2, fill=fill)]


def _to_rows(x, rows, axis=1, fill=0.0):
    """x with `fill` before it, so that it has this many rows."""
    missing = rows - x.shape[axis]
    if missing == 0:
        return x
    padding = [[0, 0]] * axis + [[missing, 0]] + [[0, 0]] * (len(x.shape) - axis - 1)
    return tf.pad(x, padding, constant_values=fill)


def _attend_near(query, shard, call, initial, return_state, window):
    """The blocks before and after a part are near; the other keys of other parts are far."""
    mesh, length = shard.mesh, shard.key.shape[1]
    index, size = mesh.index(), mesh.sequence
    del return_state
    _check_blocks(shard, window, 2 * window, False)
    first, inner, last = shard.split([window, length - 2 * window, window])
    halos = [x for block in (first, last) for x, _ in _rows(block)]
    _, received = shard.exchange([x.summarize() for x in (first, inner, last)], halos)
    far = list(_given(initial))
    for j, (parts, _) in enumerate(received):
        if j != index:
            far += parts[j == index + 1 : 2 if j == index - 1 else 3]
    before = _join(far)._replace(position=tf.zeros([], tf.int64))
    rows = [[x for x, _ in _rows(shard)]]
    if index > 0:
        rows.insert(0, received[index - 1][1][3:])
    if index < size - 1:
        rows.append(received[index + 1][1][:3])
    key, value, bias = (
        tf.concat([part[i] for part in rows], axis) for i, axis in enumerate((1, 1, 2))
    )
    # Rows stand for the queries of the blocks beside, whose output is not used.
    before_rows, after_rows = window if index > 0 else 0, window if index < size - 1 else 0
    padding = [[0, 0], [before_rows, after_rows], [0, 0], [0, 0]]
    out = ops.favor_attention(
        tf.pad(query, padding),
        key,
        value,
        shard.projection,
        key_bias=bias,
        **call,
        initial_state=before,
        exact_window=window,
    )
    state = _join([*_given(initial), *(x for parts, _ in received for x in parts)])
    _, out, _ = tf.split(out, [before_rows, length, after_rows], 1)
    return out, state
