"""The reference shaped like the operators: batch, heads, groups, biases, packed sequences.

Letters: B batch, H query heads, G key/value heads, L queries, S keys, D, E, M features, N sequences
(B, or when packed len(offsets) - 1 with B = 1). Everything is upcast to float64 first. For bfloat16
and half queries or keys the projection is rounded once to their type, as the operators do.
"""

from __future__ import annotations

import numpy as np

from performer.reference import one_head
from performer.reference.one_head import FeatureMap


def rounded(projection, like):
    """The projection as the operators use it, in float64, [1|G|H, M, D]."""
    dtype = np.asarray(like).dtype
    projection = np.asarray(projection)
    projection = projection if dtype.itemsize >= 4 else projection.astype(dtype)
    projection = projection.astype(np.float64)
    return projection if projection.ndim == 3 else projection[None]


def entry(x, head, heads):
    """Entry of `head` (of `heads`) in an array whose first axis is 1, the groups, or all heads."""
    return head * x.shape[0] // heads


def spans(batch, offsets):
    """(sequence, batch row, rows) of every sequence."""
    if offsets is None:
        return [(n, n, slice(None)) for n in range(batch)]
    return [(n, 0, slice(offsets[n], offsets[n + 1])) for n in range(len(offsets) - 1)]


def bias_of_keys(key, key_bias):
    """Key bias as [B, G, S] (a copy)."""
    batch, keys, groups = key.shape[:3]
    key_bias = np.zeros((1, 1, 1)) if key_bias is None else np.asarray(key_bias, np.float64)
    return np.broadcast_to(key_bias, (batch, groups, keys))


def summarize_heads(key, value, key_projection, key_bias=None, offsets=None, **attributes):
    """`Performer>Summarize`: log_mass [N, G, M] and mean [N, G, M, E].

    Args:
        key, value: [B, S, G, D], [B, S, G, E].
        key_projection: [M, D] or [1|G, M, D].
        key_bias: None or [1|B, 1|G, 1|S]; -inf masks.
        offsets: None, or int [N + 1] for packed sequences (B = 1).
        **attributes: fields of `FeatureMap`.
    """
    w = rounded(key_projection, key)
    key, value = np.asarray(key, np.float64), np.asarray(value, np.float64)
    bias, sequences, groups = bias_of_keys(key, key_bias), spans(len(key), offsets), key.shape[2]
    log_mass = np.empty((len(sequences), groups, w.shape[1]))
    mean = np.empty((*log_mass.shape, value.shape[-1]))
    for n, b, rows in sequences:
        for g in range(groups):
            log_mass[n, g], mean[n, g] = one_head.summarize(
                key[b, rows, g],
                value[b, rows, g],
                w[entry(w, g, groups)],
                bias[b, g, rows],
                FeatureMap(**attributes),
            )
    return log_mass, mean


def read_heads(
    query, query_projection, log_mass, mean, feature_bias=None, offsets=None, **attributes
):
    """`Performer>Read`: out [B, L, H, E] of query [B, L, H, D] and a state [N, G, M], [N, G, M, E].

    Args:
        query_projection: [M, D] or [1|G|H, M, D].
        feature_bias: None or [1|G|H, M].
        offsets, **attributes: as `summarize_heads`. Rows outside every sequence give 0.
    """
    w = rounded(query_projection, query)
    query, mean = np.asarray(query, np.float64), np.asarray(mean, np.float64)
    heads, groups = query.shape[2], log_mass.shape[1]
    bias = (
        np.zeros((1, w.shape[1])) if feature_bias is None else np.asarray(feature_bias, np.float64)
    )
    out = np.zeros((*query.shape[:3], mean.shape[-1]))
    for n, b, rows in spans(len(query), offsets):
        for h in range(heads):
            g = h // (heads // groups)
            out[b, rows, h] = one_head.read(
                query[b, rows, h],
                w[entry(w, h, heads)],
                bias[entry(bias, h, heads)],
                (np.asarray(log_mass[n, g], np.float64), mean[n, g]),
                FeatureMap(**attributes),
            )
    return out
