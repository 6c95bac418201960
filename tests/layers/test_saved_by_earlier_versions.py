"""Models in `saved`, which earlier versions wrote, load and predict what they predicted then.

A file is made by this module itself, run as a program by the version whose files are to be kept,
with the oldest Keras that is supported (the files of a newer one may not load in an older one):

    python tests/layers/test_saved_by_earlier_versions.py softmax relu

writes `saved/softmax.keras` and `saved/relu.keras`, and beside each an `.npz` of inputs and
predictions. A file that is there stays as it is: it stands for its version.
"""

import sys
import zipfile
from functools import cache
from pathlib import Path

import keras
import numpy as np
import pytest

import performer
from performer.ops import fingerprint

FOLDER = Path(__file__).parent / "saved"
CHANNELS, VOCABULARY = 8, 11


# For float32, see `test_predictions`.
TOLERANCE = {"rtol": 6e-5, "atol": 6e-5}


def attention(feature_map):
    inputs = keras.Input((7, CHANNELS))
    layer = performer.Performer(
        2, 4, supports=8, feature_map=feature_map, redraw_interval=2, seed=3, name="attention"
    )
    return keras.Model(inputs, layer(inputs, inputs, use_causal_mask=True))


def grouped():
    inputs = keras.Input((7, CHANNELS))
    layer = performer.Performer(4, 4, supports=8, num_key_value_heads=2, scaling=1, seed=3)
    return keras.Model(inputs, layer(inputs, inputs))


def encoder_decoder():
    """Tokens, an encoder block, and a decoder block with cross-attention."""
    tokens = keras.Input((7,), dtype="int32")
    options = {"intermediate_dim": 8, "num_heads": 2, "supports": 8, "seed": 3}
    x = performer.TokenAndPositionEmbedding(VOCABULARY, 9, CHANNELS, mask_zero=True)(tokens)
    encoded = performer.PerformerEncoder(**options)(x)
    decoder = performer.PerformerDecoder(
        **options,
        normalize_first=True,
        rotary_embedding=performer.RotaryEmbedding(),
        attention_options={"num_key_value_heads": 1},
        delay_keys=True,
    )
    return keras.Model(tokens, decoder(x, encoded))


def streaming():
    model = performer.StreamingSequential(
        [
            performer.TokenAndPositionEmbedding(VOCABULARY, 9, CHANNELS),
            performer.PerformerDecoder(8, 2, supports=8, seed=3),
            keras.layers.Dense(VOCABULARY),
        ]
    )
    model(np.zeros([1, 7], "int32"))
    return model


MODELS = {
    "softmax": lambda: attention("softmax"),
    "relu": lambda: attention("relu"),
    "grouped": grouped,
    "encoder_decoder": encoder_decoder,
    "streaming": streaming,
}


def write(name):
    """Writes the model of this name, with weights that are not their initial values."""
    path = FOLDER / f"{name}.keras"
    if path.exists():
        raise FileExistsError(f"{path} stands for the version that wrote it")
    random = np.random.default_rng(5)
    model = MODELS[name]()
    for weight in model.trainable_weights:
        weight.assign(random.normal(size=weight.shape))
    takes_tokens = name in ("encoder_decoder", "streaming")
    inputs = (
        random.integers(0, VOCABULARY, size=(3, 7)).astype("int32")
        if takes_tokens
        else random.normal(size=(3, 7, CHANNELS)).astype("float32")
    )
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a third of the size
        for part, content in parts.items():
            archive.writestr(part, content)
    np.savez_compressed(path.with_suffix(".npz"), inputs=inputs, outputs=model(inputs))


@cache
def loaded(name):
    return keras.models.load_model(FOLDER / f"{name}.keras")


@pytest.mark.parametrize("name", MODELS)
def test_predictions(name):
    model = loaded(name)
    saved = np.load(FOLDER / f"{name}.npz")
    # Equal to the bit on the processor that wrote the files; another may add in another order.
    # A prediction is a chain of fewer than 100 float32 operations, and no term of their sums is
    # more than about 10 times the largest prediction: 100 * 10 * 2**-24 = 6e-5.
    np.testing.assert_allclose(model(saved["inputs"]), saved["outputs"], **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_projections_have_their_fingerprints(name):
    layers = performer.callbacks.linear_layers(loaded(name))
    assert layers
    for layer in layers:
        assert layer.draw == int(fingerprint(layer.projection)) and layer.redraws == 0


def test_streaming_in_parts():
    model = loaded("streaming")
    saved = np.load(FOLDER / "streaming.npz")
    state, parts = model.get_initial_state(3), []
    for part in np.split(saved["inputs"], [2, 3], axis=1):
        output, state = model(part, initial_state=state, return_state=True)
        parts.append(output)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), saved["outputs"], **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
def test_names_of_weights(name):
    """The models that this version makes have the weights of the saved ones, in their order."""
    for one, other in zip(MODELS[name]().weights, loaded(name).weights, strict=True):
        assert one.path.endswith(other.path.split("/", 1)[1])  # the first part counts the layers
        assert one.shape == other.shape


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(name)
