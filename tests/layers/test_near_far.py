"""Layers with `exact_window` and `far_bias`: values, masks, streams, saving, training, refusals."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import reference
from performer.features import feature_maps
from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits

BOUND = tolerances("float32", causal=True)
W = 64


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def built(shape, **options):
    options = {
        "num_heads": 4,
        "key_dim": 8,
        "supports": 16,
        "seed": 5,
        "exact_window": W,
        **options,
    }
    layer = performer.Performer(bias_initializer="random_normal", **options)
    layer.build(shape, shape)
    return layer


def expected(layer, x, causal, far_bias=None, **options):
    """The layer's output by the reference."""
    q, k, v = (f(x).numpy() for f in (layer.query_dense, layer.key_dense, layer.value_dense))
    w = layer.projection.numpy()
    bias = np.zeros((4, len(w))) + (0 if far_bias is None else np.reshape(far_bias, (-1, 1)))
    out = reference.near_far_attention(
        q, k, v, w, feature_bias=bias, causal=causal, exact_window=W, **options
    )[0]
    return layer.output_dense(out.astype("float32"))


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("far_bias", [None, -1.5, "learned"])
def test_the_output_is_that_of_the_reference(causal, far_bias):
    layer, x = built((2, 200, 16), far_bias=far_bias), normal(2, 200, 16)
    mask = np.random.default_rng(1).random((2, 200)) > 0.2
    bias = {"learned": -4.0}.get(far_bias, far_bias)
    key_bias = np.where(mask[:, None], 0.0, -np.inf)
    out = layer(x, x, value_mask=mask, use_causal_mask=causal)
    assert_close(out, expected(layer, x, causal, bias, key_bias=key_bias), rms=BOUND.rms)


def test_a_window_over_all_is_exact_attention():
    x = normal(2, 70, 16)
    layer = built((2, 70, 16), num_key_value_heads=2)
    exact = performer.Performer(4, 8, num_key_value_heads=2, attention_method="quadratic")
    exact.build(x.shape, x.shape)
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        for one, other in zip(
            getattr(exact, name).weights, getattr(layer, name).weights, strict=True
        ):
            one.assign(other)
    for causal in (False, True):
        assert_close(
            layer(x, x, use_causal_mask=causal), exact(x, x, use_causal_mask=causal), rms=1e-5
        )


