"""Models with exact attention become models with Performer layers, and weights go both ways."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import convert
from support.keras_versions import known

X = np.random.default_rng(0).normal(size=(2, 7, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(2, 5, 8)).astype("float32")


def kinds(model):
    return [type(layer).__name__ for layer in model._flatten_layers()]


OPTIONS = [
    {},
    {"value_dim": 3, "use_bias": False},
    known({"output_shape": (2, 3), "use_gate": True}),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_weights_go_both_ways(options):
    exact = keras.layers.MultiHeadAttention(2, 4, bias_initializer="random_normal", **options)
    exact(X, Y)
    linear = performer.Performer(2, 4, supports=16, **options)
    convert.copy_weights(exact, linear)
    for one, other in zip(exact.weights, linear.weights, strict=False):
        assert one.path.split("/")[1:] == other.path.split("/")[1:]
        np.testing.assert_array_equal(one, other)
    quadratic = performer.Performer(2, 4, attention_method="quadratic", **options)
    convert.copy_weights(linear, quadratic)
    np.testing.assert_array_equal(quadratic(X, Y), exact(X, Y))
    back = keras.layers.MultiHeadAttention(2, 4, **options)
    convert.copy_weights(linear, back)
    np.testing.assert_array_equal(back(X, Y), exact(X, Y))


def test_weights_of_grouped_heads():
    exact = keras.layers.GroupQueryAttention(head_dim=4, num_query_heads=4, num_key_value_heads=2)
    exact(X, Y)
    linear = performer.Performer(4, 4, num_key_value_heads=2, supports=16)
    convert.copy_weights(exact, linear)
    back = keras.layers.GroupQueryAttention(head_dim=4, num_query_heads=4, num_key_value_heads=2)
    convert.copy_weights(linear, back)
    np.testing.assert_array_equal(back(X, Y), exact(X, Y))


def built(kind=keras.layers.MultiHeadAttention, heads=2, **options):
    layer = kind(num_heads=heads, key_dim=4, **options)
    layer(X, X)
    return layer


REFUSED = {
    "no attention": (lambda: (keras.layers.Dense(3), built()), TypeError, "source.*Dense"),
    "not built": (
        lambda: (keras.layers.MultiHeadAttention(2, 4), built()),
        ValueError,
        "`source` must be built",
    ),
    "other heads": (
        lambda: (built(), built(heads=3)),
        ValueError,
        r"query/kernel.*\(8, 2, 4\).*\(8, 3, 4\)",
    ),
    "no bias": (
        lambda: (built(use_bias=False), built()),
        ValueError,
        r"query/bias.*None.*\(2, 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(case):
    make, error, message = REFUSED[case]
    source, target = make()
    before = target.get_weights()
    with pytest.raises(error, match=message):
        convert.copy_weights(source, target)
    for one, other in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def model():
    """A small encoder-decoder: self-attention in a shared layer, causal and cross attention."""
    source, target = keras.Input((None, 8), name="source"), keras.Input((None, 8), name="target")
    attention = keras.layers.MultiHeadAttention
    shared = attention(2, 4, name="encoder")
    encoded = source
    for _ in range(2):
        encoded = keras.layers.LayerNormalization()(encoded + shared(encoded, encoded))
    decoded = target + attention(2, 4, name="causal")(target, target, use_causal_mask=True)
    decoded = decoded + attention(2, 4, value_dim=3, dropout=0.1, name="cross")(decoded, encoded)
    model = keras.Model([source, target], keras.layers.Dense(8)(decoded))
    model.compile("adam", "mse", run_eagerly=True)
    model.fit([X, Y], Y, verbose=0)
    return model


def test_the_copy_computes_the_same_with_exact_attention(model):
    before = model.get_weights()
    copy = convert.replace_attention(model, attention_method="quadratic")
    assert "MultiHeadAttention" not in kinds(copy) and kinds(copy).count("Performer") == 3
    assert model.compiled and not copy.compiled
    np.testing.assert_array_equal(copy([X, Y]), model([X, Y]))
    linear = convert.replace_attention(model, supports=2**14)
    error = np.sqrt(np.mean((linear([X, Y]) - model([X, Y])) ** 2))
    assert 0 < error < 0.1 * np.std(model([X, Y]))
    assert (
        linear.get_layer("cross").dropout == 0.1 and linear.get_layer("encoder").supports == 2**14
    )
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_saved_reloaded_and_trained_further_in_mixed_precision(model, tmp_path):
    linear = convert.replace_attention(
        model, supports=32, redraw_interval=2, seed=5, dtype="mixed_bfloat16"
    )
    linear.save(tmp_path / "linear.keras")
    linear = keras.models.load_model(tmp_path / "linear.keras")
    assert linear.get_layer("causal").compute_dtype == "bfloat16"
    linear.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=True)
    loss = linear.fit([X, Y], Y, epochs=8, verbose=0).history["loss"]
    assert np.all(np.isfinite(loss)) and loss[-1] < 0.9 * loss[0]
    # 8 calls, 2 by each draw; the shared layer is called twice in a step.
    assert linear.get_layer("causal").redraws == 3
    assert linear.get_layer("encoder").redraws == 7
    linear.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    np.testing.assert_array_equal(again([X, Y]), linear([X, Y]))


def test_grouped_heads_of_a_functional_model_are_replaced():
    inputs = keras.Input((7, 8))
    layer = keras.layers.GroupQueryAttention(4, 4, 2, name="grouped")
    model = keras.Model(inputs, layer(inputs, inputs))
    linear = convert.replace_attention(model, supports=16)
    np.testing.assert_array_equal(linear(X), linear.get_layer("grouped")(X, X))
    assert np.abs(linear(X) - model(X)).max() > 1e-4  # an estimate, not what it was
    close = convert.replace_attention(model, supports=2**14)
    error = np.sqrt(np.mean((close(X) - model(X)) ** 2))
    assert error < 0.1 * np.std(model(X)) and error < 0.2 * np.std(linear(X) - model(X))


def test_some_layers_only(model):
    copy = convert.replace_attention(model, supports=16, where=lambda name: name != "cross")
    assert [type(copy.get_layer(n)).__name__ for n in ("encoder", "causal", "cross")] == [
        "Performer",
        "Performer",
        "MultiHeadAttention",
    ]


class Block(keras.layers.Layer):
    """A layer of one's own, not registered, that makes its attention itself."""

    def __init__(self, heads=2, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads
        self.attention = keras.layers.MultiHeadAttention(heads, 4, name="own")
        self.more = [keras.layers.Dense(8), keras.layers.GroupQueryAttention(4, 4, 2)]
        x = keras.Input((None, 8))
        self.inner = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(x, x))

    def build(self, shape):
        self.scale = self.add_weight(shape=(8,), initializer="random_normal")
        self.attention.build(shape, shape)
        self.more[0].build(shape)
        self.more[1].build(shape, shape)

    def call(self, x):
        x = x + self.scale * self.attention(x, x, use_causal_mask=True)
        return self.inner(self.more[0](x)) + self.more[1](x, x)

    def get_config(self):
        return {**super().get_config(), "heads": self.heads}


