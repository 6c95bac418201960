"""Inputs of the operators, and attention by the plain TensorFlow composition in both forms."""

import numpy as np
import pytest
import tensorflow as tf

from performer import composition
from performer.composition import logsumexp

D, E, M = 4, 3, 6
MAPS = {
    "softmax": {},
    "softmax, no norm, scale 0.3": {"scale": 0.3, "key_norm": False},
    "relu": {"feature_map": "relu"},
    "elu": {"feature_map": "elu", "scale": 0.7},
}
maps = pytest.mark.parametrize("attributes", MAPS.values(), ids=MAPS.keys())
INPUTS = [
    *("query", "key", "value"),
    *("query_projection", "key_projection", "feature_bias", "key_bias"),
]


def random_inputs(
    seed=0,
    batch=2,
    rows=9,
    heads=4,
    groups=2,
    projections=(4, 2),
    bias=(2, 1, 9),
    std=1.0,
    dim=D,
    features=M,
):
    """Float64 inputs of the operators, with holes and left padding in key_bias."""
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, rows, heads, dim),
        (batch, rows, groups, dim),
        (batch, rows, groups, E),
        (projections[0], features, dim),
        (projections[1], features, dim),
        (projections[0], features),
        bias,
    ]
    inputs = {name: rng.normal(size=shape) for name, shape in zip(INPUTS, shapes, strict=True)}
    inputs["query"] *= std
    inputs["key"] *= std
    if inputs["key_bias"].size > 1:
        inputs["key_bias"][rng.random(bias) < 0.3] = -np.inf
        inputs["key_bias"][0, ..., :2] = -np.inf  # left padding
    return inputs


def random_state(seed=5, sequences=1, groups=2, features=M):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(sequences, groups, features)), rng.normal(
        size=(sequences, groups, features, E)
    )


def tensors(inputs, dtype=tf.float64):
    """Inputs in T, the rest in U."""
    wide = tf.float64 if dtype == tf.float64 else tf.float32
    return {
        name: tf.cast(tf.constant(x), dtype if name in ("query", "key", "value") else wide)
        for name, x in inputs.items()
    }


def attend(inputs, state, causal, offsets=None, **attributes):
    """out, log_mass, mean by the composition; `state` (log_mass, mean) or None."""
    packing = {"offsets": tf.constant(offsets or [0], tf.int64), "packed": offsets is not None}
    key_side = {name: inputs[name] for name in ("key", "value", "key_projection", "key_bias")}
    query_side = {name: inputs[name] for name in ("query", "query_projection", "feature_bias")}
    if causal:
        groups, features = inputs["key"].shape[2], inputs["key_projection"].shape[1]
        if state is None:
            dtype = inputs["key_projection"].dtype
            state = (
                tf.fill([1, groups, features], tf.constant(-np.inf, dtype)),
                tf.zeros([1, groups, features, inputs["value"].shape[-1]], dtype),
            )
        initial = {"initial_log_mass": state[0], "initial_mean": state[1]}
        return composition.causal(**query_side, **key_side, **initial, **packing, **attributes)
    log_mass, mean = composition.summarize(**key_side, **packing, **attributes)
    attributes = {name: x for name, x in attributes.items() if name != "key_norm"}
    if state is not None:
        log_mass, mean = logsumexp.merge(*state, log_mass, mean)
    out = composition.read(**query_side, log_mass=log_mass, mean=mean, **packing, **attributes)
    return out, log_mass, mean
