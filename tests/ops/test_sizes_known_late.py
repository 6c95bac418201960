"""What is refused for known sizes is refused for sizes that only the running graph knows."""

import numpy as np
import pytest
import tensorflow as tf

from performer import reference
from performer.ops import AttentionState, favor_attention, merge, read
from performer.ops.dense import dense_attention
from performer.ops.sizes import LAYOUTS, wait_for_sizes
from support.attention_inputs import B, D, E, G, H, L, M, random_state, random_tensors
from support.compare import assert_close
from support.core_calls import _core
from support.inputs import forms
from support.operator_calls import needs_library, needs_xla


def late(function, compiled=False, **inputs):
    """Calls a function on tensors of which the graph knows ranks and types only."""
    inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    spec = tf.nest.map_structure(lambda x: tf.TensorSpec([None] * x.shape.rank, x.dtype), inputs)
    call = tf.function(
        lambda given: function(**given),
        input_signature=[spec],
        jit_compile=compiled,
        autograph=False,
    )
    return call(inputs)


def attend(**options):
    options = {"feature_map": "softmax", "draw": 0, **options}
    return lambda **tensors: favor_attention(**tensors, **options)


def plain(u):
    return u  # a function: takes the composition


def state(**sizes):
    n, g, m, e = ({"N": B, "G": G, "M": M, "E": E, **sizes}[x] for x in "NGME")
    rng = np.random.default_rng(0)
    return AttentionState(rng.normal(size=[n, g, m]), rng.normal(size=[n, g, m, e]), 0)


ids = np.zeros([B, L], np.int32)
BROADCAST = {
    "initial state, M": (attend(), {"initial_state": state(M=1)}, "M of"),
    "initial state, E": (attend(), {"initial_state": state(E=1)}, "E of"),
    "initial state, G": (attend(), {"initial_state": state(G=1)}, "G of"),
    "mask, batch": (attend(), {"key_mask": np.ones([1, L], bool)}, "key_mask must have the B"),
    "mask, length": (attend(), {"key_mask": np.ones([B, 1], bool)}, "key_mask must have the S"),
    "segments, batch": (attend(), {"segment_ids": ids[:1]}, "segment_ids must have the S|B of key"),
    "segments, turned": (attend(), {"segment_ids": ids.T}, "segment_ids must have the S|B of key"),
    "packed, turned query": (
        attend(),
        {"segment_ids": ids, "query": np.zeros([L, B, H, D])},
        "query must have the S|B of key",
    ),
    "packed, turned value": (
        attend(),
        {"segment_ids": ids, "value": np.zeros([L, B, G, E])},
        "value must have the S|B of key",
    ),
}
COMPOSED = {
    "value, length": {"value": np.zeros([B, 1, G, E])},
    "value, batch": {"value": np.zeros([1, L, G, E])},
    "projection, D": {"projection": np.zeros([M, 1])},
    "projection, heads": {"projection": np.zeros([3, M, D])},
    "feature bias, M": {"feature_bias": np.zeros([1])},
    "key bias, batch": {"key_bias": np.zeros([3, L])},
}


def assert_refused(function, message, **inputs):
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
        late(function, **inputs)


@pytest.mark.parametrize(("call", "change", "message"), BROADCAST.values(), ids=BROADCAST)
def test_sizes_that_would_broadcast_are_refused(call, change, message):
    assert_refused(call, message, **{**random_tensors(), **change})


@needs_library
@needs_xla
@pytest.mark.parametrize("name", ["initial state, M", "mask, length", "segments, turned"])
def test_xla_refuses_them_too(name):
    call, change, _ = BROADCAST[name]
    x = {k: tf.cast(v, v.dtype) for k, v in random_tensors().items()}
    if "segment_ids" in change:
        call = attend(max_segments=1)
    assert late(call, compiled=True, **x, **good(change)).shape == [B, L, H, E]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        late(call, compiled=True, **{**x, **change})


def good(change):
    values = {
        "initial_state": state(),
        "key_mask": np.ones([B, L], bool),
        "segment_ids": ids,
    }
    return {name: values[name] for name in change if name in values}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=[] if name == "value, length" else pytest.mark.slow)
        for name, change in COMPOSED.items()
    ],
)
def test_the_composition_refuses_what_the_operators_refuse(change):
    (name,) = change
    x = {**random_tensors(), **change}
    calls = [attend(feature_map=plain, causal=causal) for causal in (False, True)]
    for call in (*calls, dense_attention):
        assert_refused(call, f"{name.split('_')[0]}.* must have", **x)


def test_every_input_waits_for_the_checks():
    """Otherwise the message is TensorFlow's own where an operation comes before a check."""

    def traced(**inputs):
        waiting = wait_for_sizes("dense", {**inputs, "scale": 1.0})
        assert waiting.pop("scale") == 1.0
        for name, x in waiting.items():
            assert len(x.op.control_inputs) > 5, name
        return waiting["query"]

    x = random_tensors()
    sides = ("query_projection", "key_projection")
    x.update(dict.fromkeys(sides, x.pop("projection")[None]))
    late(traced, **x, feature_bias=np.zeros([1, M]), key_bias=np.zeros([B, G, L]))


@pytest.mark.parametrize("shape", [(B, 1, 1, L), (B, 1, L, 1)])
def test_masks_of_pairs_that_would_broadcast_are_refused(shape):
    assert_refused(
        dense_attention, "mask must have the", **random_tensors(), mask=np.ones(shape, bool)
    )


@pytest.mark.parametrize("letter", "GME")
def test_merged_states_must_have_the_same_sizes(letter):
    assert_refused(merge, f"must have the {letter} of", first=state(), second=state(**{letter: 1}))
    one = state(N=1)
    assert late(merge, first=state(), second=one).mean.shape == [B, G, M, E]
    torn = state()._replace(mean=state(**({} if letter == "E" else {letter: 1})).mean[:1])
    assert_refused(merge, "must have the", first=torn, second=state())


@forms
def test_what_fits_is_computed(causal):
    x = random_tensors()
    expected = reference.attention(
        *x.values(), initial_state=random_state()[:2], causal=causal, feature_map="softmax"
    )[0]
    for feature_map in ("softmax", plain):
        out = late(
            attend(feature_map=feature_map, causal=causal, key_norm=True),
            **x,
            initial_state=random_state()._replace(draw=0),
            key_mask=np.ones([B, L], bool),
            feature_bias=np.zeros([G, M]),
        )
        if feature_map == "softmax":
            assert_close(out, expected, relative=1e-12)
        assert out.shape == [B, L, H, E]


@needs_library
@pytest.mark.parametrize("operator", ["summarize", "read", "causal"])
def test_layouts_are_those_of_the_core(operator):
    declared = {
        name: layout
        for name, _, layout in _core.signature(operator.capitalize())["inputs"]
        if name != "offsets"
    }
    assert LAYOUTS[operator] == declared


def test_a_state_that_is_read_fits():
    x = random_tensors()

    def call(query, projection, log_mass, mean):
        return read(query, projection, AttentionState(log_mass, mean, 0), draw=0, feature_map=plain)

    for broken in (state(M=1), state(N=1)):
        assert_refused(
            call, "must have", query=x["query"], projection=x["projection"],
            log_mass=broken.log_mass, mean=broken.mean,
        )  # fmt: skip
