"""Every argument of every public function, given values of every wrong kind.

A value is served, or refused by a ValueError or TypeError of this package that names the argument:
no exception of Python, NumPy, TensorFlow or Keras comes through.
"""

import fractions
import functools
import traceback
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import callbacks, diagnostics, feature_maps, generate, ops
from performer.features.tolerances import tolerances
from performer.ops.dense import dense_attention

pytestmark = pytest.mark.slow

X = tf.constant(np.random.default_rng(0).normal(size=[1, 3, 2, 4]), tf.float32)
W = performer.orthogonal_projection(6, 4, seed=1)
IDS = tf.constant([[0, 0, 1]])
MASK = tf.ones([1, 3], tf.bool)
STATE = ops.summarize(X, X, W, draw=0)
SEQUENCE = tf.constant(np.random.default_rng(0).normal(size=[1, 3, 8]), tf.float32)


class Opaque:
    def __repr__(self):
        return "Opaque()"


POOL = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "1": 1,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "10**400": 10**400,
    "2**31": 2**31,
    "2**63": 2**63,
    "70000": 70000,
    "text": "text",
    "bytes": b"text",
    "object": Opaque(),
    "class": Opaque,
    "function": lambda x: x,
    "empty list": [],
    "list": [1, 2],
    "ragged list": [[1, 2], [3]],
    "list of True": [[True, False, True]],
    "dict": {"a": 1},
    "complex": 1 + 2j,
    "fraction": fractions.Fraction(1, 3),
    "complex array": np.ones([1, 3, 2, 4], np.complex64),
    "object array": np.array([Opaque(), None]),
    "empty array": np.zeros([1, 3, 0, 4], np.float32),
    "no features": np.zeros([1, 3, 2, 0], np.float32),
    "text array": np.array([["a"]]),
    "ragged tensor": tf.ragged.constant([[1, 2], [3]]),
    "complex state": STATE._replace(
        log_mass=tf.cast(STATE.log_mass, tf.complex64), mean=tf.cast(STATE.mean, tf.complex64)
    ),
    "state of objects": ops.AttentionState(Opaque(), Opaque(), Opaque()),
    "state without heads": ops.empty_state(1, 0, 6, 4),
}
# What would run for long, or take all memory, if it is served: it is right, but no test.
LARGE = {"2**31", "70000"}


class Cycle:
    """A model for `generate`."""

    def get_initial_state(self, batch_size):
        return tf.zeros([batch_size])

    def __call__(self, tokens, initial_state, return_state, training):
        return tf.one_hot((tokens + 1) % 5, 5), initial_state


@functools.cache
def layer():
    made = performer.Performer(2, 4, supports=6, seed=1)
    made(SEQUENCE, SEQUENCE)
    return made


@functools.cache
def positions():
    made = performer.PositionEmbedding(9), performer.TokenAndPositionEmbedding(9, 9, 8)
    made[0](SEQUENCE), made[1](IDS)
    return made


attention = {"query": X, "key": X, "value": X, "projection": W}
options = {"feature_bias": None, "feature_map": "softmax", "scale": None, "feature_epsilon": 1e-3}
keys = {"key_mask": None, "key_bias": None, "key_norm": True}
block = {"intermediate_dim": 8, "num_heads": 2, "supports": 6, "dropout": 0.0, "seed": 1}

