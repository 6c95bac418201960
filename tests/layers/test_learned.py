"""Layers with learned features: FAVOR+ at first, weights that train, states that know them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import callbacks, convert, ops, reference
from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits
from support.operator_calls import needs_xla

BOUND = tolerances("float32", causal=True)
NAMES = ["query_projection", "key_projection", "query_bias"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def learned(**options):
    options = {"num_heads": 4, "key_dim": 8, "supports": 16, "seed": 5, **options}
    return performer.Performer(feature_map="learned", **options)


def moved(layer, size=0.3):
    """The layer, with weights of its features that no longer are a draw."""
    for seed, name in enumerate(NAMES):
        weight = getattr(layer.learned_projection, name)
        weight.assign_add(size * normal(*weight.shape, seed=seed))
    return layer


def built(x, **options):
    layer = learned(**options)
    layer.build(x.shape, x.shape)
    return moved(layer)


def expected(layer, x, causal=False, window=None):
    """The layer's output by the reference."""
    q, k, v = (f(x).numpy() for f in (layer.query_dense, layer.key_dense, layer.value_dense))
    query_side, key_side, bias = (getattr(layer.learned_projection, n).numpy() for n in NAMES)
    options = {"feature_bias": bias, "causal": causal}
    if window is None:
        out = reference.attention(q, k, v, query_side, key_side, **options)[0]
    else:
        options["exact_window"] = window
        out = reference.near_far_attention(q, k, v, query_side, key_side, **options)[0]
    return layer.output_dense(np.asarray(out, "float32"))


def test_it_begins_as_favor_with_a_draw_of_every_key_head():
    layer, x = learned(num_key_value_heads=2), normal(2, 30, 16)
    out = layer(x, x)
    weights = layer.learned_projection
    assert weights.query_projection.shape == (4, 16, 8)
    assert weights.key_projection.shape == (2, 16, 8)
    assert not np.any(weights.query_bias)
    np.testing.assert_array_equal(
        weights.query_projection, np.repeat(weights.key_projection, 2, axis=0)
    )
    rows = weights.key_projection.numpy().reshape(4, 8, 8)  # two blocks of eight for each head
    products = np.einsum("bmd,bnd->bmn", rows, rows)
    assert_close(products, products * np.eye(8), worst=1e-4)
    assert not np.allclose(rows[0], rows[2])
    q, k, v = (f(x) for f in (layer.query_dense, layer.key_dense, layer.value_dense))
    draws = weights.key_projection.value
    assert_same_bits(out, layer.output_dense(ops.favor_attention(q, k, v, draws)))


def test_it_approaches_softmax_as_features_grow():
    x = 0.5 * normal(2, 20, 16)
    exact = keras.layers.MultiHeadAttention(4, 8)
    exact(x, x)
    layer = learned(supports=2**13)
    convert.copy_weights(exact, layer)
    assert_close(layer(x, x), exact(x, x), rms=0.05)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("window", [None, 64])
def test_the_output_is_that_of_the_reference(groups, causal, window):
    x = normal(2, 200, 16)
    layer = built(x, num_key_value_heads=groups, exact_window=window)
    out = layer(x, x, use_causal_mask=causal)
    assert_close(out, expected(layer, x, causal, window), rms=BOUND.rms)
    dense = layer(x, x, use_causal_mask=causal, return_attention_scores=True)[0]
    assert_close(out, dense, rms=BOUND.rms)


@pytest.mark.parametrize("window", [None, 64])
def test_every_weight_gets_the_gradient_of_finite_differences(window):
    x = normal(1, 150, 16)
    layer = built(x, num_key_value_heads=2, exact_window=window)
    weights = [getattr(layer.learned_projection, name).value for name in NAMES]

    def loss():
        return tf.reduce_sum(tf.cast(layer(x, x, use_causal_mask=True), tf.float64) ** 2)

    with tf.GradientTape() as tape:
        value = loss()
    for weight, gradient in zip(weights, tape.gradient(value, weights), strict=True):
        direction = gradient / tf.norm(gradient)
        step = 1e-2
        sides = []
        for sign in (1, -1):
            weight.assign_add(sign * step * direction)
            sides.append(float(loss()))
            weight.assign_sub(sign * step * direction)
        assert_close((sides[0] - sides[1]) / (2 * step), tf.norm(gradient), relative=0.01)