VARIANTS = {
    "rotary": {"rotary_embedding": performer.RotaryEmbedding()},
    "grouped": {"num_key_value_heads": 2, "value_dim": 3, "far_bias": "learned"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_chunks_of_any_sizes_are_the_full_pass(options):
    layer, x = built((2, 300, 16), **options), normal(2, 300, 16)
    whole, end = layer(x, x, use_causal_mask=True, return_state=True)
    assert_close(layer(x, x, use_causal_mask=True), whole, worst=0)
    for cuts in ([1, 2, 63, 129, 300], [150, 150, 299, 300]):
        for state in (None, layer.get_initial_state(2)):
            parts = []
            for i, j in itertools.pairwise([0, *cuts]):
                part, state = layer(
                    *(x[:, i:j], x[:, i:j]),
                    use_causal_mask=True,
                    initial_state=state,
                    return_state=True,
                )
                parts.append(part)
            assert_close(np.concatenate(parts, 1), whole, worst=BOUND.worst, rms=BOUND.rms)
            assert_close(state.log_mass, end.log_mass, rms=BOUND.rms)
            assert int(state.position) == int(end.position) == 300
    shapes = [x.shape for x in tf.nest.flatten(layer.get_initial_state(2))]
    assert [x.shape for x in tf.nest.flatten(end)] == shapes


def test_a_prefix_is_seen_by_every_row_near_ones_exactly():
    layer, x = built((2, 200, 16)), normal(2, 200, 16)
    prefix = np.arange(200)[None] < np.array([[90], [10]])
    keys = np.random.default_rng(1).random((2, 200)) > 0.2
    call = {"prefix_mask": prefix, "value_mask": keys, "use_causal_mask": True}
    whole = layer(x, x, **call)
    dense, _ = layer(x, x, **call, return_attention_scores=True)
    assert_close(whole, dense, rms=BOUND.rms)
    first = {name: m[:, :130] if name != "use_causal_mask" else m for name, m in call.items()}
    head, state = layer(x[:, :130], x[:, :130], **first, return_state=True)
    tail = layer(
        *(x[:, 130:], x[:, 130:]),
        value_mask=keys[:, 130:],
        use_causal_mask=True,
        initial_state=state,
    )
    assert_close(np.concatenate([head, tail], 1), whole, worst=BOUND.worst)
    late = np.zeros((2, 70), bool)
    late[:, 3] = True  # a prefix in a later call stands where the call begins
    options = {"use_causal_mask": True, "initial_state": state, "value_mask": keys[:, 130:]}
    joined = layer(x[:, 130:], x[:, 130:], prefix_mask=late, **options)
    assert np.any(np.abs(joined - tail)[:, :3] > 1e-6)
    assert_close(joined[:, 3:], tail[:, 3:], worst=BOUND.worst)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_scores_and_general_masks_are_of_the_same_estimator(causal):
    layer, x = built((2, 150, 16), num_key_value_heads=2, far_bias=-0.5), normal(2, 150, 16)
    ids = np.broadcast_to(np.arange(150) // 80, (2, 150))
    out, scores = layer(x, x, use_causal_mask=causal, segment_ids=ids, return_attention_scores=True)
    assert_close(out, layer(x, x, use_causal_mask=causal, segment_ids=ids), rms=BOUND.rms)
    assert_close(np.sum(scores, -1), np.ones((2, 4, 150)), worst=1e-5)
    if causal:
        mask = np.tri(150, dtype=bool)[None]
        whole = layer(x, x, use_causal_mask=True)
        assert_close(layer(x, x, attention_mask=mask), whole, rms=BOUND.rms)


def test_several_axes_are_one_sequence():
    layer, x = built((2, 10, 3, 15, 16), attention_axes=(1, 3)), normal(2, 10, 3, 15, 16)
    flat = np.reshape(np.transpose(x, (0, 2, 1, 3, 4)), (6, 150, 16))
    one_axis = built((6, 150, 16))
    for one, other in zip(one_axis.weights, layer.weights, strict=True):
        one.assign(other)
    out = np.reshape(one_axis(flat, flat, use_causal_mask=True), (2, 3, 10, 15, 16))
    assert_close(
        layer(x, x, use_causal_mask=True), np.transpose(out, (0, 2, 1, 3, 4)), rms=BOUND.rms
    )


@keras.saving.register_keras_serializable(package="near_far")
class Hyperbolic(feature_maps.FeatureMap):
    def sides(self, projection):
        both = tf.concat([projection, -projection], 0)
        return both, both


@keras.saving.register_keras_serializable(package="near_far")
class Positive(feature_maps.FeatureMap):
    """FAVOR++ (https://arxiv.org/abs/2205.15317, with one A for all), with its factor."""

    a = -0.1

    def sides(self, projection):
        return (projection * (1 - 4 * self.a) ** 0.5,) * 2

    def feature_bias(self, projection):
        factor = projection.shape[1] / 2 * np.log(1 - 4 * self.a)
        return factor + 2 * self.a * tf.reduce_sum(projection**2, -1)


@keras.saving.register_keras_serializable(package="near_far")
class Centred(feature_maps.FeatureMap):
    """Features around c, weighted by their importance."""

    c = 0.3

    def sides(self, projection):
        return (projection + self.c,) * 2

    def feature_bias(self, projection):
        return -self.c * tf.reduce_sum(projection, -1) - self.c**2 * projection.shape[1] / 2


class WithoutFactor(Positive):
    def feature_bias(self, projection):
        return 2 * self.a * tf.reduce_sum(projection**2, -1)


MAPS = ["softmax", Hyperbolic(), Positive(), Centred()]


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda m: getattr(m, "__class__", m).__name__)
def test_maps_estimate_the_exact_weights_with_all_their_factors(feature_map):
    """With many features near-and-far attention is exact attention, over near and far keys."""
    x = normal(1, 260, 16) * 0.5
    layer = built(x.shape, feature_map=feature_map, supports=2**12)
    exact = performer.Performer(4, 8, attention_method="quadratic")
    exact.build(x.shape, x.shape)
    performer.convert.copy_weights(layer, exact)
    for causal in (False, True):
        wanted = exact(x, x, use_causal_mask=causal)
        assert_close(layer(x, x, use_causal_mask=causal), wanted, rms=0.03)


def test_a_map_without_its_factor_would_show():
    x = normal(1, 260, 16) * 0.5
    results = []
    for feature_map in (Positive(), WithoutFactor()):
        layer = built(x.shape, feature_map=feature_map, supports=2**12)
        exact = performer.Performer(4, 8, attention_method="quadratic")
        exact.build(x.shape, x.shape)
        performer.convert.copy_weights(layer, exact)
        error = layer(x, x) - exact(x, x)
        results.append(float(tf.norm(error)))
    assert results[1] > 2 * results[0]


def test_a_learned_balance_starts_at_minus_4_trains_and_comes_last():
    layer, x = built((2, 200, 16), far_bias="learned"), normal(2, 200, 16)
    fixed = built((2, 200, 16), far_bias=-4.0)
    for one, other in zip(fixed.weights, layer.weights[:-1], strict=True):
        one.assign(other)
    assert_same_bits(layer(x, x), fixed(x, x))
    weight = layer.weights[-1]
    assert weight.path.endswith("far_bias/bias") and weight.shape == (4,)
    assert weight is layer.trainable_weights[-1]
    assert (
        weight.dtype == built((2, 200, 16), far_bias="learned", dtype="bfloat16").weights[-1].dtype
    )
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, x, use_causal_mask=True) ** 2)
    assert np.all(tape.gradient(loss, weight.value).numpy() != 0)


