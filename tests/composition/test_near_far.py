"""NearFar in plain TensorFlow against the reference: values, gradients, masks, packing, types."""

import numpy as np
import pytest
import tensorflow as tf

from performer import composition, reference
from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_finite, assert_same_bits
from support.composition_calls import E, random_inputs, random_state, tensors
from support.inputs import forms

RESULTS = ("out", "log_weight", "log_mass", "mean")


def attend(inputs, state=None, offsets=None, **attributes):
    """Results by name; `state` (log_mass, mean) or None."""
    if state is None:
        groups, features = inputs["key"].shape[2], inputs["key_projection"].shape[1]
        dtype = inputs["key_projection"].dtype
        state = (
            tf.fill([1, groups, features], tf.constant(-np.inf, dtype)),
            tf.zeros([1, groups, features, inputs["value"].shape[-1]], dtype),
        )
    results = composition.near_far(
        **inputs,
        initial_log_mass=state[0],
        initial_mean=state[1],
        offsets=tf.constant(offsets or [0], tf.int64),
        packed=offsets is not None,
        **attributes,
    )
    return dict(zip(RESULTS, results, strict=True))


def expected(inputs, state=None, offsets=None, **attributes):
    """The same by the reference."""
    out, log_weight, final = reference.near_far_attention(
        **inputs, initial_state=state, offsets=offsets, **attributes
    )
    return dict(zip(RESULTS, (out, log_weight, *final), strict=True))


def of_queries(inputs, count):
    """The inputs with the last `count` queries only."""
    return {**inputs, "query": inputs["query"][:, -count:]}


CASES = {
    "blocks of 3": ({}, {"exact_window": 3}),
    "blocks of 1": ({"rows": 7, "bias": (2, 2, 7)}, {"exact_window": 1}),
    "a block holds all": ({}, {"exact_window": 16}),
    "blocks end with the sequence": ({"rows": 8, "bias": (1, 2, 1)}, {"exact_window": 2}),
    "start inside a block": ({}, {"exact_window": 4, "start": 7}),
    "no norms, scale 0.3": (
        {"projections": (1, 1), "bias": (2, 1, 1)},
        {"exact_window": 2, "scale": 0.3, "key_norm": False, "query_norm": False},
    ),
    "one head, one row": (
        {"heads": 1, "groups": 1, "rows": 1, "projections": (1, 1), "bias": (1, 1, 1)},
        {"exact_window": 2, "start": 1},
    ),
    "many blocks, which are scanned": (
        {"rows": 45, "batch": 1, "bias": (1, 1, 45)},
        {"exact_window": 4, "start": 2},
    ),
}


@forms
@pytest.mark.parametrize(("shape", "attributes"), CASES.values(), ids=CASES.keys())
def test_values_are_those_of_the_reference(shape, attributes, causal):
    inputs = random_inputs(**shape)
    for state in (None, random_state(groups=inputs["key"].shape[2])):
        got = attend(tensors(inputs), state, causal=causal, **attributes)
        for name, x in expected(inputs, state, causal=causal, **attributes).items():
            assert_close(got[name], x, relative=1e-12, what=name)


@pytest.mark.parametrize("queries", [0, 1, 4])
@pytest.mark.parametrize("start_is_known", [False, True])
def test_fewer_queries_than_keys_are_the_last_rows(queries, start_is_known):
    inputs = of_queries(random_inputs(rows=11, bias=(2, 1, 11)), queries)
    inputs["query"] = inputs["query"][:, :queries]
    attributes = {"exact_window": 3, "causal": True}

    @tf.function(autograph=False)
    def call(start):
        return attend(tensors(inputs), random_state(), start=start, **attributes)

    for start in (0, 5):
        got = call(start if start_is_known else tf.constant(start, tf.int64))
        exact = expected(inputs, random_state(), start=start, **attributes)
        for name, x in exact.items():
            assert_close(got[name], x, relative=1e-12, what=name)


OFFSETS = ([0, 5, 5, 6, 12], [0, 2, 20, 24, 41], [0, 0], [0])


@forms
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_packed_sequences_are_those_of_the_reference(causal, offsets):
    rows, sequences = offsets[-1], len(offsets) - 1
    inputs = random_inputs(batch=1, rows=rows, bias=(1, 2, rows))
    state = random_state(sequences=sequences)
    attributes = {"exact_window": 3, "causal": causal}
    got = attend(tensors(inputs), state, offsets, **attributes)
    for name, x in expected(inputs, state, offsets, **attributes).items():
        assert_close(got[name], x, relative=1e-12, what=name)


def test_rows_of_no_sequence_are_0_and_weigh_nothing():
    inputs = random_inputs(batch=1, rows=12, bias=(1, 2, 12))
    got = attend(tensors(inputs), None, [2, 5, 9], exact_window=2, causal=True)
    for rows in (slice(0, 2), slice(9, 12)):
        assert_same_bits(got["out"][:, rows], np.zeros_like(got["out"][:, rows]))
        assert np.all(got["log_weight"][:, rows] == -np.inf)