class Model(keras.Model):
    """A model of one's own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = {"first": Block(), "second": Block(3)}

    def call(self, x):
        return self.blocks["second"](self.blocks["first"](x))


def own_model():
    model = Model()
    model(X)
    return model


def sequential():
    x = keras.Input((None, 8))
    attention = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(x, x))
    return keras.Sequential([keras.Input((7, 8)), keras.layers.Dense(8), attention, Block()])


@pytest.mark.slow
@pytest.mark.parametrize("make", [own_model, sequential])
def test_layers_inside_layers_are_found(make, tmp_path):
    model = make()
    exact = {"MultiHeadAttention", "GroupedQueryAttention"}
    count = sum(kind in exact for kind in kinds(model))
    copy = convert.replace_attention(model, attention_method="quadratic")
    assert kinds(copy).count("Performer") == count and not exact & set(kinds(copy))
    np.testing.assert_allclose(copy(X), model(X), rtol=1e-5, atol=1e-6)

    linear = convert.replace_attention(model, supports=16)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(linear(X) ** 2)
    assert all(g is not None for g in tape.gradient(loss, linear.trainable_variables))
    # The classes would make exact layers again: only weights can be saved, and it says so.
    with pytest.raises(
        NotImplementedError, match=r"(Block|Model).*load them into `replace_attention`"
    ):
        linear.save(tmp_path / "model.keras")
    linear.save_weights(tmp_path / "model.weights.h5")
    again = convert.replace_attention(model, supports=16)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again(X), linear(X))


class Opaque(keras.layers.Layer):
    """A layer that cannot be made from its configuration."""

    def __init__(self, attention, number):
        super().__init__()
        self.attention = attention

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return self.attention(x, x)


def test_models_that_cannot_be_converted_are_refused(model):
    with pytest.raises(TypeError, match="model='attention'"):
        convert.replace_attention("attention", supports=8)
    with pytest.raises(ValueError, match="must be built"):
        convert.replace_attention(keras.Sequential([keras.layers.Dense(3)]), supports=8)
    dense = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match=r"MultiHeadAttention.*of the types Dense"):
        convert.replace_attention(dense, supports=8)
    with pytest.raises(ValueError, match="that `where` selects"):
        convert.replace_attention(model, supports=8, where=lambda name: False)
    with pytest.raises(ValueError, match=r"'encoder' cannot be replaced.*supports=0"):
        convert.replace_attention(model, supports=0)
    with pytest.raises(ValueError, match=r"'encoder' cannot be replaced.*numbers of supports"):
        convert.replace_attention(model)
    opaque = Opaque(keras.layers.MultiHeadAttention(2, 4), object())
    opaque(X)
    with pytest.raises(ValueError, match=r"'opaque.*made again from its configuration.*get_config"):
        convert.replace_attention(opaque, supports=8)


def test_windows_stay_exact_or_are_refused():
    if not known({"sliding_window": 2}):
        pytest.skip("this Keras has no sliding_window")
    x = keras.Input((None, 8))
    model = keras.Model(
        x, keras.layers.MultiHeadAttention(2, 4, sliding_window=2, name="near")(x, x)
    )
    with pytest.raises(ValueError, match=r"'near' cannot be replaced.*sliding_window"):
        convert.replace_attention(model, supports=8)
    copy = convert.replace_attention(model, attention_method="quadratic")
    np.testing.assert_array_equal(copy(X), model(X))


class Hidden(keras.Model):
    """A functional model that makes its own layers, which its configuration does not contain."""

    def __init__(self, **kwargs):
        x = keras.Input((7, 8))
        attention = keras.layers.MultiHeadAttention(2, 4, name="own")
        super().__init__(x, attention(x, x), **kwargs)

    def get_config(self):
        return {"name": self.name}


def test_attention_in_a_graph_that_no_configuration_shows_is_refused():
    with pytest.raises(ValueError, match=r"'own' inside 'hidden' cannot be replaced.*Hidden makes"):
        convert.replace_attention(Hidden(), supports=8)


class Blocks(keras.Model):
    """A functional model of blocks that make their attention, as those of keras-hub are."""

    def __init__(self, **kwargs):
        x = keras.Input((7, 8))
        super().__init__(x, Block(name="two")(Block(name="one")(x)), **kwargs)

    def get_config(self):
        return {"name": self.name}


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside of a model"])
def test_a_model_of_blocks_is_converted_where_it_stands_and_not_saved_as_exact(inside, tmp_path):
    model = Blocks()
    if inside:
        x = keras.Input((7, 8))
        model = keras.Model(x, keras.layers.Dense(3)(model(x)))
    exact = convert.replace_attention(model, attention_method="quadratic")
    np.testing.assert_allclose(exact(X), model(X), rtol=1e-5, atol=1e-6)
    linear = convert.replace_attention(model, supports=16)
    assert np.abs(linear(X) - model(X)).max() > 1e-3
    with pytest.raises(NotImplementedError, match=r"Blocks.*load them into `replace_attention`"):
        linear.save(tmp_path / "model.keras")


def test_layers_of_one_name_are_told_apart_in_reports():
    linear = convert.replace_attention(Blocks(), supports=16, feature_map="learned", seed=1)
    x = np.random.default_rng(0).normal(size=[8, 7, 8]).astype("float32")
    layers = [layer.layer for layer in convert.calibrate(linear, x, steps=1).layers]
    assert len(set(layers)) == len(layers) == 6
    assert {"one/own", "two/own"} < set(layers)
