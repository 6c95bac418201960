"""Inputs of the reference, for one head and for several, and finite differences."""

import numpy as np
import pytest

from performer.reference import NONE, FeatureMap

L, D, E, M = 9, 4, 3, 6
MAPS = {
    "softmax": FeatureMap(),
    "softmax, no norm, scale 0.3": FeatureMap(scale=0.3, key_norm=False),
    "relu": FeatureMap(feature_map="relu"),
    "relu without epsilon": FeatureMap(feature_map="relu", feature_epsilon=0.0),
    "elu": FeatureMap(feature_map="elu", scale=0.7),
}
INPUTS = [
    *("query", "key", "value"),
    *("query_projection", "key_projection", "feature_bias", "key_bias"),
]
STATE = ["initial_log_mass", "initial_mean"]
maps = pytest.mark.parametrize("options", MAPS.values(), ids=MAPS.keys())
smooth_maps = pytest.mark.parametrize(
    "options",
    [MAPS[x] for x in MAPS if "without" not in x],
    ids=[x for x in MAPS if "without" not in x],
)


def arguments(seed=0, rows=L, keys=L, features=M, std=1.0):
    """q, k, v, w_q, w_k, feature_bias, key_bias of one head."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, D), (keys, D), (keys, E), (features, D), (features, D), (features,), (keys,)]
    q, k, *rest = (rng.normal(size=shape) for shape in shapes)
    return [q * std, k * std, *rest]


def random_state(seed=9, features=M):
    rng = np.random.default_rng(seed)
    return rng.normal(size=features), rng.normal(size=(features, E))


def heads_inputs(seed=0, batch=2, heads=4, groups=2, rows=7):
    rng = np.random.default_rng(seed)
    shapes = {
        "query": (batch, rows, heads, D),
        "key": (batch, rows, groups, D),
        "value": (batch, rows, groups, E),
        "query_projection": (heads, M, D),
        "key_projection": (groups, M, D),
        "feature_bias": (groups, M),
        "key_bias": (batch, 1, rows),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def differences(function, values, position, step=1e-6):
    """Central differences of a scalar function by one of its array arguments."""
    x = values[position]
    result = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        if x[i] == NONE:
            continue
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append(function(*values[:position], moved, *values[position + 1 :]))
        result[i] = (ends[0] - ends[1]) / (2 * step)
    return result
