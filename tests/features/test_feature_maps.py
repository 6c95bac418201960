"""Feature maps as objects: drawn, saved and trained with the layer, without a change to it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import composition, loader
from performer.features import feature_maps
from performer.features.feature_maps import FeatureMap
from support import compare

X = np.random.default_rng(0).normal(0, 0.5, (2, 6, 8)).astype("float32")


@keras.saving.register_keras_serializable(package="test")
class Hyperbolic(FeatureMap):
    """Two features for each row."""

    def sides(self, projection):
        both = tf.concat([projection, -projection], 0)
        return both, both


@keras.saving.register_keras_serializable(package="test")
class Balanced(FeatureMap):
    """FAVOR+ of (g query, key / g), which softmax does not see; its own norm, and a bias."""

    key_norm = False

    def __init__(self, factor=1.5):
        self.factor = factor

    def sides(self, projection):
        return projection * self.factor, projection / self.factor

    def key_bias(self, key):
        key = tf.cast(key, tf.float32) / self.factor
        return -tf.transpose(tf.reduce_sum(key**2, -1), [0, 2, 1]) / (2 * key.shape[-1] ** 0.5)

    def get_config(self):
        return {"factor": self.factor}


@keras.saving.register_keras_serializable(package="test")
class Shifted(FeatureMap):
    """A bias of the queries and the opposite shift of the features of the keys: FAVOR+ again."""

    def feature_bias(self, projection):
        return 0.25 * tf.reduce_sum(projection, -1)

    def key_bias(self, key):
        return tf.zeros(tf.shape(key)[:2])


@keras.saving.register_keras_serializable(package="test")
class Softplus(FeatureMap):
    """A function of its own."""

    epilogue = staticmethod(lambda u: tf.math.log(tf.math.softplus(u)))


@keras.saving.register_keras_serializable(package="test")
class Scaled(FeatureMap, keras.layers.Layer):
    """A map with a weight that trains."""

    def __init__(self, **kwargs):
        keras.layers.Layer.__init__(self, **kwargs)

    def build(self, shape):
        self.log_factor = self.add_weight(shape=(1, shape[1]), initializer="zeros", name="factor")

    def sides(self, projection):
        factor = tf.exp(tf.convert_to_tensor(self.log_factor))
        return projection * factor, projection / factor

    def get_config(self):
        return keras.layers.Layer.get_config(self)


def layer_with(feature_map, **options):
    options = {"num_heads": 2, "key_dim": 4, "supports": 16, "seed": 5, **options}
    return performer.Performer(feature_map=feature_map, **options)


@pytest.mark.parametrize("feature_map", [Hyperbolic(), Balanced()])
def test_maps_of_softmax_approximate_it(feature_map):
    layer = layer_with(feature_map, supports=2**14)
    exact = keras.layers.MultiHeadAttention(2, 4)
    exact.build(X.shape, X.shape)
    layer.build(X.shape, X.shape)
    performer.convert.copy_weights(exact, layer)
    for causal in (False, True):
        output = layer(X, X, use_causal_mask=causal)
        compare.assert_close(output, exact(X, X, use_causal_mask=causal), rms=0.03)


MAPS = [Hyperbolic(), Balanced(), Shifted(), Softplus(), Scaled()]


class OwnNorm(FeatureMap):
    """A bias of the keys in the keys' own type."""

    def key_bias(self, key):
        return -tf.reduce_sum(key**2, [2, 3])


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16", "mixed_float16"])
def test_keys_are_dropped_beside_a_bias_in_every_type(dtype):
    layer = layer_with(OwnNorm(), dropout=0.3, dtype=dtype)
    assert np.isfinite(np.asarray(layer(X, X, training=True), "float32")).all()


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda m: type(m).__name__)
def test_every_form_of_attention_uses_the_map(feature_map):
    """Linear, prefix and dense forms agree; a causal row is the attention of its own past."""
    layer = layer_with(feature_map, num_key_value_heads=1)
    causal = layer(X, X, use_causal_mask=True)
    mask = np.tri(6, dtype=bool)
    compare.assert_close(layer(X, X, attention_mask=mask), causal, relative=1e-5)
    nothing = np.zeros((2, 6), bool)
    prefixed = layer(X, X, use_causal_mask=True, prefix_mask=nothing)
    compare.assert_close(prefixed, causal, relative=1e-5)
    compare.assert_close(layer(X[:, -1:], X), causal[:, -1:], relative=1e-5)
    state, parts = layer.get_initial_state(2), []
    for part in (X[:, :2], X[:, 2:]):
        output, state = layer(
            part, part, use_causal_mask=True, initial_state=state, return_state=True
        )
        parts.append(output)
    compare.assert_close(tf.concat(parts, 1), causal, relative=1e-5)
    with pytest.raises(AssertionError):
        compare.assert_close(
            layer_with("softmax", num_key_value_heads=1)(X, X), layer(X, X), rms=1e-3
        )


