"""The mathematics in NumPy float64: for one head (in three forms), and shaped like the operators.

Example:

>>> import numpy as np
>>> from performer import reference
>>> rng = np.random.default_rng(0)
>>> q, k, v, w = (rng.normal(size=shape) for shape in [(5, 4), (5, 4), (5, 3), (8, 4)])
>>> no_bias, no_mask = np.zeros(8), np.zeros(5)
>>> two_passes = reference.read(q, w, no_bias, reference.summarize(k, v, w, no_mask))
>>> bool(np.abs(two_passes - reference.direct(q, k, v, w, w, no_bias, no_mask)).max() < 1e-12)
True
"""

from performer.reference.attend import (
    attention,
    attention_gradients,
    near_far_attention,
    near_far_attention_gradients,
)
from performer.reference.heads import read_heads, summarize_heads
from performer.reference.near_far import (
    NearFar,
    near_far_direct,
    near_far_gradients,
    near_far_in_blocks,
)
from performer.reference.one_head import (
    NONE,
    FeatureMap,
    causal,
    direct,
    empty_state,
    exp_minus,
    key_log_features,
    load,
    log_features,
    log_features_slope,
    logsumexp,
    merge,
    read,
    recurrent,
    softmax,
    summarize,
)
from performer.reference.one_head_gradients import gradients

__all__ = [
    "NONE",
    "FeatureMap",
    "NearFar",
    "attention",
    "attention_gradients",
    "causal",
    "direct",
    "empty_state",
    "exp_minus",
    "gradients",
    "key_log_features",
    "load",
    "log_features",
    "log_features_slope",
    "logsumexp",
    "merge",
    "near_far_attention",
    "near_far_attention_gradients",
    "near_far_direct",
    "near_far_gradients",
    "near_far_in_blocks",
    "read",
    "read_heads",
    "recurrent",
    "softmax",
    "summarize",
    "summarize_heads",
]
