"""FAVOR+ as attention through M features, for one head: what every kernel is tested against.

Letters: q [L, D], k [S, D], v [S, E], w_q and w_k [M, D] (the projection), feature_bias [M],
key_bias [S].

    a[i, m] = u(q[i], w_q[m]) + feature_bias[m]                     query log-features
    b[j, m] = u(k[j], w_k[m]) - scale |k[j]|^2 / 2 + key_bias[j]    key log-features; -inf masks
    A[i, j] = sum_m exp(a[i, m] + b[j, m])
    out[i] = sum_j A[i, j] v[j] / sum_j A[i, j]

with u(x, w) = sqrt(scale) w.x for the softmax map (the ReLU and ELU maps: `log_features`). A state
is the pair (log_mass [M], mean [M, E]): what a set of keys has to say to any query. Three
independent forms give the same result: `direct` (quadratic), `recurrent` (key by key) and `causal`
(chunks) or `read(summarize)`.

There is no epsilon: after scaling, the largest term of each sum is 1. exp(-inf - -inf) is 0 by
definition. Masked rows of k and v are replaced by 0 by selection, so whatever they hold cannot
leak. Guards test `== -inf`, never `isfinite`: a NaN in an unmasked key must show. A query that sees
no key gives 0.

Source: Choromanski et al., "Rethinking Attention with Performers",
https://arxiv.org/abs/2009.14794, equations 5 to 7.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NONE = -np.inf
State = tuple[np.ndarray, np.ndarray]


class FeatureMap(NamedTuple):
    """Attributes that the operators share; scale 0 means D**-0.5 for softmax and 1 otherwise.

    As attributes of operators, scale and feature_epsilon have float32 precision.
    """

    feature_map: str = "softmax"
    scale: float = 0.0
    key_norm: bool = True
    feature_epsilon: float = 1e-3

    @property
    def epsilon(self) -> float:
        """What is added to ReLU features."""
        return float(np.float32(self.feature_epsilon))

    def scale_for(self, dim: int) -> float:
        """The factor of q.k for key dimension `dim`."""
        return float(np.float32(self.scale)) or (
            dim**-0.5 if self.feature_map == "softmax" else 1.0
        )


SOFTMAX = FeatureMap()


def exp_minus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """exp(x - y), and 0 where x is -inf (also where both are)."""
    nothing = x == NONE
    return np.where(nothing, 0.0, np.exp(np.where(nothing, 0.0, x) - np.where(nothing, 0.0, y)))


def logsumexp(x: np.ndarray, axis: int) -> np.ndarray:
    """log(sum(exp(x))) along `axis`; -inf for a sum of nothing."""
    top = np.max(x, axis=axis, keepdims=True, initial=NONE)
    empty = top == NONE
    total = np.sum(exp_minus(x, np.where(empty, 0.0, top)), axis=axis, keepdims=True)
    return np.squeeze(np.where(empty, NONE, top + np.log(np.where(empty, 1.0, total))), axis=axis)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """exp(x) / sum(exp(x)) along `axis`; 0 where there is nothing."""
    return exp_minus(x, np.expand_dims(logsumexp(x, axis), axis))


def load(k, v, key_bias):
    """k and v with their masked rows replaced by 0."""
    masked = (key_bias == NONE)[:, None]
    return np.where(masked, 0.0, k), np.where(masked, 0.0, v)


def log_features(x, w, bias, options: FeatureMap = SOFTMAX, *, norm: bool = False) -> np.ndarray:
    """Log-features [rows, M] of x [rows, D], to which `bias` broadcasts.

    `norm` subtracts scale |x|^2 / 2 (softmax only).
    """
    scale = options.scale_for(x.shape[-1])
    u = np.sqrt(scale) * (x @ w.T)
    if options.feature_map == "relu":
        phi = np.maximum(u, 0.0) + options.epsilon
        u = np.where(phi == 0, NONE, np.log(np.where(phi == 0, 1.0, phi)))
    elif options.feature_map == "elu":
        u = np.where(u > 0, np.log1p(np.maximum(u, 0.0)), u)  # log(elu(u) + 1)
    elif options.feature_map != "softmax":
        raise ValueError(f"feature_map must be softmax, relu or elu, got {options.feature_map!r}")
    elif norm:
        u = u - scale * np.sum(x * x, -1, keepdims=True) / 2
    return u + bias


def log_features_slope(x, w, options: FeatureMap = SOFTMAX) -> np.ndarray:
    """Derivative of the log-features [rows, M] by u = sqrt(scale) w.x."""
    u = np.sqrt(options.scale_for(x.shape[-1])) * (x @ w.T)
    if options.feature_map == "relu":
        return (u > 0) / np.where(u > 0, u + options.epsilon, 1.0)
    return 1 / (1 + np.maximum(u, 0.0)) if options.feature_map == "elu" else np.ones_like(u)


def key_log_features(k, w_k, key_bias, options: FeatureMap = SOFTMAX) -> np.ndarray:
    """b [S, M] of keys that went through `load`."""
    return log_features(k, w_k, key_bias[:, None], options, norm=options.key_norm)


def empty_state(features: int, value_dim: int) -> State:
    """The state of no keys: the identity of `merge`."""
    return np.full(features, NONE), np.zeros((features, value_dim))


def summarize(k, v, w_k, key_bias, options: FeatureMap = SOFTMAX) -> State:
    """The state of a set of keys."""
    k, v = load(k, v, key_bias)
    b = key_log_features(k, w_k, key_bias, options)
    return logsumexp(b, 0), softmax(b, 0).T @ v


def merge(first: State, second: State) -> State:
    """The state of two sets of keys: associative, commutative, identity (-inf, 0)."""
    log_mass = np.logaddexp(first[0], second[0])
    parts = [exp_minus(mass, log_mass)[:, None] * mean for mass, mean in (first, second)]
    return log_mass, parts[0] + parts[1]


def read(q, w_q, feature_bias, state: State, options: FeatureMap = SOFTMAX) -> np.ndarray:
    """Attention [L, E] of the queries to the keys of a state."""
    return softmax(log_features(q, w_q, feature_bias, options) + state[0], -1) @ state[1]


def direct(q, k, v, w_q, w_k, feature_bias, key_bias, options=SOFTMAX, *, causal=False, state=None):
    """The definition, with all L x S weights; a state counts as M more keys. Returns out [L, E]."""
    k, v = load(k, v, key_bias)
    a = log_features(q, w_q, feature_bias, options)
    b = key_log_features(k, w_k, key_bias, options)
    log_weight = logsumexp(a[:, None, :] + b[None], -1)
    if causal:
        log_weight = np.where(np.tri(len(q), len(k), len(k) - len(q), dtype=bool), log_weight, NONE)
    if state is not None:
        log_weight, v = np.concatenate([log_weight, a + state[0]], 1), np.concatenate([v, state[1]])
    return softmax(log_weight, -1) @ v


def recurrent(
    q, k, v, w_q, w_k, feature_bias, key_bias, options=SOFTMAX, *, causal=False, state=None
):
    """One key at a time, each merged into the state. Returns out [L, E] and the final state."""
    k, v = load(k, v, key_bias)
    b = key_log_features(k, w_k, key_bias, options)
    state = state or empty_state(len(w_k), v.shape[1])
    out = []
    for j in range(len(k)):
        state = merge(state, (b[j], np.repeat(v[j][None], len(w_k), 0)))
        if causal:
            out.append(read(q[j : j + 1], w_q, feature_bias, state, options)[0])
    if causal:
        return np.reshape(out, (len(q), v.shape[1])), state
    return read(q, w_q, feature_bias, state, options), state


def causal(
    q,
    k,
    v,
    w_q,
    w_k,
    feature_bias,
    key_bias,
    options=SOFTMAX,
    *,
    state=None,
    chunk=64,
    limit=30.0,
    dtype=np.float64,
):
    """Causal attention in chunks; the future cannot change a bit of the past.

    Chunk boundaries are multiples of `chunk`. A chunk is processed in sub-chunks, nearly always
    one. The reference maximum of a sub-chunk comes from the past only: anchor = max(log_mass,
    b[first row]) if the first row's key is unmasked, else log_mass. While nothing has been seen,
    rows are 0, and the next sub-chunk starts at the first unmasked key. A sub-chunk ends before any
    later key that exceeds the anchor by more than `limit` nats or that is not finite. Returns
    out [L, E] and the final state.
    """
    masked = key_bias == NONE
    k, v = load(k, v, key_bias)
    a = log_features(q, w_q, feature_bias, options).astype(dtype)
    b, v = key_log_features(k, w_k, key_bias, options).astype(dtype), v.astype(dtype)
    log_mass, mean = state or empty_state(len(w_k), v.shape[1])
    out, start = np.zeros((len(q), v.shape[1]), dtype), 0
    while start < len(q):
        end = min((start // chunk + 1) * chunk, len(q))
        if masked[start] and np.all(log_mass == NONE):
            unmasked = np.flatnonzero(~masked[start:end])
            start = start + unmasked[0] if len(unmasked) else end
            continue
        anchor = log_mass if masked[start] else np.maximum(log_mass, b[start])
        later = b[start + 1 : end]
        cut = np.any((later > anchor + limit) | np.isnan(later) | (later == np.inf), -1)
        cut |= ~np.isfinite(v[start + 1 : end]).all(-1)
        end = start + 1 + np.flatnonzero(cut)[0] if cut.any() else end
        rows = slice(start, end)
        keys = exp_minus(b[rows], anchor)
        shifted = a[rows] + anchor
        top = np.max(shifted, -1, keepdims=True)
        f = exp_minus(shifted, np.where(top == NONE, 0.0, top))  # <= 1
        old = exp_minus(log_mass, anchor)  # <= 1
        # The order of sums does not depend on where the sub-chunk ends: later rows decide that.
        local = np.tril(np.einsum("im,jm->ij", f, keys))
        total = np.einsum("im,m->i", f, old) + np.cumsum(local, -1)[:, -1]
        total = total[:, None]  # >= 1, but for features that are 0 (relu, no epsilon)
        past = np.einsum("im,me->ie", f, old[:, None] * mean)
        present = np.einsum("ij,je->ie", local, v[rows])
        out[rows] = (past + present) / np.where(total == 0, 1.0, total)
        mass = old + keys.sum(0)
        nothing = mass == 0
        mass = np.where(nothing, 1.0, mass)
        mean = (old[:, None] * mean + keys.T @ v[rows]) / mass[:, None]
        log_mass, start = np.where(nothing, NONE, anchor + np.log(mass)), end
    return out, (log_mass, mean)