def test_a_function_of_its_own_is_a_map_of_two_kernels():
    """Weights are sums of softplus(w.q) softplus(w.k)."""
    layer = layer_with(Softplus())
    layer.build(X.shape, X.shape)
    q, k, v = (
        dense(X).numpy() for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
    )
    w = layer.projection.numpy()
    features = [np.logaddexp(0, np.einsum("blhd,md->bhlm", x, w)) for x in (q, k)]
    scores = np.einsum("bhlm,bhsm->bhls", *features)
    attended = np.einsum("bhls,bshe->blhe", scores / scores.sum(-1, keepdims=True), v)
    expected = layer.output_dense(attended.astype("float32"))
    compare.assert_close(layer(X, X), expected, relative=1e-5)


def test_names_and_objects_run_compiled_and_functions_composed(monkeypatch):
    if loader.ops() is None:
        pytest.skip("there is no compiled library here")
    called = []
    real = composition.summarize
    monkeypatch.setattr(composition, "summarize", lambda **k: called.append(1) or real(**k))
    for feature_map, runs in (("relu", 0), (Hyperbolic(), 0), (Softplus(), 1)):
        layer_with(feature_map)(X, X)
        assert len(called) == runs


def test_number_of_features():
    for feature_map, features in (("softmax", 16), (Hyperbolic(), 32)):
        layer = layer_with(feature_map)
        layer.build(X.shape, X.shape)
        assert layer.projection.shape == (16, 4)
        assert layer.random_features().for_keys()["projection"][1].shape == (features, 4)


def test_weights_of_a_map_train_and_come_last():
    layer = layer_with(Scaled())
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(X, X) ** 2)
    factor = layer.trainable_weights[-1]
    assert factor.path.endswith("factor")
    assert np.any(tape.gradient(loss, factor.value).numpy() != 0)
    exact = keras.layers.MultiHeadAttention(2, 4, name=layer.name)
    exact.build(X.shape, X.shape)
    assert [w.path for w in layer.weights[:8]] == [w.path for w in exact.weights]


@pytest.mark.parametrize("feature_map", MAPS, ids=lambda m: type(m).__name__)
def test_saved_with_the_model(feature_map, tmp_path):
    x = keras.Input((6, 8))
    model = keras.Model(x, layer_with(feature_map, redraw_interval=1)(x, x))
    model(X, training=True)
    model(X, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), model(X))
    for _ in range(2):
        np.testing.assert_array_equal(loaded(X, training=True), model(X, training=True))
    assert type(loaded.layers[-1].get_config()["feature_map"]) is dict


def test_attributes_that_were_set_are_saved_and_others_refused():
    loud = feature_maps.FeatureMap(query_norm=False, scale=0.5)
    again = feature_maps.get(feature_maps.serialize(loud))
    assert (again.query_norm, again.scale, again.key_norm) == (False, 0.5, True)
    assert feature_maps.FeatureMap.query_norm
    with pytest.raises(TypeError, match=r"takes the attributes epilogue, .*; got query_nrom=False"):
        feature_maps.FeatureMap(query_nrom=False)


def test_what_is_no_map_is_refused():
    class Half:
        epilogue = "softmax"

    class Wrong(FeatureMap):
        epilogue = "sigmoid"

    for bad, message in (
        ("sigmoid", "one of 'softmax', 'relu', 'elu'"),
        (Half(), "without .*sides"),
        (FeatureMap, "class"),
        (None, "None"),
        (Wrong(), "epilogue='sigmoid'"),
    ):
        with pytest.raises(ValueError, match=f"`feature_map.*{message}"):
            layer_with(bad)
        with pytest.raises(ValueError, match="feature_map"):
            feature_maps.get(bad)
