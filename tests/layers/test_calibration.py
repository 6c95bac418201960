"""Calibration: features fitted to given queries and keys come closer to softmax, and stay right."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import convert
from performer.features import fitting
from support.compare import assert_close

NAMES = ["query_projection", "key_projection", "query_bias"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sharp(length=96, batch=8, seed=0):
    """Inputs of a few directions and of a common mean, as trained models have them."""
    few = normal(4, 16, seed=1)
    x = normal(batch, length, 4, seed=seed) @ few + normal(16, seed=2)
    return (x + 0.3 * normal(batch, length, 16, seed=seed + 10)).astype("float32")


def pair(**options):
    """A layer with learned features, and exact attention with its weights."""
    groups = options.get("num_key_value_heads")
    keras.utils.set_random_seed(1)
    learned = performer.Performer(4, 8, supports=16, feature_map="learned", seed=5, **options)
    exact = performer.Performer(4, 8, num_key_value_heads=groups, attention_method="quadratic")
    for layer in (learned, exact):
        layer.build((None, None, 16), (None, None, 16))
    convert.copy_weights(learned, exact)
    return learned, exact


def distance(layer, exact, x, **call):
    """Distance of the outputs to exact ones, 1 for uniform weights."""
    out, expected = layer(x, x, **call), exact(x, x, **call)
    v = exact.value_dense(x)
    mask = call.get("value_mask")
    seen = np.ones(x.shape[:2], bool) if mask is None else mask
    if call.get("use_causal_mask"):
        weight = np.tri(x.shape[1]) * seen[:, None]
    else:
        weight = np.broadcast_to(seen[:, None], (*x.shape[:2], x.shape[1])).astype("float64")
    weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1)
    uniform = exact.output_dense(np.einsum("bts,bshe->bthe", weight, v).astype("float32"))
    return np.linalg.norm(out - expected) / np.linalg.norm(uniform - expected)


CALLS = {
    "all keys": ({}, {}),
    "causal": ({}, {"use_causal_mask": True}),
    "grouped heads": ({"num_key_value_heads": 2}, {}),
    "window": ({"exact_window": 64}, {}),
    "window and causal": ({"exact_window": 64, "far_bias": -1.0}, {"use_causal_mask": True}),
    "exact keys": ({"exact_keys": 8}, {}),
    "rotary": ({"rotary_embedding": performer.RotaryEmbedding()}, {}),
}


@pytest.mark.parametrize("case", CALLS)
def test_the_error_falls_on_inputs_that_it_has_not_seen(case):
    options, call = CALLS[case]
    length = 256 if "exact_window" in options else 96
    layer, exact = pair(**options)
    x, other = sharp(length), sharp(length, seed=5)
    if case != "rotary":
        before = distance(layer, exact, other, **call)
    found = layer.calibrate(x, **call)
    assert len(found.before) == len(found.after) == 4
    assert np.all(found.after <= found.before)
    assert np.mean(found.after) < 0.8 * np.mean(found.before)
    if case != "rotary":
        # Beside a window the features have less to win.
        bound = 0.97 if "exact_window" in options else 0.8
        assert distance(layer, exact, other, **call) < bound * before


def test_the_reported_error_is_that_of_the_heads():
    """Of all rows of the sequences that were held out, by the layer's own attention."""
    layer, _ = pair()
    x = sharp(batch=2)
    found = layer.calibrate(x)
    q, k, v = (f(x) for f in (layer.query_dense, layer.key_dense, layer.value_dense))
    out = performer.favor_attention(q, k, v, **layer.random_features().for_attention()).numpy()
    scores = np.einsum("bthd,bshd->bhts", q, k) / 8**0.5
    exact = np.einsum("bhts,bshe->bthe", tf.nn.softmax(scores), v)
    uniform = np.mean(v, 1, keepdims=True)
    by_sequence = [
        np.sqrt(
            np.sum((out[b] - exact[b]) ** 2, (0, 2)) / np.sum((uniform[b] - exact[b]) ** 2, (0, 2))
        )
        for b in range(2)
    ]
    assert min(np.abs(e - found.after).max() for e in by_sequence) < 0.1


def test_the_result_is_that_of_the_seed():
    x, weights = sharp(), []
    for seed in (1, 1, 2):
        layer, _ = pair()
        layer.calibrate(x, seed=seed, steps=2)
        weights.append([getattr(layer.learned_projection, name).numpy() for name in NAMES])
    for one, other, third in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, third)


@pytest.mark.parametrize("what", ["value_mask", "segment_ids", "prefix_mask"])
def test_what_masks_hide_has_no_part_in_it(what):
    x = sharp(length=128)
    call = {"use_causal_mask": True}
    if what == "value_mask":
        mask = np.arange(128) < np.arange(60, 140, 10)[:, None]
        call |= {"value_mask": mask, "query_mask": mask}
        junk = np.where(mask[..., None], x, np.nan)
    else:
        later = np.arange(128) >= 100
        if what == "segment_ids":
            call["segment_ids"] = np.broadcast_to(later.astype("int32"), (8, 128))
        else:
            call["prefix_mask"] = np.broadcast_to(later, (8, 128))
        junk = x
    layer, _ = pair()
    before = [getattr(layer.learned_projection, name).numpy() for name in NAMES]
    found = layer.calibrate(junk, **call)
    assert np.mean(found.after) < 0.8 * np.mean(found.before)
    for old, name in zip(before, NAMES, strict=True):
        new = getattr(layer.learned_projection, name).numpy()
        assert np.isfinite(new).all() and not np.array_equal(new, old)
    if what == "value_mask":
        again, _ = pair()
        again.calibrate(np.where(call["value_mask"][..., None], x, 7), **call)
        np.testing.assert_array_equal(again.learned_projection.query_projection, new_of(layer))


