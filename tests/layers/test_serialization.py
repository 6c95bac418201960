"""Saving a model with Performer layers, every way Keras and TensorFlow know: equal to the bit."""

import inspect
import json
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from support.keras_versions import known

OPTIONS = known(
    {
        "num_heads": 2,
        "key_dim": 4,
        "value_dim": 3,
        "dropout": 0.2,
        "use_bias": False,
        "output_shape": (6,),
        "attention_axes": (1,),
        "attention_method": "linear",
        "supports": 8,
        "scaling": 1,
        "feature_map": "elu",
        "redraw_interval": 3,
        "seed": 11,
        "flash_attention": True,
        "sliding_window": None,
        "use_gate": True,
        "kernel_initializer": "he_normal",
        "kernel_regularizer": "l2",
        "num_key_value_heads": 1,
        "max_segments": 3,
        "dense_limit": 1000,
        "name": "attention",
        "dtype": "mixed_bfloat16",
    }
)


def make_model(seed=None):
    inputs = keras.Input((5, 6))
    attention = performer.Performer(
        2, 4, supports=8, seed=seed, redraw_interval=2, dropout=0.1, name="attention"
    )
    return keras.Model(inputs, attention([inputs, inputs], use_causal_mask=True))


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")


@pytest.fixture(scope="module")
def trained(data):
    """A model after three training calls: one redraw, and one call of its draw used up."""
    model = make_model()
    for _ in range(3):
        model(data, training=True)
    assert model.get_layer("attention").redraws == 1
    return model


@pytest.fixture(scope="module")
def saved(trained, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trained.save(folder / "model.keras")
    trained.save_weights(folder / "model.weights.h5")
    trained.export(folder / "exported", verbose=False)
    tf.train.Checkpoint(model=trained).write(str(folder / "checkpoint"))
    np.save(folder / "data.npy", data)
    return folder


def test_config_is_complete():
    layer = performer.Performer(**OPTIONS)
    config = layer.get_config()
    assert config["dtype"]["config"]["name"] == "mixed_bfloat16"
    assert config["kernel_initializer"]["class_name"] == "HeNormal"
    for name in set(OPTIONS) - {"dtype", "kernel_initializer", "kernel_regularizer"}:
        assert config[name] == OPTIONS[name], name
    config = json.loads(json.dumps(config))
    again = performer.Performer.from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config


def test_every_constructor_argument_is_in_the_config():
    config = performer.Performer(**OPTIONS).get_config()
    for layer_class in (performer.Performer, keras.layers.MultiHeadAttention):
        names = set(inspect.signature(layer_class.__init__).parameters) - {"self", "kwargs"}
        # The parent keeps `activity_regularizer` out of its own config.
        assert names - {"activity_regularizer"} <= set(config)


def test_registered_under_its_package():
    assert keras.saving.get_registered_name(performer.Performer) == "performer>Performer"


def test_weights_of_the_parent_come_first(trained):
    exact = keras.layers.MultiHeadAttention(2, 4, name="attention")
    exact.build((4, 5, 6), (4, 5, 6))
    paths = [w.path for w in trained.get_layer("attention").weights]
    assert paths[: len(exact.weights)] == [w.path for w in exact.weights]
    assert paths[len(exact.weights) :] == [
        f"attention/random_projection/{name}"
        for name in ("fingerprint", "projection", "redraws", "calls", "base_seed")
    ]


def test_keras_file(trained, saved, data):
    loaded = keras.models.load_model(saved / "model.keras")
    np.testing.assert_array_equal(loaded(data), trained(data))
    expected = trained.get_layer("attention").get_weights()
    for one, other in zip(loaded.get_layer("attention").get_weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_file_restores_the_schedule_too(trained, saved, data):
    restored, reference = make_model(seed=77), keras.models.load_model(saved / "model.keras")
    assert not np.array_equal(restored(data), trained(data))
    restored.load_weights(saved / "model.weights.h5")
    np.testing.assert_array_equal(restored(data), trained(data))
    for model in (restored, reference):
        for _ in range(2):
            model(data, training=True)
        assert model.get_layer("attention").redraws == 2
    # The seed is a weight: what is drawn next does not depend on the configuration's seed.
    np.testing.assert_array_equal(restored(data), reference(data))


def test_saved_model(trained, saved, data):
    exported = tf.saved_model.load(str(saved / "exported"))
    np.testing.assert_array_equal(exported.serve(data), trained(data))


def test_checkpoint(trained, saved, data):
    model = make_model(seed=78)
    tf.train.Checkpoint(model=model).read(str(saved / "checkpoint")).assert_consumed()
    np.testing.assert_array_equal(model(data), trained(data))
    assert model.get_layer("attention").redraws == 1


def test_clone(trained, data):
    clone = keras.models.clone_model(trained)
    clone.set_weights(trained.get_weights())
    np.testing.assert_array_equal(clone(data), trained(data))


FRESH = """
import sys, pathlib
import keras, numpy as np, tensorflow as tf
import performer
folder = pathlib.Path(sys.argv[1])
data = np.load(folder / "data.npy")
model = keras.models.load_model(folder / "model.keras")
np.save(folder / "keras.npy", model(data))
exported = tf.saved_model.load(str(folder / "exported"))
np.save(folder / "exported.npy", exported.serve(data))
for name in ("weights", "checkpoint"):
    other = keras.models.clone_model(model)
    if name == "weights":
        other.load_weights(folder / "model.weights.h5")
    else:
        tf.train.Checkpoint(model=other).read(str(folder / "checkpoint")).assert_consumed()
    np.save(folder / f"{name}.npy", other(data))
"""


@pytest.mark.slow
def test_fresh_process(trained, saved, data):
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for name in ("keras", "exported", "weights", "checkpoint"):
        np.testing.assert_array_equal(np.load(saved / f"{name}.npy"), trained(data), err_msg=name)


SERVER = """
import sys
import numpy as np, tensorflow as tf
library, folder = sys.argv[1:]
tf.load_op_library(library)
model = tf.saved_model.load(folder + "/exported")
np.save(folder + "/served.npy", model.serve(np.load(folder + "/data.npy")))
assert "performer" not in sys.modules
"""


@pytest.mark.slow
def test_an_exported_model_needs_the_compiled_file_only(trained, saved, data):
    if performer.loader.status().state != "loaded":
        pytest.skip("there is no compiled library here")
    library = shutil.copy(performer.loader.status().path, saved / "attention.so")
    command = [sys.executable, "-I", "-c", SERVER, library, str(saved)]
    result = subprocess.run(command, cwd=saved, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(saved / "served.npy"), trained(data))
