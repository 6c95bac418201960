"""`performer.export`: SavedModels with and without the compiled operators, read elsewhere."""

import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import performer
from performer.layers import Performer, PerformerDecoder, PerformerEncoder
from performer.ops import dispatch

BOUND = 2e-5  # of the portable form, as the docstring says

# What another program does: no line of it knows this package. With a library it loads that first.
READER = """
import sys
import numpy as np
import tensorflow as tf

given, result, library, portable, fused = sys.argv[1:]
inputs = [tf.constant(x) for x in np.load(given).values()]
model = tf.saved_model.load(portable)
results = list(map(model.serve, inputs))
tf.load_op_library(library)
model = tf.saved_model.load(fused)
results += map(model.serve, inputs)
np.savez(result, *results)
assert not any(name.split(".")[0] == "performer" for name in sys.modules)
"""


def names_of_operations(path):
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((path / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def known_to_tensorflow(path):
    return not any(name.startswith("Performer>") for name in names_of_operations(path))


def read_elsewhere(folder, inputs, *paths):
    np.savez(folder / "given.npz", *inputs)
    arguments = [folder / "given.npz", folder / "result.npz", *paths]
    code = [sys.executable, "-c", READER, *map(str, arguments)]
    subprocess.run(code, check=True, cwd=folder, capture_output=True)
    return list(np.load(folder / "result.npz").values())


def language_model(**options):
    return keras.Sequential(
        [
            keras.Input([None], dtype="int32"),
            keras.layers.Embedding(50, 16, mask_zero=True),
            PerformerDecoder(32, num_heads=2, supports=16, **options),
            keras.layers.Dense(50),
        ]
    )


def encoder(**options):
    inputs = keras.Input([None, 16])
    return keras.Model(inputs, PerformerEncoder(32, num_heads=2, supports=16, **options)(inputs))


def cross_attention(**options):
    query, value = keras.Input([None, 16]), keras.Input([None, 16])
    return keras.Model([query, value], Performer(2, 8, supports=16, **options)(query, value))


def converted():
    inputs = keras.Input([None, 16])
    exact = keras.layers.MultiHeadAttention(2, 8)(inputs, inputs, use_causal_mask=True)
    return performer.convert.replace_attention(keras.Model(inputs, exact), supports=16)


MODELS = {
    "causal, padding": language_model,
    "causal, window": lambda: language_model(exact_window=64),
    "rotary": lambda: language_model(rotary_embedding=performer.RotaryEmbedding()),
    "encoder": encoder,
    "encoder, window": lambda: encoder(exact_window=64),
    "cross": cross_attention,
    "learned": lambda: cross_attention(feature_map="learned"),
    "exact keys": lambda: cross_attention(exact_keys=3),
    "converted": converted,
}
FAST = ("cross",)


def sample(model, batch, length):
    """Inputs of a model, tokens (the last ones padding) or entries of normal size."""
    random = np.random.default_rng(length)
    inputs = []
    for x in model.inputs:
        if x.dtype == "int32":
            inputs.append(random.integers(1, 50, (batch, length), "int32"))
            inputs[-1][:, -3:] = 0
        else:
            inputs.append(random.standard_normal((batch, length, 16), "float32"))
    return inputs if len(inputs) > 1 else inputs[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in MODELS],
)
def test_a_portable_model_of_any_size_has_the_values_of_the_operators(name, tmp_path):
    model = MODELS[name]()
    weights = [w.numpy().copy() for w in model.weights]
    path = performer.export(model, tmp_path / "1")
    assert known_to_tensorflow(path)
    loaded = tf.saved_model.load(path)
    for batch, length in ((2, 70), (1, 9)):
        inputs = sample(model, batch, length)
        assert np.abs(loaded.serve(inputs) - model(inputs)).max() < BOUND
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.weights, strict=True))