@forms
@pytest.mark.parametrize(
    ("shape", "offsets", "attributes"),
    [
        ({"rows": 9, "bias": (2, 1, 9)}, None, {"exact_window": 2, "start": 3}),
        ({"rows": 7, "bias": (2, 1, 7)}, None, {"exact_window": 2, "key_norm": False}),
        ({"batch": 1, "rows": 11, "bias": (1, 2, 11)}, [0, 6, 6, 11], {"exact_window": 1}),
    ],
    ids=["plain", "no key norm", "packed"],
)
def test_gradients_are_those_of_the_reference(causal, shape, offsets, attributes):
    inputs = random_inputs(**shape)
    state = random_state(sequences=1)
    attributes = {"causal": causal, **attributes}
    exact = expected(inputs, state, offsets, **attributes)
    rng = np.random.default_rng(7)
    incoming = {name: rng.normal(size=x.shape) for name, x in exact.items()}
    x, initial = tensors(inputs), [tf.constant(s) for s in state]
    with tf.GradientTape() as tape:
        tape.watch([x, initial])
        results = attend(x, initial, offsets, **attributes)
    grads = tape.gradient(results, [x, initial], {n: tf.constant(g) for n, g in incoming.items()})
    got = {**grads[0], "initial_log_mass": grads[1][0], "initial_mean": grads[1][1]}
    wanted = reference.near_far_attention_gradients(
        **inputs,
        grad_out=incoming["out"],
        grad_log_weight=incoming["log_weight"],
        grad_state=(incoming["log_mass"], incoming["mean"]),
        initial_state=state,
        offsets=offsets,
        **attributes,
    )
    for name, grad in got.items():
        assert_close(grad, wanted[name], relative=1e-10, what=name)


@forms
def test_rows_that_see_nothing_have_gradient_0_of_every_order(causal):
    inputs = random_inputs(batch=1, rows=5, bias=(1, 1, 5))
    inputs["key_bias"][:] = -np.inf
    x = tensors(inputs)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            results = attend(x, None, exact_window=2, causal=causal)
            loss = tf.reduce_sum(results["out"]) + tf.reduce_sum(
                tf.where(results["log_weight"] > -np.inf, results["log_weight"], 0)
            )
        grads = inner.gradient(loss, x)
        total = tf.add_n([tf.reduce_sum(g**2) for g in grads.values()])
    for name, grad in {**grads, **outer.gradient(total, x)}.items():
        assert_same_bits(grad, np.zeros(grad.shape), what=name)
    assert np.all(results["log_weight"] == -np.inf)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("std", [0.5, 3.0])
def test_other_types_keep_their_tolerance(causal, dtype, std):
    inputs = random_inputs(
        batch=1, rows=130, std=std, dim=64, features=64, projections=(1, 1), bias=(1, 1, 130)
    )
    narrow = tensors(inputs, tf.as_dtype(dtype))
    got = attend(narrow, exact_window=16, causal=causal)
    assert [x.dtype.name for x in got.values()] == [dtype, *["float32"] * 3]
    exact = expected(
        {name: x.numpy() for name, x in narrow.items()}, exact_window=16, causal=causal
    )
    bound = tolerances(dtype, causal=causal)
    assert_close(got["out"], exact["out"], rms=bound.rms, worst=bound.worst)
    assert_close(got["log_weight"], exact["log_weight"], rms=bound.rms)


@forms
def test_a_masked_key_changes_nothing_whatever_it_holds(causal):
    inputs = random_inputs(rows=9, bias=(2, 1, 9))
    masked = np.broadcast_to(inputs["key_bias"][:, 0, :] == -np.inf, (2, 9))
    dirty = {name: x.copy() for name, x in inputs.items()}
    dirty["key"][masked], dirty["value"][masked] = np.nan, np.inf
    results = []
    for case in (inputs, dirty):
        x = tensors(case)
        with tf.GradientTape() as tape:
            tape.watch(x)
            got = attend(x, random_state(), exact_window=2, causal=causal)
            loss = tf.add_n([tf.reduce_sum(y**2) for y in got.values()])
        results.append({**got, **{f"d{n}": g for n, g in tape.gradient(loss, x).items()}})
    for name, x in results[1].items():
        assert_finite(x, what=name)
        assert_same_bits(x, results[0][name], what=name)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_the_future_cannot_change_a_bit_of_the_past_nor_of_its_query_gradient(poison):
    clean = random_inputs(rows=12, bias=(1, 1, 1), std=0.5)
    dirty = {name: x.copy() for name, x in clean.items()}
    dirty["key"][:, 7], dirty["value"][:, 8] = poison, poison
    results = []
    for case in (clean, dirty):
        x = tensors(case, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x["query"])
            got = attend(x, exact_window=4, causal=True)
            loss = tf.reduce_sum(got["out"][:, :7]) + tf.reduce_sum(got["log_weight"][:, :7])
        grad = tape.gradient(loss, x["query"])
        results.append([got["out"][:, :7], got["log_weight"][:, :7], grad[:, :7]])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@forms
def test_a_nan_shows_in_the_rows_that_see_it(causal):
    for name in ("key", "value"):
        inputs = random_inputs(rows=12, bias=(1, 1, 1))
        inputs[name][0, 5, 0] = np.nan
        out = attend(tensors(inputs), exact_window=3, causal=causal)["out"].numpy()
        sees = np.zeros(out.shape, bool)
        sees[0, 5 if causal else 0 :, :2] = True
        assert np.array_equal(np.isnan(out), sees), name


def test_windows_of_every_size_agree_where_the_features_are_many():
    inputs = random_inputs(batch=1, rows=8, heads=1, groups=1, bias=(1, 1, 1), std=0.5)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(1, 200_000, 4))
    inputs |= {"query_projection": w, "key_projection": w, "feature_bias": np.zeros((1, 200_000))}
    results = [attend(tensors(inputs), exact_window=n, causal=True)["out"] for n in (1, 2, 8)]
    assert results[0].shape == (1, 8, 1, E)
    for x in results[:2]:
        assert_close(x, results[2], worst=0.02)
