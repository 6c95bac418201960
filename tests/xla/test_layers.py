"""The Performer layer compiled by XLA: fit, evaluate and predict, by request and on "auto"."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import loader
from support.operator_calls import needs_xla

X = np.random.default_rng(0).normal(size=(6, 9, 8)).astype("float32")
Y = X[..., :1]


def attention(**options):
    return performer.Performer(
        **{"num_heads": 2, "key_dim": 4, "supports": 8, "seed": 5, "name": "attention", **options}
    )


@keras.saving.register_keras_serializable(package="test_layer_xla")
class MadeInBuild(keras.Model):
    """A model whose layers exist only once its `build` has run, after `compile`."""

    def build(self, shape):
        self.attention = attention(redraw_interval=2)
        self.attention.build(shape, shape)
        self.out = keras.layers.Dense(1)
        self.out.build(shape)
        self.built = True

    def call(self, x, training=False):
        return self.out(x + self.attention(x, x, use_causal_mask=True, training=training))


def trained(jit_compile):
    """A trained model, what `fit` and `evaluate` said, and its predictions."""
    keras.utils.set_random_seed(3)
    model = MadeInBuild()
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=jit_compile)
    # A last batch of another size.
    losses = model.fit(X, Y, batch_size=4, epochs=3, verbose=0, shuffle=False).history["loss"]
    assert model.jit_compile == jit_compile
    loss = model.evaluate(X, Y, batch_size=6, verbose=0)
    return model, losses, loss, model.predict(X, batch_size=6, verbose=0)


@pytest.mark.slow
@needs_xla
def test_compiled_training_is_the_training_without(tmp_path):
    plain, plain_losses, plain_loss, plain_predictions = trained(False)
    model, losses, loss, predictions = trained(True)
    # Six calls, two by each draw.
    assert int(model.attention.redraws) == int(plain.attention.redraws) == 2
    np.testing.assert_allclose(model.attention.projection, plain.attention.projection, rtol=1e-6)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-4)
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-4)
    np.testing.assert_allclose(predictions, plain_predictions, rtol=1e-3, atol=1e-3)

    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.jit_compile
    np.testing.assert_array_equal(again.predict(X, batch_size=6, verbose=0), predictions)


@needs_xla
@pytest.mark.parametrize("loaded", [True, False])
def test_auto_compiles_where_there_is_a_gpu_and_the_part_for_xla(loaded, monkeypatch):
    monkeypatch.setattr(loader, "supports_jit", lambda: loaded)
    inputs = keras.Input((9, 8))
    model = keras.Model(inputs, attention()(inputs, inputs))
    gpu = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *kind: [gpu])
    model.compile("sgd", "mse", jit_compile="auto")
    assert model.jit_compile == loaded
    assert model.predict(X, verbose=0).shape == X.shape
    if not loaded:
        with pytest.warns(UserWarning, match="Model doesn't support `jit_compile=True`"):
            model.compile("sgd", "mse", jit_compile=True)


@needs_xla
def test_masks_segments_and_states_under_xla():
    layer = attention(num_key_value_heads=1, max_segments=2)
    mask = tf.sequence_mask([9, 4, 0, 1, 5, 9], 9)
    ids = tf.constant([[0] * 4 + [1] * 5] * 6)

    def calls(x):
        first, state = layer(x[:, :5], x[:, :5], use_causal_mask=True, return_state=True)
        return [
            layer(x, x, value_mask=mask, query_mask=mask),
            layer(x, x, use_causal_mask=True, prefix_mask=tf.sequence_mask([3] * 6, 9)),
            layer(x, x, use_causal_mask=True, segment_ids=ids),
            layer(x, x, attention_mask=tf.linalg.band_part(tf.ones((9, 9), tf.bool), 2, 2)),
            first,
            layer(x[:, 5:], x[:, 5:], use_causal_mask=True, initial_state=state),
        ]

    plain = calls(X)
    for one, other in zip(tf.function(calls, jit_compile=True)(X), plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@needs_xla
def test_keys_are_dropped_anew_in_every_compiled_call():
    layer = attention(dropout=0.5)
    layer.build(X.shape, X.shape)
    step = tf.function(lambda x: layer(x, x, training=True), jit_compile=True)
    first, second = step(X).numpy(), step(X).numpy()
    assert np.all(np.isfinite(first)) and not np.array_equal(first, second)
