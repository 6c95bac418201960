"""The demo's model: a small causal byte-level language model."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

import performer

VOCABULARY = 256
ATTENTIONS = ("linear", "exact", "none")
WIDTH, BLOCKS, HEADS, KEY_DIM, SUPPORTS = 128, 2, 4, 32, 64


@keras.saving.register_keras_serializable(package="performer.demo")
class BytesIn(keras.layers.Layer):
    """Embeds bytes `[B, L]` to `[B, L, width]`: the byte, the one before it, and the position.

    The position is a sum of sinusoids, which knows any length.
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, input_shape):
        """Creates the tables of the byte and of the one before it."""
        for name in ("byte", "before"):
            table = self.add_weight(
                name=name,
                shape=(VOCABULARY, self.width),
                initializer=keras.initializers.RandomNormal(stddev=0.5),
            )
            setattr(self, name, table)

    def call(self, inputs, before=None, start=0):
        """`before` is the byte `[B, 1]` in front of `inputs` (0 at the start), `start` its index."""
        inputs = tf.cast(inputs, tf.int32)
        front = tf.zeros_like(inputs[:, :1]) if before is None else tf.cast(before, tf.int32)
        shifted = tf.concat([front, inputs[:, :-1]], 1)
        positions = sinusoids(tf.range(tf.shape(inputs)[1]) + start, self.width)
        return tf.gather(self.byte, inputs) + tf.gather(self.before, shifted) + 0.5 * positions

    def get_config(self):
        """The width."""
        return {**super().get_config(), "width": self.width}


def sinusoids(positions, width):
    """Sines and cosines of `positions` [L], periods from 2 pi to 20000 pi: float32 [L, width]."""
    rates = 10000.0 ** -(np.arange(width // 2, dtype="float32") * 2 / width)
    angles = tf.cast(positions, tf.float32)[:, None] * rates
    return tf.concat([tf.sin(angles), tf.cos(angles)], -1)


def attention_layer(attention, name, seed=None):
    """The attention of a block: `Performer`, or Keras's own exact one."""
    if attention == "exact":
        return keras.layers.MultiHeadAttention(HEADS, KEY_DIM, name=name, seed=seed)
    return performer.Performer(HEADS, KEY_DIM, supports=SUPPORTS, name=name, seed=seed)


def build(attention: str, width: int = WIDTH, seed: int = 1) -> keras.Model:
    """Builds the model: bytes `[B, L]` to logits float32 `[B, L, 256]` of the next byte.

    Two blocks of attention and a dense layer, each normalised before and added to its input.

    Args:
        attention: "linear", "exact" or "none"; all else is the same.
        width: channels.
        seed: of the weights and projections.

    Raises:
        ValueError: `attention` is none of these.

    Example:

    >>> from performer.demo import model
    >>> model.build("linear", width=32).output_shape
    (None, None, 256)
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    keras.utils.set_random_seed(seed)
    inputs = keras.Input([None], dtype="int32", name="bytes")
    x = BytesIn(width, name="embed")(inputs)
    for block in range(BLOCKS):
        if attention != "none":
            normal = keras.layers.LayerNormalization(name=f"attention_norm_{block}")(x)
            layer = attention_layer(attention, f"attention_{block}", seed + block)
            x = keras.layers.Add(name=f"attention_add_{block}")(
                [x, layer(normal, normal, use_causal_mask=True)]
            )
        normal = keras.layers.LayerNormalization(name=f"dense_norm_{block}")(x)
        hidden = keras.layers.Dense(4 * width, activation="gelu", name=f"dense_in_{block}")(normal)
        x = keras.layers.Add(name=f"dense_add_{block}")(
            [x, keras.layers.Dense(width, name=f"dense_out_{block}")(hidden)]
        )
    x = keras.layers.LayerNormalization(name="norm")(x)
    logits = keras.layers.Dense(VOCABULARY, dtype="float32", name="logits")(x)
    return keras.Model(inputs, logits, name=f"byte_model_{attention}")