def new_of(layer):
    return layer.learned_projection.query_projection


def test_only_the_features_change():
    layer, _ = pair(exact_window=64, far_bias="learned")
    before = [(w.path, w.numpy()) for w in layer.weights]
    layer.calibrate(sharp(256), steps=1)
    for (path, old), weight in zip(before, layer.weights, strict=True):
        changed = not np.array_equal(old, weight)
        assert changed == ("learned_projection" in path)


def test_without_steps_the_proposals_are_measured():
    layer, _ = pair()
    found = layer.calibrate(sharp(), steps=0)
    assert set(found.candidates) == {"as it was", *fitting.PROPOSALS}
    assert np.mean(found.candidates["dense"]) < np.mean(found.before)


@pytest.mark.parametrize("name", fitting.PROPOSALS)
def test_proposals_estimate_the_weights_without_bias(name):
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(3, 3)) / 4
    moments = [rng.normal(size=3) / 2, spread @ spread.T, rng.normal(size=3) / 2, spread.T @ spread]
    w, c = fitting.proposal(name, rng.normal(size=(1_000_000, 3)), *moments)
    x, y = rng.normal(size=(2, 5, 3)) / 4
    a = x @ w.T - np.sum(x**2, -1, keepdims=True) / 2 + c
    b = y @ w.T - np.sum(y**2, -1, keepdims=True) / 2
    estimate = np.exp(a) @ np.exp(b).T / len(w)
    assert_close(estimate, np.exp(x @ y.T), relative=0.03)


def test_every_step_lowers_the_divergence_from_softmax():
    rng = np.random.default_rng(0)
    x, y, v = (rng.normal(size=(2, n, 4)).astype("float32") for n in (30, 40, 40))
    far = np.ones((1, 1, 30, 40), "float32")
    levels = fitting.Levels(tf.zeros([2, 1]), tf.zeros([]))
    given = fitting.Rows(*(part[None] for part in (x, y, v)), far, 0 * far)
    rows = fitting.with_targets(given, levels)
    w = normal(2, 8, 4)
    weights = fitting.Weights(
        tf.constant(np.concatenate([w, np.zeros((2, 8, 1), "float32")], -1)[:, None]),
        tf.constant(w),
    )

    def divergence(weights):
        u, w = (np.asarray(part, "float64") for part in weights)
        a = x @ u[:, 0, :, :4].transpose(0, 2, 1) + u[:, 0, None, :, 4]
        b = y @ w.transpose(0, 2, 1) - np.sum(y**2, -1, keepdims=True) / 2
        scores = np.exp(a) @ np.exp(b).transpose(0, 2, 1)
        estimate = scores / scores.sum(-1, keepdims=True)
        exact = np.asarray(tf.nn.softmax(x @ y.transpose(0, 2, 1)))
        return np.sum(exact * np.log(exact / estimate), (1, 2))

    seen = [divergence(weights)]
    for fitted in fitting.fit(weights, [rows], levels, 10):
        seen.append(divergence(fitted))
    assert np.all(np.diff(seen, axis=0) <= 1e-4 * seen[0])
    assert np.all(seen[-1] < 0.2 * seen[0])


def test_a_model_is_calibrated_layer_by_layer(tmp_path):
    inputs = keras.Input((96, 16))
    attention = keras.layers.MultiHeadAttention
    hidden = keras.layers.LayerNormalization()(inputs + attention(4, 8, name="one")(inputs, inputs))
    hidden = hidden + attention(4, 8, name="two")(hidden, hidden, use_causal_mask=True)
    model = keras.Model(inputs, hidden)
    linear = convert.replace_attention(model, supports=16, feature_map="learned", seed=1)
    x, other = sharp(), sharp(seed=5)
    before = np.linalg.norm(linear(other) - model(other))
    report = convert.calibrate(linear, x)
    assert [layer.layer for layer in report.layers] == ["one", "two"]
    assert np.linalg.norm(linear(other) - model(other)) < 0.8 * before
    assert str(report).count("\n") == 1 and "error" in str(report)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["layers"][1]["after"] == report.layers[1].after.tolist()
    linear.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(other), linear(other))


def test_refusals():
    x = sharp()
    with pytest.raises(ValueError, match=r"`calibrate` needs .*feature_map='softmax'"):
        performer.Performer(4, 8, supports=16).calibrate(x)
    layer, _ = pair()
    with pytest.raises(ValueError, match="`attention_mask` of `calibrate` must be the same"):
        layer.calibrate(x, attention_mask=np.tri(96, dtype=bool))
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer.*steps=-1"):
        layer.calibrate(x, steps=-1)
    with pytest.raises(ValueError, match="needs a position that exists"):
        layer.calibrate(x, value_mask=np.zeros((8, 96), bool))
    inputs = keras.Input((96, 16))
    model = keras.Model(inputs, performer.Performer(4, 8, supports=16)(inputs, inputs))
    with pytest.raises(ValueError, match="`model` must have a Performer layer"):
        convert.calibrate(model, x)