def test_the_weights_train_and_the_regularizer_counts():
    x = normal(8, 30, 16)
    inputs = keras.Input((30, 16))
    layer = learned(feature_regularizer=keras.regularizers.L2(0.01))
    model = keras.Model(inputs, layer(inputs, inputs))
    before = [w.numpy() for w in layer.learned_projection.weights]
    assert [w.path.rpartition("/")[2] for w in layer.trainable_weights[-3:]] == NAMES
    penalty = 0.01 * sum(np.sum(w**2) for w in before[:2])
    assert_close(sum(layer.losses), penalty, relative=1e-5)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    history = model.fit(x, np.roll(x, 1, 1), epochs=4, verbose=0).history["loss"]
    assert history[-1] < history[0]
    for old, weight in zip(before, layer.learned_projection.weights, strict=True):
        assert np.all(np.abs(weight - old).max(axis=-1) > 1e-4)
    layer.trainable = False
    assert not layer.trainable_weights


def test_streams_go_on_from_a_state_until_a_weight_changes():
    x = normal(2, 150, 16)
    for options in ({}, {"exact_window": 64, "far_bias": "learned"}):
        layer = built(x, num_key_value_heads=2, **options)
        whole = layer(x, x, use_causal_mask=True)
        state, parts = layer.get_initial_state(2), []
        for part in np.split(x, [40, 41, 110], axis=1):
            out, state = layer(
                part, part, use_causal_mask=True, initial_state=state, return_state=True
            )
            parts.append(out)
        assert_close(tf.concat(parts, 1), whole, worst=BOUND.worst)
        step = tf.function(lambda x, state, f=layer: f(x, x, initial_state=state)[:, :1])
        now = x[:, :1] if not options else None
        for name in NAMES:
            weight = getattr(layer.learned_projection, name)
            kept = weight.numpy()
            weight.assign_add(np.full(weight.shape, 1e-3))
            with pytest.raises(ValueError, match="same draw"):
                layer(x[:, :1], x[:, :1], use_causal_mask=True, initial_state=state)
            if now is not None:
                with pytest.raises(tf.errors.InvalidArgumentError, match="same draw"):
                    step(now, state)
            weight.assign(kept)
        layer(x[:, :1], x[:, :1], use_causal_mask=True, initial_state=state)


def test_states_of_summarize_are_read_by_the_same_weights_only():
    x = normal(2, 30, 16)
    layer = built(x)
    state = layer.summarize(x)
    assert int(state.draw) == int(layer.draw)
    assert_close(layer.read(x[:, :5], state), layer(x[:, :5], x), relative=1e-5)
    with pytest.raises(ValueError, match="same draw"):
        built(x, seed=6).read(x, state)


def test_generation_streams():
    tokens = np.random.default_rng(0).integers(0, 20, (2, 9)).astype("int32")
    embedding = performer.TokenAndPositionEmbedding(20, 40, 16)
    options = {"feature_map": "learned"}
    block = performer.PerformerDecoder(32, 2, supports=8, attention_options=options)
    model = performer.StreamingSequential([embedding, block, keras.layers.Dense(20)])
    model(tokens)
    moved(block._self_attention_layer)
    out = np.asarray(performer.generate(model, tokens, max_new_tokens=6, temperature=0))
    np.testing.assert_array_equal(out[:, 9:], np.argmax(model(out)[:, 8:-1], axis=-1))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_weights_are_float32_under_every_policy(policy):
    x = normal(2, 70, 16)
    plain = built(x)
    layer = learned(dtype=policy)
    layer.build(x.shape, x.shape)
    layer.set_weights(plain.get_weights())
    with tf.GradientTape() as tape:
        out = layer(x, x, use_causal_mask=True)
        loss = tf.reduce_sum(tf.cast(out, tf.float32) ** 2)
    weights = layer.learned_projection.weights
    assert {w.dtype for w in weights} == {"float32"} and out.dtype == layer.compute_dtype
    bound = {"mixed_bfloat16": 0.05, "mixed_float16": 0.01, "float64": 1e-5}[policy]
    assert_close(out, plain(x, x, use_causal_mask=True), rms=bound)
    gradients = tape.gradient(loss, [w.value for w in weights])
    assert all(g.dtype == tf.float32 and np.any(g != 0) for g in gradients)