@pytest.mark.slow
def test_models_with_blocks_are_saved_with_all_of_it(tmp_path):
    inputs = keras.Input((None, 16))
    options = {"num_heads": 2, "supports": 16, "exact_window": W, "far_bias": "learned"}
    y = performer.PerformerEncoder(32, **options)(inputs)
    y = performer.PerformerDecoder(32, **options)(y, y)
    model, x = keras.Model(inputs, y), normal(2, 150, 16)
    for weight in model.trainable_weights:
        if "far_bias" in weight.path:
            weight.assign([-1.0, 2.0])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded(x), model(x))
    decoder = loaded.layers[-1].get_config()
    assert (decoder["exact_window"], decoder["far_bias"]) == (W, "learned")
    assert loaded.layers[-1]._cross_attention_layer.get_config()["exact_window"] is None
    assert sum("far_bias" in w.path for w in model.weights) == 2


def test_generation_and_streaming_through_decoders_are_the_whole():
    model = performer.StreamingSequential(
        [
            keras.layers.Embedding(20, 16),
            performer.PerformerDecoder(
                *(32, 2),
                supports=8,
                exact_window=W,
                far_bias=-1.0,
                rotary_embedding=performer.RotaryEmbedding(),
            ),
            keras.layers.Dense(20),
        ]
    )
    prompt = np.random.default_rng(0).integers(0, 20, (2, 130))
    model(prompt)
    new = performer.generate(model, prompt, 12, temperature=0)
    tokens = np.concatenate([prompt, new], 1)
    logits = model(tokens)
    assert np.array_equal(np.argmax(logits, -1)[:, 129:-1], new)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_other_types_stream_and_train(policy):
    layer, x = built((1, 150, 16), dtype=policy, far_bias="learned"), normal(1, 150, 16)
    whole = np.asarray(layer(x, x, use_causal_mask=True), "float64")
    state, parts = layer.get_initial_state(1), []
    assert state.near_key.dtype == layer.compute_dtype
    for i, j in ((0, 100), (100, 150)):
        part, state = layer(
            *(x[:, i:j], x[:, i:j]), use_causal_mask=True, initial_state=state, return_state=True
        )
        parts.append(np.asarray(part, "float64"))
    rounding = tolerances(layer.compute_dtype, causal=True).rms
    assert_close(np.concatenate(parts, 1), whole, rms=max(4 * rounding, 1e-10))


def test_dropped_keys_are_dropped_near_and_far():
    x = normal(1, 256, 16)
    layer = built(x.shape, dropout=0.5, supports=512)
    outputs = [layer(x, x, training=True) for _ in range(2)]
    assert np.any(outputs[0] != outputs[1])
    plain = layer(x, x, training=False)
    mean = np.mean([layer(x, x, training=True) for _ in range(30)], 0)
    assert np.sqrt(np.mean((mean - plain) ** 2)) < 0.35 * np.sqrt(
        np.mean((outputs[0] - plain) ** 2)
    )


def test_symbolic_calls_know_the_shapes_of_states():
    layer, x = built((2, 12, 16), far_bias="learned"), normal(2, 150, 16)
    inputs = keras.Input((None, 16))
    first, state = layer(inputs, inputs, use_causal_mask=True, return_state=True)
    assert state.near_key.shape == (None, 127, 4, 8) and state.near_bias.shape == (None, 4, 127)
    second = layer(inputs, inputs, use_causal_mask=True, initial_state=state)
    model = keras.Model(inputs, [first, second])
    twice = np.concatenate([x, x], 1)
    whole = layer(twice, twice, use_causal_mask=True)
    assert_close(np.concatenate(model(x), 1), whole, worst=BOUND.worst)


