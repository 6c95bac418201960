"""Near keys exactly and far keys through features, for one head: one softmax over both.

Letters as in `one_head`, W = exact_window. Key row j stands at position start + j, in block
(start + j) // W; query row i stands where key row i + S - L does, so that the last rows meet.

    near(i, j)      |block(i) - block(j)| <= 1, and j not after i if causal
    far(i, j)       block(j) <= block(i) - 2 if causal, else |block(i) - block(j)| >= 2
    A[i, j]         = exp(scale q[i].k[j] + key_bias[j])                          near
                    = sum_m exp(a[i, m] + b[j, m])                                far
    a[i, m]         = sqrt(scale) w_q[m].q[i] + feature_bias[m] - scale |q[i]|^2 / 2 - log M
    b[j, m]         = sqrt(scale) w_k[m].k[j] - scale |k[j]|^2 / 2 + key_bias[j]; -inf masks
    log_weight[i]   = log(sum_j A[i, j] + sum_m exp(a[i, m] + log_mass[m]))  of an initial state
    out[i]          = sum A v / exp(log_weight[i])

The norm of the query and M, which cancel where every key goes through features, count here: the far
part estimates what the near part knows. The keys of an initial state are far for every query. The
final state of a causal call has the keys up to block(S) - 2, where S is the row that would come
next: the rows of the last two blocks will be near again. Otherwise it has all keys.

Two independent forms give the same result: `near_far_direct` (quadratic) and `near_far_in_blocks`
(blocks and states).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from performer.reference.one_head import (
    NONE,
    FeatureMap,
    empty_state,
    exp_minus,
    key_log_features,
    load,
    log_features,
    logsumexp,
    merge,
    softmax,
)


class NearFar(NamedTuple):
    """Attributes of near-and-far attention; scale 0 means D**-0.5.

    Attributes:
        exact_window: W, rows of a block.
        causal: a query sees keys up to its own row only.
        start: position of key row 0.
        scale, key_norm: as of `FeatureMap`.
        query_norm: whether a has the norm of the query; without it feature_bias or nothing does.
    """

    exact_window: int
    causal: bool = False
    start: int = 0
    scale: float = 0.0
    key_norm: bool = True
    query_norm: bool = True

    @property
    def features(self) -> FeatureMap:
        """The softmax feature map of the far part."""
        return FeatureMap(scale=self.scale, key_norm=self.key_norm)

    def blocks(self, queries: int, keys: int):
        """The blocks of the query rows [L] and of the key rows [S]."""
        blocks = (self.start + np.arange(keys)) // self.exact_window
        return blocks[keys - queries :], blocks

    def summarized(self, keys: int):
        """Bool [S]: the key rows that the final state has."""
        if not self.causal:
            return np.ones(keys, bool)
        next_block = (self.start + keys) // self.exact_window
        return (self.start + np.arange(keys)) // self.exact_window <= next_block - 2


def query_log_features(q, w_q, feature_bias, options: NearFar) -> np.ndarray:
    """a [L, M], with all constants that make the far part an estimate of exp(scale q.k)."""
    bias = feature_bias - np.log(len(w_q))
    return log_features(q, w_q, bias, options.features, norm=options.query_norm)


def near_logits(q, k, key_bias, options: NearFar) -> np.ndarray:
    """scale q.k + key_bias [L, S] of keys that went through `load`; -inf for masked ones."""
    masked = key_bias == NONE
    logits = options.features.scale_for(q.shape[-1]) * (q @ k.T)
    return np.where(masked, NONE, logits + np.where(masked, 0.0, key_bias))


def _visible(queries: int, keys: int, options: NearFar):
    """Bool [L, S] each: the near and the far pairs of a query and a key."""
    query_blocks, key_blocks = options.blocks(queries, keys)
    apart = query_blocks[:, None] - key_blocks
    if not options.causal:
        return np.abs(apart) <= 1, np.abs(apart) >= 2
    return (apart <= 1) & np.tri(queries, keys, keys - queries, dtype=bool), apart >= 2


def near_far_direct(q, k, v, w_q, w_k, feature_bias, key_bias, options: NearFar, *, state=None):
    """The definition, with all L x S weights.

    Args:
        q, k, v, w_q, w_k, feature_bias, key_bias: as `one_head.direct`. Causal: S >= L; otherwise
            S == L.
        options: the attributes.
        state: initial state (log_mass [M], mean [M, E]), or None.

    Returns:
        out [L, E], log_weight [L], and the final state (log_mass [M], mean [M, E]).
    """
    k, v = load(k, v, key_bias)
    a = query_log_features(q, w_q, feature_bias, options)
    b = key_log_features(k, w_k, key_bias, options.features)
    near, far = _visible(len(q), len(k), options)
    by_features = np.full((len(q), len(k)), NONE)
    for m in range(len(w_k)):  # no [L, S, M] in memory
        by_features = np.logaddexp(by_features, a[:, m, None] + b[:, m])
    log_weights = np.where(near, near_logits(q, k, key_bias, options), NONE)
    log_weights = np.where(far, by_features, log_weights)
    state = state or empty_state(len(w_k), v.shape[1])
    log_weights = np.concatenate([log_weights, a + state[0]], 1)
    out = softmax(log_weights, -1) @ np.concatenate([v, state[1]])
    final = options.summarized(len(k))
    return out, logsumexp(log_weights, -1), merge(state, _state(b[final], v[final]))


def _state(b, v):
    """The state of keys with log-features b [S, M] and values v [S, E]."""
    return logsumexp(b, 0), softmax(b, 0).T @ v


def near_far_in_blocks(q, k, v, w_q, w_k, feature_bias, key_bias, options: NearFar, *, state=None):
    """Block by block: the softmax of a block of queries is over its near keys and M features.

    The features hold the state of the far keys of the block: that of all blocks before the near
    ones, which grows by one block a step, and (not causal) that of all blocks after them. Arguments
    and results as `near_far_direct`.
    """
    k, v = load(k, v, key_bias)
    a = query_log_features(q, w_q, feature_bias, options)
    b = key_log_features(k, w_k, key_bias, options.features)
    query_blocks, key_blocks = options.blocks(len(q), len(k))
    state = state or empty_state(len(w_k), v.shape[1])
    nothing = empty_state(len(w_k), v.shape[1])

    first, last = (key_blocks[0], key_blocks[-1]) if len(k) else (0, -1)
    of_block = {n: _state(b[key_blocks == n], v[key_blocks == n]) for n in range(first, last + 1)}
    before, after = {first - 1: state}, {last + 1: nothing}  # up to block n; from block n on
    for n in range(first, last + 1):
        before[n] = merge(before[n - 1], of_block[n])
    for n in range(last, first - 1, -1):
        after[n] = merge(after[n + 1], of_block[n])

    out, log_weight = np.zeros((len(q), v.shape[1])), np.full(len(q), NONE)
    for n in np.unique(query_blocks):
        rows, near = query_blocks == n, np.abs(key_blocks - n) <= 1
        logits = near_logits(q[rows], k[near], key_bias[near], options)
        log_mass, mean = before[max(n - 2, first - 1)]
        seen = np.ones(logits.shape, bool)
        if options.causal:
            at = np.flatnonzero(rows) + len(k) - len(q)
            seen = np.flatnonzero(near) <= at[:, None]
        else:
            log_mass, mean = merge((log_mass, mean), after[min(n + 2, last + 1)])
        logits = np.concatenate([np.where(seen, logits, NONE), a[rows] + log_mass], 1)
        log_weight[rows] = logsumexp(logits, -1)
        p, count = softmax(logits, -1), logits.shape[1] - len(w_k)
        later_left_out = np.where(seen[..., None], v[near], 0.0)  # a NaN stays where it is
        out[rows] = np.einsum("ij,ije->ie", p[:, :count], later_left_out) + p[:, count:] @ mean
    final = last
    if options.causal:
        final = max((options.start + len(k)) // options.exact_window - 2, first - 1)
    return out, log_weight, before[min(final, last)]


def near_far_gradients(
    q,
    k,
    v,
    w_q,
    w_k,
    feature_bias,
    key_bias,
    dout,
    options: NearFar,
    *,
    state=None,
    dlog_weight=None,
    dfinal=None,
) -> dict[str, np.ndarray]:
    """Gradients of sum(out dout) + sum(log_weight dlog_weight) + sum(final state dfinal).

    A term t of row i, of weight p = t / exp(log_weight[i]) and value u, receives p (dout[i].(u -
    out[i]) + dlog_weight[i]) in its logarithm and p dout[i] in its value, whether it is a near key
    or a feature. What a state receives, its keys receive likewise: with p = exp(b - log_mass) a key
    gets p (dmean.(v - mean) + dlog_mass) and p dmean.

    Args:
        q, k, v, w_q, w_k, feature_bias, key_bias, options, state: as `near_far_direct`.
        dout: [L, E].
        dlog_weight: [L], or None for zeros. Of rows that see nothing it is ignored.
        dfinal: gradient (log_mass [M], mean [M, E]) of the final state, or None for zeros.

    Returns:
        Dictionary of arrays shaped as the inputs, by operator input; rows of masked keys are 0.
    """
    masked = key_bias == NONE
    k, v = load(k, v, key_bias)
    a = query_log_features(q, w_q, feature_bias, options)
    b = key_log_features(k, w_k, key_bias, options.features)
    query_blocks, key_blocks = options.blocks(len(q), len(k))
    initial = state or empty_state(len(w_k), v.shape[1])
    dlog_weight = np.zeros(len(q)) if dlog_weight is None else dlog_weight
    dq_near, dk_near = np.zeros(q.shape), np.zeros(k.shape)
    da, db, dv, dbias = np.zeros(a.shape), np.zeros(b.shape), np.zeros(v.shape), np.zeros(len(k))
    dinitial = [np.zeros(x.shape) for x in initial]
    scale = options.features.scale_for(q.shape[-1])

    def to_keys(chosen, log_mass, mean, dlog_mass, dmean):
        """Hands the gradient of a state to the chosen keys and to the initial state."""
        shift = dlog_mass - np.sum(dmean * mean, -1)
        p = exp_minus(b[chosen], log_mass)
        db[chosen] += p * (v[chosen] @ dmean.T + shift)
        dv[chosen] += p @ dmean
        p = exp_minus(initial[0], log_mass)
        dinitial[0] += p * (np.sum(initial[1] * dmean, -1) + shift)
        dinitial[1] += p[:, None] * dmean

    for n in np.unique(query_blocks):
        rows, near = query_blocks == n, np.abs(key_blocks - n) <= 1
        far = key_blocks <= n - 2 if options.causal else ~near
        log_mass, mean = merge(initial, _state(b[far], v[far]))
        logits = near_logits(q[rows], k[near], key_bias[near], options)
        if options.causal:
            at = np.flatnonzero(rows) + len(k) - len(q)
            logits = np.where(np.flatnonzero(near) <= at[:, None], logits, NONE)
        p = softmax(np.concatenate([logits, a[rows] + log_mass], 1), -1)
        values = np.concatenate([v[near], mean])
        delta = np.sum(dout[rows] * (p @ values), -1) - dlog_weight[rows]
        dlogits = p * (dout[rows] @ values.T - delta[:, None])
        dvalues = p.T @ dout[rows]
        count = len(v[near])
        dv[near] += dvalues[:count]
        dbias[near] += dlogits[:, :count].sum(0)
        dq_near[rows] = scale * dlogits[:, :count] @ k[near]
        dk_near[near] += scale * dlogits[:, :count].T @ q[rows]
        da[rows] = dlogits[:, count:]
        to_keys(far, log_mass, mean, dlogits[:, count:].sum(0), dvalues[count:])
    if dfinal is not None:
        final = options.summarized(len(k))
        to_keys(final, *merge(initial, _state(b[final], v[final])), *dfinal)

    dq = np.sqrt(scale) * (da @ w_q) + dq_near
    if options.query_norm:
        dq = dq - scale * q * da.sum(-1, keepdims=True)
    dk = np.sqrt(scale) * (db @ w_k) + dk_near
    if options.key_norm:
        dk = dk - scale * k * db.sum(-1, keepdims=True)
    return {
        "query": dq,
        "key": np.where(masked[:, None], 0.0, dk),
        "value": np.where(masked[:, None], 0.0, dv),
        "query_projection": np.sqrt(scale) * (da.T @ q),
        "key_projection": np.sqrt(scale) * (db.T @ k),
        "feature_bias": da.sum(0),
        "key_bias": np.where(masked, 0.0, dbias + db.sum(-1)),
        "initial_log_mass": dinitial[0],
        "initial_mean": dinitial[1],
    }