def model_of(x, **options):
    inputs = keras.Input(x.shape[1:])
    layer = learned(name="attention", feature_regularizer="l2", **options)
    return keras.Model(inputs, layer([inputs, inputs], use_causal_mask=True))


def test_saved_in_every_way(tmp_path):
    x = normal(2, 70, 16)
    model = model_of(x)
    moved(model.get_layer("attention"))
    out = model(x)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.export(tmp_path / "exported", verbose=False)
    tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded(x), out)
    one, other = (m.get_layer("attention") for m in (loaded, model))
    assert one.get_config() == other.get_config() and int(one.draw) == int(other.draw)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    assert_same_bits(exported.serve(x), out)
    for read in ("weights", "checkpoint"):
        again = model_of(x)
        assert not np.array_equal(again(x), out)
        if read == "weights":
            again.load_weights(tmp_path / "model.weights.h5")
        else:
            checkpoint = tf.train.Checkpoint(model=again)
            checkpoint.read(str(tmp_path / "checkpoint")).assert_consumed()
        assert_same_bits(again(x), out)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_same_bits(clone(x), out)


@pytest.mark.slow
@needs_xla
def test_compiled_training_is_the_training_without():
    x = normal(4, 20, 16)
    weights = []
    for jit_compile in (False, True):
        model = model_of(x)
        for w in model.weights:
            w.assign(0.3 * normal(*w.shape, seed=3))
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
        model.fit(x, np.roll(x, 1, 1), epochs=2, verbose=0)
        weights.append(model.get_layer("attention").learned_projection.get_weights())
    for one, other in zip(*weights, strict=True):
        assert_close(one, other, relative=1e-4)


def test_redraws_do_not_apply():
    x = normal(2, 20, 16)
    with pytest.raises(ValueError, match=r"`redraw_interval` must be None.*redraw_interval=3"):
        learned(redraw_interval=3)
    layer = built(x)
    assert layer.projection is None and layer.redraws is None
    with pytest.raises(ValueError, match="`redraw` needs a projection that is drawn"):
        layer.redraw()
    model = model_of(x)
    model.compile("sgd", "mse")
    before = model.get_layer("attention").get_weights()
    callback = callbacks.RedrawProjections(every=1, unit="batch")
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_train_batch_end(0)
    for one, other in zip(before, model.get_layer("attention").get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_measure_of_the_callback_is_of_the_learned_features(tmp_path):
    x = normal(2, 20, 16)
    model = model_of(x)
    callback = callbacks.LogApproximation(tmp_path, x)
    callback.set_model(model)
    ((name, first, redraws),) = callback.measure()
    moved(model.get_layer("attention"), 1.0)
    ((_, second, _),) = callback.measure()
    assert name == "attention" and redraws == 0 and first != second


def test_a_regularizer_needs_learned_features():
    for options in ({}, {"feature_map": "learned", "attention_method": "quadratic"}):
        with pytest.raises(ValueError, match="`feature_regularizer` needs"):
            performer.Performer(2, 4, supports=8, feature_regularizer="l2", **options)


def test_a_converted_model_has_learned_features():
    x = normal(2, 20, 16)
    inputs = keras.Input((20, 16))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(4, 8, name="exact")(inputs, inputs))
    linear = convert.replace_attention(model, supports=2**13, feature_map="learned", seed=1)
    layer = linear.get_layer("exact")
    assert layer.learned_projection.key_projection.shape == (4, 2**13, 8)
    assert_close(linear(x / 2), model(x / 2), rms=0.05)


def test_a_block_learns_the_features_of_its_layers():
    block = performer.PerformerDecoder(
        *(32, 4), supports=8, exact_window=64, attention_options={"feature_map": "learned"}
    )
    x, encoded = normal(2, 70, 16), normal(2, 20, 16, seed=1)
    block(x, encoded)
    for layer in (block._self_attention_layer, block._cross_attention_layer):
        assert layer.learned_projection.query_bias.shape == (4, 8)
    again = type(block).from_config(block.get_config())
    assert again.attention_options == block.attention_options


def test_first_projections_are_those_of_the_seed():
    x = normal(2, 20, 16)
    one, other, third = (learned(seed=seed) for seed in (5, 5, 6))
    draws = []
    for layer in (one, other, third):
        layer.build(x.shape, x.shape)
        draws.append(layer.learned_projection.key_projection.numpy())
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    norms = np.mean(draws[0] ** 2)
    assert 0.8 < norms < 1.2
