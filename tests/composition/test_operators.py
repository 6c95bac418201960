"""The plain TensorFlow composition against the reference: values, masks, packing, types."""

import numpy as np
import pytest
import tensorflow as tf

from performer import reference
from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_finite, assert_same_bits
from support.composition_calls import MAPS, E, attend, random_inputs, random_state, tensors
from support.inputs import forms

SHAPES = {
    "one projection, one bias": {"projections": (1, 1), "bias": (1, 1, 1)},
    "projection of each group, bias of each group": {"projections": (2, 2), "bias": (1, 2, 9)},
    "one head, one row": {
        "heads": 1,
        "groups": 1,
        "rows": 1,
        "projections": (1, 1),
        "bias": (2, 1, 1),
    },
    "several chunks": {"rows": 150, "batch": 1, "bias": (1, 1, 150)},
    "full chunks": {"rows": 128, "batch": 1, "bias": (1, 2, 1)},
}


@forms
@pytest.mark.parametrize(
    ("shape", "attributes"),
    [({}, attributes) for attributes in MAPS.values()] + [(shape, {}) for shape in SHAPES.values()],
    ids=[*MAPS, *SHAPES],
)
def test_float64_values_are_those_of_the_reference(attributes, causal, shape):
    inputs = random_inputs(**shape)
    bound = tolerances("float64").rms
    for initial in (None, random_state(groups=inputs["key"].shape[2])):
        got = attend(tensors(inputs), initial, causal, **attributes)
        out, final = reference.attention(
            **inputs, causal=causal, initial_state=initial, **attributes
        )
        for name, x, y in zip(("out", "log_mass", "mean"), got, (out, *final), strict=True):
            assert_close(x, y, relative=bound, what=name)