CALLS = {
    "favor_attention": (
        ops.favor_attention,
        {**attention, **options, **keys, "initial_state": None, "draw": 0},
    ),
    "packed": (ops.favor_attention, {**attention, "segment_ids": IDS, "max_segments": 2}),
    "near and far": (
        ops.favor_attention,
        {
            **attention,
            "exact_window": 64,
            "far_bias": 0.5,
            "exact_keys": 2,
            "query_norm": True,
            "return_log_weight": True,
        },
    ),
    "merge_outputs": (
        ops.merge_outputs,
        {"outputs": [X, X], "log_weights": [tf.zeros([1, 3, 2]), tf.zeros([1, 3, 2])]},
    ),
    "causal": (
        functools.partial(ops.favor_attention, causal=True, return_state=True),
        {**attention, **keys, "initial_state": STATE, "draw": 0},
    ),
    "summarize": (ops.summarize, {"key": X, "value": X, "projection": W, **keys, "draw": None}),
    "read": (ops.read, {"query": X, "projection": W, "state": STATE, **options, "draw": 0}),
    "merge": (ops.merge, {"first": STATE, "second": STATE}),
    "fingerprint": (ops.fingerprint, {"projection": W}),
    "empty_state": (
        ops.empty_state,
        {"batch": 1, "heads": 2, "features": 6, "value_dim": 4, "dtype": tf.float32, "draw": 0},
    ),
    "dense_attention": (
        dense_attention,
        {**attention, **options, **keys, "mask": None, "dropped_keys": None},
    ),
    "approximation_error": (
        diagnostics.approximation_error,
        {"query": X, "key": X, "projection": W, "scale": None, "feature_map": "softmax"},
    ),
    "orthogonal_projection": (
        performer.orthogonal_projection,
        {"rows": 3, "dim": 2, "scaling": 0, "seed": 1, "dtype": tf.float32, "heads": None},
    ),
    "tolerances": (tolerances, {"dtype": "float32"}),
    "feature_maps.get": (feature_maps.get, {"identifier": "relu"}),
    "generate": (
        generate,
        {
            "model": Cycle(),
            "prompt": [1, 2],
            "max_new_tokens": 2,
            "temperature": 1.0,
            "top_k": 2,
            "top_p": 0.9,
            "seed": 1,
            "end_token": 3,
        },
    ),
    "RedrawProjections": (callbacks.RedrawProjections, {"every": 1, "unit": "epoch"}),
    "Performer": (
        performer.Performer,
        {
            "num_heads": 2,
            "key_dim": 4,
            "value_dim": 4,
            "dropout": 0.0,
            "supports": 6,
            "attention_method": "linear",
            "scaling": 0,
            "feature_map": "softmax",
            "redraw_interval": None,
            "num_key_value_heads": None,
            "rotary_embedding": None,
            "exact_window": 64,
            "far_bias": None,
            "exact_keys": None,
            "max_segments": None,
            "dense_limit": 9,
            "seed": 1,
        },
    ),
    "PerformerEncoder": (performer.PerformerEncoder, block),
    "PerformerDecoder": (performer.PerformerDecoder, block),
    "RotaryEmbedding": (
        performer.RotaryEmbedding,
        {"max_wavelength": 9, "scaling_factor": 1, "sequence_axis": 1, "feature_axis": -1},
    ),
    "PositionEmbedding": (performer.PositionEmbedding, {"sequence_length": 9}),
    "TokenAndPositionEmbedding": (
        performer.TokenAndPositionEmbedding,
        {"vocabulary_size": 9, "sequence_length": 9, "embedding_dim": 4},
    ),
    "StreamingSequential": (performer.StreamingSequential, {"stack": []}),
    "a layer's call": (
        lambda **call: layer()(SEQUENCE, SEQUENCE, **call),
        dict.fromkeys(
            ("key", "query_mask", "value_mask", "key_mask", "attention_mask", "segment_ids")
        ),
    ),
    "a layer's causal call": (
        lambda **call: layer()(SEQUENCE, SEQUENCE, use_causal_mask=True, **call),
        {"prefix_mask": None, "initial_state": None},
    ),
    "a layer's states": (
        lambda batch_size: layer().get_initial_state(batch_size),
        {"batch_size": 1},
    ),
    "a layer's summarize": (
        lambda **call: layer().summarize(**call),
        {"value": SEQUENCE, "key": None, "value_mask": None, "initial_state": None},
    ),
    "a layer's read": (
        lambda **call: layer().read(SEQUENCE, **{"state": layer().get_initial_state(1), **call}),
        {"query_mask": None, "start_index": 0},
    ),
    "rotary positions": (
        lambda **call: performer.RotaryEmbedding()(X, **call),
        {"start_index": 0, "positions": None},
    ),
    "learned positions": (
        lambda **call: positions()[0](SEQUENCE, **call),
        {"start_index": 0, "positions": None},
    ),
    "positions of tokens": (
        lambda **call: positions()[1](IDS, **call),
        {"start_index": 0, "initial_state": None},
    ),
}
NAMES = {"identifier": "feature_map", "initial_state": "state", "dtype": "type"}
HERE = str(Path(performer.__file__).parent)


def innermost(error):
    """Where an exception was raised, without Keras's own wrapping."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename


@pytest.fixture(autouse=True)
def whole_tracebacks():
    """Keras cuts the frames out of tracebacks that say who raised."""
    keras.config.disable_traceback_filtering()
    yield
    keras.config.enable_traceback_filtering()


@pytest.mark.parametrize(
    ("call", "argument"), [(name, arg) for name, (_, given) in CALLS.items() for arg in given]
)
def test_a_bad_value_is_served_or_refused_by_name(call, argument):
    function, given = CALLS[call]
    wrong = []
    for name, value in POOL.items():
        if name in LARGE and (call, argument) in SLOW:
            continue
        try:
            function(**{**given, argument: value})
        except (ValueError, TypeError, RuntimeError) as error:
            named = NAMES.get(argument, argument) in str(error)
            if argument == "initial_state" and call == "a layer's summarize":
                named |= "first and second must agree" in str(error)  # as of `merge`
            if argument == "initial_state" and call == "positions of tokens":
                named |= "`start_index`" in str(error)  # in the place of which it is
            if not innermost(error).startswith(HERE) or not named:
                if name == "object array" and "keras" in traceback.format_exc():
                    continue  # Keras converts arrays before it calls a layer
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
        except Exception as error:
            if not isinstance(error, tf.errors.InvalidArgumentError) or argument not in str(error):
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:150]}")
    assert not wrong, "\n".join(wrong)


SLOW = {
    ("generate", "max_new_tokens"),
    ("empty_state", "batch"),
    ("empty_state", "heads"),
    ("empty_state", "features"),
    ("empty_state", "value_dim"),
    ("orthogonal_projection", "rows"),
    ("orthogonal_projection", "dim"),
    ("orthogonal_projection", "heads"),
    ("a layer's states", "batch_size"),
}