def test_states_survive_saving(tmp_path):
    layer, x = built((2, 70, 16)), normal(2, 70, 16)
    state = layer(x, x, use_causal_mask=True, return_state=True)[1]
    np.savez(tmp_path / "state.npz", **state._asdict())
    loaded = performer.AttentionState(**np.load(tmp_path / "state.npz"))
    results = [layer(x, x, use_causal_mask=True, initial_state=s) for s in (state, loaded)]
    assert_same_bits(*results)


@pytest.mark.slow
def test_xla_compiles_training():
    layer = built((2, 130, 16), far_bias="learned", dtype="float64")
    x = normal(2, 130, 16).astype("float64")

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, x, use_causal_mask=True) ** 2)
        return tape.gradient(loss, [w.value for w in layer.trainable_weights])

    compiled = tf.function(gradients, jit_compile=True)()
    for one, other in zip(compiled, gradients(), strict=True):
        assert_close(one, other, worst=1e-9)


def test_exact_models_are_converted_with_a_window():
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(2, 8)(inputs, inputs))
    converted = performer.convert.replace_attention(model, supports=2**13, exact_window=W)
    x = normal(1, 200, 16) * 0.5
    assert converted.layers[-1].get_config()["exact_window"] == W
    assert_close(converted(x), model(x), rms=0.03)
    assert_close(converted(x[:, :100]), model(x[:, :100]), rms=1e-5)


def test_heavy_keys_are_exact_in_every_form():
    query, x = normal(2, 30, 16), normal(2, 50, 16, seed=1)
    mask = np.random.default_rng(1).random((2, 50)) > 0.2
    layer = built((2, 50, 16), exact_window=None, exact_keys=8, num_key_value_heads=2)
    out = layer(query, x, value_mask=mask)
    dense, _ = layer(query, x, value_mask=mask, return_attention_scores=True)
    assert_close(out, dense, rms=BOUND.rms)
    plain = built((2, 50, 16), exact_window=None, num_key_value_heads=2)
    every = built((2, 50, 16), exact_window=None, exact_keys=50, num_key_value_heads=2)
    exact = performer.Performer(4, 8, num_key_value_heads=2, attention_method="quadratic")
    exact.build((2, 50, 16), (2, 50, 16))
    for other in (plain, every, exact):
        for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
            weights = zip(getattr(other, name).weights, getattr(layer, name).weights, strict=True)
            for one, two in weights:
                one.assign(two)
    assert_close(every(query, x, value_mask=mask), exact(query, x, value_mask=mask), rms=1e-5)
    error, without = (
        np.std(f(query, x, value_mask=mask) - exact(query, x, value_mask=mask))
        for f in (layer, plain)
    )
    assert error < without
    config = performer.Performer.from_config(layer.get_config()).get_config()
    assert config["exact_keys"] == 8
    with pytest.raises(ValueError, match="exact_keys needs causal=False"):
        layer(x, x, use_causal_mask=True)


class OwnNorm(feature_maps.FeatureMap):
    key_norm = False

    def key_bias(self, key):
        return -tf.reduce_sum(key**2, [2, 3])


REFUSED = {
    "no multiple": ({"exact_window": 10}, "`exact_window`: .*multiple of 64.* got 10"),
    "quadratic": (
        {"exact_window": 64, "attention_method": "quadratic"},
        "`exact_window` needs attention_method='linear'",
    ),
    "elu": ({"exact_window": 64, "feature_map": "elu"}, "nothing to make exact"),
    "far_bias alone": (
        {"far_bias": 1.0, "exact_window": None},
        "`far_bias` needs `exact_window` or",
    ),
    "far_bias": ({"far_bias": "yes"}, "'learned' or a finite number. Received: far_bias='yes'"),
    "infinite": ({"far_bias": float("inf")}, "finite number. Received: far_bias=inf"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        performer.Performer(
            **{"num_heads": 2, "key_dim": 4, "supports": 8, "exact_window": W, **options}
        )


def test_calls_that_have_no_meaning_are_refused():
    layer, x = built((2, 70, 16)), normal(2, 70, 16)
    with pytest.raises(ValueError, match="L = S with exact_window"):
        layer(x, x[:, :50])
    near = layer(x, x, use_causal_mask=True, return_state=True)[1]
    with pytest.raises(ValueError, match="`initial_state` of `summarize` must have no near rows"):
        layer.summarize(x, initial_state=near)
    with pytest.raises(ValueError, match="state must have no near rows"):
        layer.read(x, near)
    with pytest.raises(
        ValueError, match=r"`feature_map` must have key_norm=True, or no `key_bias`"
    ):
        built((2, 70, 16), feature_map=OwnNorm())(x, x)
    assert layer.read(x, layer.summarize(x)).shape == (2, 70, 16)