def test_both_kinds_are_read_without_the_package(tmp_path):
    model = encoder()
    inputs = [sample(model, 2, 70), sample(model, 3, 11)]
    portable = performer.export(model, tmp_path / "portable")
    fused = performer.export(model, tmp_path / "fused", portable=False)
    assert known_to_tensorflow(portable)
    assert not known_to_tensorflow(fused)
    library = performer.library.status().path
    results = read_elsewhere(tmp_path, inputs, library, portable, fused)
    for x, of_portable, of_fused in zip(inputs, results[:2], results[2:], strict=True):
        assert np.abs(of_portable - model(x)).max() < BOUND
        # Eagerly, products of TensorFlow's own may have other last bits.
        assert np.abs(of_fused - model(x)).max() < 1e-5
        assert np.array_equal(of_fused, tf.saved_model.load(fused).serve(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_litert_converts_and_runs_it(name, tmp_path):
    model = MODELS[name]()
    inputs = sample(model, 2, 70)
    arrays = inputs if isinstance(inputs, list) else [inputs]
    specs = [tf.TensorSpec(x.shape, x.dtype, name=f"x{i}") for i, x in enumerate(arrays)]
    signature = [specs if isinstance(inputs, list) else specs[0]]
    path = performer.export(model, tmp_path / "1", input_signature=signature)
    lite = tf.lite.TFLiteConverter.from_saved_model(str(path)).convert()
    run = tf.lite.Interpreter(model_content=lite).get_signature_runner("serving_default")
    (got,) = run(**{spec.name: x for spec, x in zip(specs, arrays, strict=True)}).values()
    assert np.abs(got - model(inputs)).max() < BOUND


def streaming():
    layers = [
        performer.TokenAndPositionEmbedding(50, sequence_length=100, embedding_dim=16),
        PerformerDecoder(32, num_heads=2, supports=16, exact_window=64),
        keras.layers.Dense(50),
    ]
    model = performer.StreamingSequential(layers)
    model(np.ones([1, 3], "int32"))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("portable", [True, False])
def test_a_stream_is_served_by_its_signatures(portable, tmp_path):
    model = streaming()
    path = performer.export(model, tmp_path / "1", portable=portable, stream=True)
    assert known_to_tensorflow(path) is portable
    loaded = tf.saved_model.load(path)
    signatures = loaded.signatures
    tokens = np.random.default_rng(0).integers(0, 50, (3, 80), "int32")
    parts, state = [], signatures["start"](batch_size=tf.constant(3))
    for first, last in ((0, 20), (20, 21), (21, 80)):
        state = signatures["step"](inputs=tf.constant(tokens[:, first:last]), **state)
        parts.append(state.pop("outputs"))
    whole = model(tokens)
    assert np.abs(tf.concat(parts, 1) - whole).max() < BOUND
    served = signatures["serving_default"](inputs=tf.constant(tokens))["outputs"]
    assert np.abs(served - whole).max() < BOUND


def test_other_threads_go_on_with_the_operators():
    x = tf.zeros([1, 4, 2, 8])
    graphs = {}

    def trace(name):
        graph = tf.function(lambda x: performer.favor_attention(x, x, x, tf.ones([4, 8])))
        nodes = graph.get_concrete_function(x).graph.get_operations()
        graphs[name] = {node.type for node in nodes}

    with dispatch.composed():
        with dispatch.composed():
            trace("inner")
        trace("outer")
        thread = threading.Thread(target=trace, args=["thread"])
        thread.start()
        thread.join()
    trace("after")
    compiled = {name: "Performer>Summarize" in types for name, types in graphs.items()}
    assert compiled == {"inner": False, "outer": False, "thread": True, "after": True}


class Traced(keras.Model):
    """A model that calls a graph which was traced when it was built."""

    def build(self, shape):
        self.layer = Performer(2, 8, supports=16)
        self.layer.build(shape, shape)
        graph = tf.function(lambda x: self.layer(x, x))
        self.graph = graph.get_concrete_function(tf.TensorSpec(shape))

    def call(self, x):
        return self.graph(x)


def test_a_graph_that_was_traced_before_is_refused(tmp_path):
    model, spec = Traced(), tf.TensorSpec([2, 5, 16])
    model(tf.zeros(spec.shape))
    with pytest.raises(ValueError, match=r"portable=True needs .* it holds Performer>"):
        performer.export(model, tmp_path / "1", input_signature=[spec])
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model must be a Keras model or layer, got int"):
        performer.export(3, tmp_path / "1")
    layer = Performer(2, 8, supports=16)
    with pytest.raises(ValueError, match="model must be built, got"):
        performer.export(layer, tmp_path / "1")
    layer(tf.zeros([1, 3, 16]), tf.zeros([1, 3, 16]))
    with pytest.raises(ValueError, match=r"input_signature must be given .* for Performer"):
        performer.export(layer, tmp_path / "1")
    with pytest.raises(TypeError, match="stream=True needs a model with `get_initial_state`"):
        performer.export(encoder(), tmp_path / "1", stream=True)
    with pytest.raises(FileExistsError, match="path must not exist"):
        performer.export(encoder(), tmp_path)
    with pytest.raises(TypeError, match="portable must be True or False"):
        performer.export(encoder(), tmp_path / "1", portable="yes")
