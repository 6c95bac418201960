"""Analytic gradients of the reference, for one head; symbols as in `one_head`.

Every key is a state with log_mass b[j] and mean v[j], so one formula serves keys, initial and final
states: with p = exp(log_mass of the part - log_mass of the whole), a part receives p * dmean, and p
* (dmean.(its mean - mean) + dlog_mass) in its log_mass.
"""

from __future__ import annotations

import numpy as np

from performer.reference.one_head import (
    SOFTMAX,
    empty_state,
    exp_minus,
    key_log_features,
    load,
    log_features,
    log_features_slope,
    merge,
    softmax,
)


def _parts(mass, mean, whole_mass, whole_mean, dmass, dmean):
    """Gradients of parts (mass [P, M], mean [P, E] or [P, M, E]) of a whole state."""
    p = exp_minus(mass, whole_mass)
    mean = mean[:, None, :] if mean.ndim == 2 else mean
    return p * (np.sum(dmean * (mean - whole_mean), -1) + dmass), p[:, :, None] * dmean


def _bidirectional(a, b, v, state, dout, dfinal):
    keys = (np.full(b.shape[1], -np.inf), np.zeros((b.shape[1], v.shape[1])))
    for j in range(len(b)):
        keys = merge(keys, (b[j], np.repeat(v[j][None], b.shape[1], 0)))
    mass, mean = merge(state, keys)
    weight = softmax(a + mass, -1)
    da = weight * (dout @ mean.T - np.sum(dout * (weight @ mean), -1, keepdims=True))
    dmass, dmean = da.sum(0) + dfinal[0], weight.T @ dout + dfinal[1]
    db, dv = _parts(b, v, mass, mean, dmass, dmean)
    dinitial = _parts(state[0][None], state[1][None], mass, mean, dmass, dmean)
    return da, db, dv.sum(1), (dinitial[0][0], dinitial[1][0])


def _causal(a, b, v, state, dout, dfinal):
    rows, features = a.shape
    first, mass, mean = state, np.empty((rows, features)), np.empty((rows, features, v.shape[1]))
    for i in range(rows):
        state = merge(state, (b[i], np.repeat(v[i][None], features, 0)))
        mass[i], mean[i] = state
    weight = softmax(a + mass, -1)
    delta = np.sum(dout * np.einsum("im,ime->ie", weight, mean), -1)
    da = weight * (np.einsum("ie,ime->im", dout, mean) - delta[:, None])
    # The reverse state (r_value [M, E], r_mass [M]) holds what the rows from j on ask of a key. It
    # is relative to the log_mass of row j.
    db, dv, whole = np.empty_like(b), np.empty_like(v), state[0]
    r_value, r_mass = dfinal[1], np.sum(dfinal[1] * state[1], -1) - dfinal[0]
    for j in reversed(range(rows)):
        decay = exp_minus(mass[j], whole)
        r_value = decay[:, None] * r_value + weight[j][:, None] * dout[j]
        r_mass = decay * r_mass + weight[j] * delta[j]
        whole = mass[j]
        p = exp_minus(b[j], whole)
        db[j], dv[j] = p * (r_value @ v[j] - r_mass), p @ r_value
    p = exp_minus(first[0], whole)
    return da, db, dv, (p * (np.sum(r_value * first[1], -1) - r_mass), p[:, None] * r_value)


def gradients(
    q,
    k,
    v,
    w_q,
    w_k,
    feature_bias,
    key_bias,
    dout,
    options=SOFTMAX,
    *,
    causal=False,
    state=None,
    dfinal=None,
) -> dict[str, np.ndarray]:
    """Gradients of sum(out * dout) + sum(final state * dfinal), by operator input.

    Args:
        q, k, v, w_q, w_k, feature_bias, key_bias, options: as `one_head.direct`.
        dout: [L, E].
        causal: each query sees the keys up to its own row (L == S).
        state: initial state (log_mass [M], mean [M, E]); default: empty.
        dfinal: gradient (log_mass [M], mean [M, E]) of the final state; default: zeros.

    Returns:
        Dictionary of arrays shaped as the inputs; rows of masked keys are 0.
    """
    masked = key_bias == -np.inf
    k, v = load(k, v, key_bias)
    a = log_features(q, w_q, feature_bias, options)
    b = key_log_features(k, w_k, key_bias, options)
    state = state or empty_state(len(w_k), v.shape[1])
    dfinal = dfinal or (np.zeros(len(w_k)), np.zeros((len(w_k), v.shape[1])))
    da, db, dv, dinitial = (_causal if causal else _bidirectional)(a, b, v, state, dout, dfinal)
    scale = options.scale_for(q.shape[-1])
    du_q, du_k = da * log_features_slope(q, w_q, options), db * log_features_slope(k, w_k, options)
    dk = np.sqrt(scale) * (du_k @ w_k)
    if options.feature_map == "softmax" and options.key_norm:
        dk = dk - scale * k * db.sum(-1, keepdims=True)
    return {
        "query": np.sqrt(scale) * (du_q @ w_q),
        "key": np.where(masked[:, None], 0.0, dk),
        "value": np.where(masked[:, None], 0.0, dv),
        "query_projection": np.sqrt(scale) * (du_q.T @ q),
        "key_projection": np.sqrt(scale) * (du_k.T @ k),
        "feature_bias": da.sum(0),
        "key_bias": np.where(masked, 0.0, db.sum(-1)),
        "initial_log_mass": dinitial[0],
        "initial_mean": dinitial[1],
    }