@forms
@pytest.mark.parametrize(
    "offsets", [[0, 5, 5, 6, 12], [0, 64, 64, 193, 195, 260], [0, 0], [0]], ids=str
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_packed_sequences_are_those_of_the_reference(causal, offsets, graph):
    rows, sequences = offsets[-1], len(offsets) - 1
    inputs = random_inputs(batch=1, rows=rows, bias=(1, 2, rows))
    state = random_state(sequences=sequences)
    call = tf.function(attend, autograph=False) if graph else attend
    got = call(tensors(inputs), state, causal, offsets)
    out, final = reference.attention(**inputs, causal=causal, offsets=offsets, initial_state=state)
    for name, x, y in zip(("out", "log_mass", "mean"), got, (out, *final), strict=True):
        assert_close(x, y, relative=1e-12, what=name)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("std", [0.5, 3.0])
def test_other_types_keep_their_tolerance(causal, dtype, std):
    inputs = random_inputs(
        batch=1, rows=130, std=std, dim=64, features=64, projections=(1, 1), bias=(1, 1, 130)
    )
    narrow = tensors(inputs, tf.as_dtype(dtype))
    out, log_mass, mean = attend(narrow, None, causal)
    assert (out.dtype.name, log_mass.dtype, mean.dtype) == (dtype, tf.float32, tf.float32)
    expected, _ = reference.attention(
        **{name: x.numpy() for name, x in narrow.items()}, causal=causal
    )
    bound = tolerances(dtype, causal=causal)
    assert_close(out, expected, rms=bound.rms, worst=bound.worst)


@forms
def test_one_key_head_of_several_rows_in_float32(causal):
    """Its product with one projection would broadcast, which TensorFlow's oneDNN gets wrong."""
    inputs = random_inputs(batch=3, heads=2, groups=1, projections=(1, 1), bias=(1, 1, 1))
    out, _, _ = attend(tensors(inputs, tf.float32), None, causal)
    expected, _ = reference.attention(**inputs, causal=causal)
    assert_close(out, expected, rms=tolerances("float32").rms)


def test_the_projection_is_rounded_once_and_its_gradient_passes_straight_through():
    inputs = tensors(random_inputs(projections=(1, 1)), tf.bfloat16)
    rounded = {
        **inputs,
        "query_projection": tf.cast(tf.cast(inputs["query_projection"], tf.bfloat16), tf.float32),
    }
    out = []
    for x in (inputs, rounded):
        with tf.GradientTape() as tape:
            tape.watch(x["query_projection"])
            out.append(attend(x, None, causal=True)[0])
        out.append(tape.gradient(out[-1], x["query_projection"]))
    assert_same_bits(tf.bitcast(out[0], tf.uint16), tf.bitcast(out[2], tf.uint16), what="out")
    assert_same_bits(out[1], out[3], what="gradient")
    assert np.any(out[1].numpy() != tf.cast(tf.cast(out[1], tf.bfloat16), tf.float32).numpy())


@forms
@pytest.mark.parametrize("size", [1e4, 300.0])
def test_huge_entries_stay_finite_and_right(causal, size):
    inputs = random_inputs(rows=20, bias=(1, 1, 1), projections=(1, 1))
    inputs["query"], inputs["key"] = (
        np.clip(inputs[n] * size, -size, size) for n in ("query", "key")
    )
    wide = tensors(inputs, tf.float32)
    out = attend(wide, None, causal)[0]
    assert_finite(out)
    # The weights are those of float32 log-features: exact ones would differ by whole nats at 1e4.
    expected, _ = reference.attention(**inputs, causal=causal)
    assert_close(attend(tensors(inputs), None, causal)[0], expected, worst=1e-6)


def test_the_future_cannot_change_a_bit_of_the_past_nor_of_its_query_gradient():
    inputs = random_inputs(rows=140, batch=1, bias=(1, 1, 140), std=2.0)
    inputs["key_bias"][:] = 0
    for cut in (63, 97):
        results = []
        for poison in (None, np.nan, 1e30):
            changed = {name: x.copy() for name, x in inputs.items()}
            if poison is not None:
                changed["key"][:, cut:], changed["value"][:, cut:] = poison, poison
            changed = tensors(changed, tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(changed["query"])
                out = attend(changed, None, causal=True)[0]
            grad = tape.gradient(out, changed["query"], tf.ones_like(out))
            results.append((out[:, :cut], grad[:, :cut]))
        for poisoned in results[1:]:
            assert_same_bits(poisoned[0], results[0][0], what=f"out before {cut}")
            assert_same_bits(poisoned[1], results[0][1], what=f"query gradient before {cut}")


@forms
def test_nothing_leaks_from_one_packed_sequence_into_another(causal):
    offsets = [0, 3, 70, 200, 207]
    inputs = random_inputs(batch=1, rows=207, bias=(1, 1, 207))
    results = []
    for poison in (None, np.nan, 1e30):
        changed = {name: x.copy() for name, x in inputs.items()}
        if poison is not None:
            for name in ("query", "key", "value"):
                changed[name][:, 3:70] = poison
        initial = [tf.cast(x, tf.float32) for x in random_state()]
        out, *state = attend(tensors(changed, tf.float32), initial, causal, offsets)
        results.append([np.delete(out, slice(3, 70), 1), *(np.delete(x, 1, 0) for x in state)])
    for poisoned in results[1:]:
        for x, y in zip(poisoned, results[0], strict=True):
            assert_same_bits(x, y)


@forms
def test_a_nan_in_an_unmasked_key_shows(causal):
    inputs = random_inputs(rows=9, bias=(1, 1, 1))
    inputs["key"][1, 4, 1] = np.nan
    out = attend(tensors(inputs, tf.float32), None, causal)[0].numpy()
    sees = np.zeros((2, 9, 4, E), bool)
    sees[1, 4 if causal else 0 :, 2:] = True
    assert np.array_equal(np.isnan(out), sees)


@forms
@pytest.mark.parametrize("empty", ["batch", "rows", "values"])
def test_empty_axes_give_empty_or_zero_results(causal, empty):
    inputs = random_inputs(bias=(1, 1, 1))
    for name in ("query", "key", "value"):
        x = inputs[name]
        cut = {"batch": x[:0], "rows": x[:, :0], "values": x[..., :0] if name == "value" else x}
        inputs[name] = cut[empty]
    inputs = tensors(inputs, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out, log_mass, _ = attend(inputs, None, causal)
    assert out.shape == [*inputs["query"].shape[:3], inputs["value"].shape[-1]]
    for name, grad in tape.gradient(out, inputs).items():
        assert_same_bits(grad, np.zeros(inputs[name].shape, np.float32), what=name)
    if empty == "rows":
        assert np.all(log_mass.numpy() == -np.inf)


def test_queries_without_any_key_give_zero():
    inputs = random_inputs(bias=(1, 1, 1))
    inputs["key"], inputs["value"] = inputs["key"][:, :0], inputs["value"][:, :0]
    out = attend(tensors(inputs, tf.float32), None, causal=False)[0]
    assert_same_bits(out, np.zeros((2, 9, 4, E), np.float32))


@forms
def test_shapes_known_only_at_run_time_give_the_same(causal):
    inputs = tensors(random_inputs(batch=1, rows=75, bias=(1, 1, 75)))
    expected = attend(inputs, None, causal)
    spec = {
        name: tf.TensorSpec([None, None, *x.shape[2:]] if x.shape.rank == 4 else x.shape, x.dtype)
        for name, x in inputs.items()
    }
    traced = tf.function(lambda x: attend(x, None, causal), input_signature=[spec], autograph=False)
    for got, want in zip(traced(inputs), expected, strict=True):
        assert_close(got, want, worst=1e-13)
