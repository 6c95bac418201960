"""The public function refuses what it cannot do: argument, rule and value are in the message."""

import numpy as np
import pytest

from performer.ops import favor_attention, read
from support.attention_inputs import B, E, H, L, random_state, random_tensors


def float32(*shape):
    return np.zeros(shape, np.float32)


BAD = {
    "query scalar": ({"query": 0.0}, ValueError, r"query must have shape \[B, L, H, D\].*\(\)"),
    "query rank 3": (
        {"query": float32(2, 9, 4)},
        ValueError,
        r"query must have shape.*\(2, 9, 4\)",
    ),
    "key rank 5": ({"key": float32(1, 2, 9, 2, 4)}, ValueError, r"key must have shape.*rank 4"),
    "query text": ({"query": [[[["a"]]]]}, TypeError, "query must be float32.*got string"),
    "query integer": ({"query": np.zeros((2, 9, 4, 4), int)}, TypeError, "query must.*got int64"),
    "key of another type": ({"key": np.zeros((2, 9, 2, 4))}, TypeError, "key must have the dtype"),
    "value half": ({"value": np.zeros((2, 9, 2, 3), "f2")}, TypeError, "value must have the dtype"),
    "batch": ({"key": float32(1, 9, 2, 4)}, ValueError, "key must have the B of query.*B = 1.*= 2"),
    "value length": ({"value": float32(2, 8, 2, 3)}, ValueError, "value must have the S of key"),
    "value groups": ({"value": float32(2, 9, 1, 3)}, ValueError, "value must have the G of key"),
    "key dim": ({"key": float32(2, 9, 2, 5)}, ValueError, "key must have the D of query.*D = 5"),
    "groups": (
        {"key": float32(2, 9, 3, 4), "value": float32(2, 9, 3, 3)},
        ValueError,
        "query must have a multiple of the 3 key/value heads.*got 4",
    ),
    "no key dim": (
        {"query": float32(2, 9, 4, 0), "key": float32(2, 9, 2, 0), "projection": float32(6, 0)},
        ValueError,
        "query must have D of at least 1",
    ),
    "projection vector": ({"projection": float32(4)}, ValueError, r"projection must have shape"),
    "projection dim": (
        {"projection": float32(6, 5)},
        ValueError,
        "projection must have the D of q",
    ),
    "projection heads": (
        {"projection": float32(3, 6, 4)},
        ValueError,
        "projection must have 1 or G = 2 or H = 4 on axis 0, got 3",
    ),
    "projection of query heads for keys": (
        {"projection": float32(4, 6, 4)},
        ValueError,
        "projection must have 1 or G = 2 on axis 0, got 4",
    ),
    "projection pair": (
        {"projection": (float32(6, 4), float32(7, 4))},
        ValueError,
        r"projection\[1\] must have the M of projection\[0\].*M = 7.*M = 6",
    ),
    "projection triple": (
        {"projection": (float32(6, 4),) * 3},
        ValueError,
        "projection must be one tensor, or a pair.*tuple of 3",
    ),
    "projection list": (
        {"projection": [float32(6, 4)] * 2},
        ValueError,
        "projection must be a tuple for a pair.*got a list of 2",
    ),
    "no features": (
        {"projection": float32(0, 4)},
        ValueError,
        "projection must have M of at least",
    ),
    "projection integer": (
        {"projection": np.zeros((6, 4), int)},
        TypeError,
        "projection must be fl",
    ),
    "mask type": ({"key_mask": float32(2, 9)}, TypeError, "key_mask must be bool.*got float32"),
    "mask rank": ({"key_mask": np.ones((2, 9, 1), bool)}, ValueError, "key_mask must have shape"),
    "mask batch": (
        {"key_mask": np.ones((1, 9), bool)},
        ValueError,
        "key_mask must have the B of k",
    ),
    "mask length": (
        {"key_mask": np.ones((2, 8), bool)},
        ValueError,
        "key_mask must have the S of k",
    ),
    "bias groups": (
        {"key_bias": float32(2, 4, 9)},
        ValueError,
        "key_bias must have 1 or G = 2.*got 4",
    ),
    "bias length": (
        {"key_bias": float32(2, 8)},
        ValueError,
        "key_bias must have 1 or S = 9.*got 8",
    ),
    "feature bias": ({"feature_bias": float32(5)}, ValueError, "feature_bias must have the M of"),
    "segment type": ({"segment_ids": float32(2, 9)}, TypeError, "segment_ids must be integers"),
    "segment length": (
        {"segment_ids": np.ones((2, 8), int)},
        ValueError,
        "segment_ids must have the S",
    ),
    "max_segments": (
        {"segment_ids": np.ones((2, 9), int), "max_segments": 0},
        ValueError,
        "max_segments must be an integer of at least 1, got 0",
    ),
    "max_segments alone": ({"max_segments": 3}, ValueError, "max_segments needs segment_ids"),
    "causal lengths": (
        {"query": float32(2, 5, 4, 4), "causal": True},
        ValueError,
        "query must have the length.*5.*9",
    ),
    "feature map": ({"feature_map": "cosine"}, ValueError, "feature_map must be one of.*'cosine'"),
    "scale NaN": ({"scale": float("nan")}, ValueError, "scale must be finite and above 0.*got nan"),
    "scale 0": ({"scale": 0.0}, ValueError, "scale must be finite and above 0.*got 0.0"),
    "scale 0 in float32": ({"scale": 1e-50}, ValueError, "scale .*in float32, got 1e-50"),
    "scale inf in float32": ({"scale": 1e300}, ValueError, r"scale .*in float32, got 1e\+300"),
    "epsilon 0 in float32": ({"feature_epsilon": 1e-50}, ValueError, "feature_epsilon .*got 1e-50"),
    "scale text": ({"scale": "x"}, TypeError, "scale must be a Python number, got 'x'"),
    "epsilon": (
        {"feature_epsilon": -1.0},
        ValueError,
        "feature_epsilon must be finite and not below",
    ),
    "state type": ({"initial_state": (0, 1)}, TypeError, "initial_state must be an AttentionState"),
    "state dtype": (
        {"initial_state": random_state()},
        TypeError,
        "initial_state.log_mass must be fl",
    ),
    "draw": ({"draw": 0.5}, TypeError, "draw must be an integer, got float32"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named_with_rule_and_value_and_the_next_call_is_right(
    change, error, message
):
    good = {name: value.astype(np.float32) for name, value in random_tensors().items()}
    with pytest.raises(error, match=message):
        favor_attention(**{**good, **change})
    assert favor_attention(**good).shape == [B, L, H, E]


def test_states_that_do_not_fit_are_refused():
    x = random_tensors()
    with pytest.raises(ValueError, match=r"same draw.*got 0 and 2"):
        favor_attention(**x, initial_state=random_state(draw=2), draw=0)
    with pytest.raises(ValueError, match=r"initial_state\.log_mass must have 1 or B = 2.*got 3"):
        favor_attention(**x, initial_state=random_state(sequences=3), draw=0)
    with pytest.raises(ValueError, match=r"state\.log_mass must have the B of query"):
        read(x["query"], x["projection"], random_state(sequences=1))
    state = random_state()
    with pytest.raises(ValueError, match=r"state\.mean must have the N of state\.log_mass"):
        read(x["query"], x["projection"], state._replace(mean=state.mean[:1]))
    with pytest.raises(ValueError, match=r"initial_state\.mean must have the E of value"):
        favor_attention(**x, initial_state=state._replace(mean=state.mean[..., :2]))
