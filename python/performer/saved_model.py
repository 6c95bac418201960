"""Writes models as SavedModels: with the compiled operators, or without any of them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import keras
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from performer import checks
from performer.ops import dispatch

_OPERATORS = "Performer>"  # what the names of all compiled operators begin with
_TOKENS = (tf.TensorSpec([None, None], tf.int32, name="inputs"),)


@tf.autograph.experimental.do_not_convert
def export(model, path, *, portable=True, input_signature=None, stream=False):
    """Writes what a model computes in inference as a SavedModel, for programs without this package.

    A portable one is made of operations that every TensorFlow has: TensorFlow Serving serves it as
    it is, and LiteRT converts it. Its features are kept in memory, and it is slower: it is the
    composition that also runs where the compiled library is missing. The other kind holds the
    compiled operators, and needs their library, `performer.library.status().path`, in the process
    that runs it. The guide on serving says how it gets there.

    The signatures of the SavedModel:

    - `serve`, also known as `serving_default`: the model's call, with `training=False`.
    - `start`, with `stream=True`: `batch_size`, an int32 scalar, to the state before the first
      position: `state_0`, `state_1`, and so on.
    - `step`, with `stream=True`: `inputs` and such a state to `outputs` and the state after them.
      `serve` then takes `inputs` to `outputs`. `generate` is not written: it is this step in a
      loop, and the choice of a token is the caller's.

    Args:
        model: Keras model or layer, built. Its weights do not change.
        path: Folder to write, which must not exist. It appears when it is complete, so that a
            server which watches for new versions never reads a part.
        portable: Boolean, whether to write operations of TensorFlow only.
        input_signature: List of the arguments of the call, each a structure of `tf.TensorSpec`;
            None in a shape is any size. Defaults to the inputs of a functional or sequential model,
            of any batch size, and with `stream` to tokens, int32 `(B, L)`. LiteRT converts fewer
            models with unknown sizes than with known ones: give it all sizes.
        stream: Boolean, whether the model goes on from a state: it has
            `get_initial_state(batch_size)`, and its call takes `initial_state` and `return_state`.

    Returns:
        `path`, as a `pathlib.Path`.

    Raises:
        FileExistsError: `path` exists.
        TypeError: `model` is no layer; with `stream`, it has no state.
        ValueError: it is not built; it needs an `input_signature`; or `portable=True` and a
            `tf.function` in it has been traced before, with the compiled operators.

    Numerics: outputs of a portable model of float32 are those of the compiled operators within
        2e-5, at entries of the size of normalized ones; both are within `performer.tolerances` of
        the exact estimator.

    Example:

    >>> import tempfile
    >>> import keras
    >>> import tensorflow as tf
    >>> import performer
    >>> inputs = keras.Input([None, 8])
    >>> model = keras.Model(inputs, performer.PerformerEncoder(16, num_heads=2)(inputs))
    >>> path = performer.export(model, tempfile.mkdtemp() + "/1")
    >>> x = tf.random.normal([2, 50, 8])
    >>> served = tf.saved_model.load(path)
    >>> bool(tf.reduce_max(abs(served.serve(x) - model(x))) < 2e-5)
    True
    """
    portable, stream = checks.flag("portable", portable), checks.flag("stream", stream)
    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"path must not exist, got {str(path)!r}")
    _check_model(model, stream, input_signature)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that is no number, which TensorFlow Serving does not take for a version.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as parent:
        folder = os.path.join(parent, "model")
        with dispatch.composed() if portable else contextlib.nullcontext():
            if stream:
                _write_stream(model, folder, input_signature or _TOKENS)
            elif input_signature is None:
                model.export(folder, format="tf_saved_model", verbose=False)
            else:
                _write(model, folder, {"serve": (_call_of(model), list(input_signature))})
        if portable and (found := _compiled_operators(folder)):
            raise ValueError(
                "portable=True needs a model that is traced anew, and a tf.function in this one was"
                f" traced before: it holds {', '.join(found)}. Load the model in a fresh process "
                "and export it before it is called"
            )
        os.rename(folder, path)
    return path


def _check_model(model, stream, input_signature):
    """Refuses what cannot be exported, in words of its own."""
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"model must be a Keras model or layer, got {type(model).__name__}")
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which was never called")
    if stream and not hasattr(model, "get_initial_state"):
        raise TypeError(
            "stream=True needs a model with `get_initial_state`, such as "
            f"performer.StreamingSequential, got {type(model).__name__}"
        )
    if not stream and input_signature is None and not getattr(model, "inputs", None):
        raise ValueError(
            "input_signature must be given for a model that is neither functional nor sequential: "
            f"a list of tf.TensorSpec, one for each argument, got None for {type(model).__name__}"
        )


def _call_of(model):
    """The model's call in inference, of positional arguments."""

    def serve(*inputs):
        return model(*inputs, training=False)

    return serve


def _write(model, folder, endpoints):
    """Writes functions of a model, by name: pairs of a function and its input signature."""
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, signature) in endpoints.items():
        archive.add_endpoint(name, function, signature)
    archive.write_out(folder, verbose=False)


def _write_stream(model, folder, input_signature):
    """Writes `serve`, `start` and `step` of a model that goes on from a state."""
    (inputs,) = input_signature
    inputs = tf.TensorSpec(inputs.shape, inputs.dtype, name="inputs")
    example = model.get_initial_state(1)
    specs = {
        f"state_{i}": tf.TensorSpec(shape, x.dtype, name=f"state_{i}")
        for i, (x, shape) in enumerate(
            zip(tf.nest.flatten(example), _shapes_of_any_batch(model), strict=True)
        )
    }

    def named(state):
        return dict(zip(specs, tf.nest.flatten(state), strict=True))

    def serve(inputs):
        return {"outputs": model(inputs, training=False)}

    def start(batch_size):
        return named(model.get_initial_state(batch_size))

    def step(inputs, state):
        state = tf.nest.pack_sequence_as(example, [state[name] for name in specs])
        outputs, state = model(inputs, initial_state=state, return_state=True, training=False)
        return {"outputs": outputs, **named(state)}

    batch_size = tf.TensorSpec([], tf.int32, name="batch_size")
    _write(
        model,
        folder,
        {
            "serve": (serve, [inputs]),
            "start": (start, [batch_size]),
            "step": (step, [inputs, specs]),
        },
    )


def _shapes_of_any_batch(model):
    """The shapes of a state's tensors, None where they follow the batch size."""
    one, two = (tf.nest.flatten(model.get_initial_state(size)) for size in (1, 2))
    return [
        [size if size == other else None for size, other in zip(x.shape, y.shape, strict=True)]
        for x, y in zip(one, two, strict=True)
    ]


def _compiled_operators(folder):
    """The names of the compiled operators in a SavedModel, sorted."""
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString(Path(folder, "saved_model.pb").read_bytes())
    names = set()
    for graph in saved.meta_graphs:
        names |= {node.op for node in graph.graph_def.node}
        for function in graph.graph_def.library.function:
            names |= {node.op for node in function.node_def}
    return sorted(name for name in names if name.startswith(_OPERATORS))
