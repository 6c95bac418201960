"""Rotary position embedding of queries and keys."""

import math

import keras
import tensorflow as tf

from performer.composition.packed_blocks import run_starts


@keras.saving.register_keras_serializable(package="performer")
class RotaryEmbedding(keras.layers.Layer):
    """Rotates queries and keys by angles that grow with their position.

    Dimensions i and i + D/2 at position p are rotated by the angle p * max_wavelength**(-2i/D), so
    that the product of a query and a key depends on the distance between them. Source: Su et al.,
    "RoFormer", https://arxiv.org/abs/2104.09864. The pairing of dimensions and the arguments are
    those of `keras_hub.layers.RotaryEmbedding`, which a `Performer` layer takes as well.

    Args:
        max_wavelength: Factor of the longest wavelength, above 0. Defaults to 10000.
        scaling_factor: Positions are divided by it. Defaults to 1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, L, D)` or `(B, L, H, D)`, D even.
        start_index: Integer, position of the first element of `inputs`. Defaults to 0.
        positions: Integers `(L,)` or `(B, L)`, the positions of all elements, in place of
            `start_index`.

    Returns:
        Tensor of the shape and dtype of `inputs`.

    Raises:
        ValueError: an argument outside its range; D odd.

    Numerics:
        Angles are reduced to one turn in float64, so that positions of millions keep their
        precision; sines and products are float32 (float64 for float64).

    Example:

    >>> import tensorflow as tf
    >>> from performer import Performer, RotaryEmbedding
    >>> layer = Performer(4, 8, supports=32, rotary_embedding=RotaryEmbedding())
    >>> x = tf.random.normal([2, 10, 16])
    >>> layer(x, x, use_causal_mask=True).shape
    TensorShape([2, 10, 16])
    """

    def __init__(self, max_wavelength=10000, scaling_factor=1.0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        for name, value in (("max_wavelength", max_wavelength), ("scaling_factor", scaling_factor)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"`{name}` must be a number above 0. Received: {name}={value!r}")
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.built = True

    def call(self, inputs, start_index=0, positions=None):
        """Rotates `inputs`; see the class."""
        size = inputs.shape[-1]
        if size % 2:
            raise ValueError(
                "Rotary positions rotate pairs of dimensions, and need an even number of them. "
                f"Received: inputs.shape={tuple(inputs.shape)}"
            )
        if positions is None:
            positions = tf.range(tf.shape(inputs)[1], dtype=tf.int64) + tf.cast(
                start_index, tf.int64
            )
        exponents = tf.range(0, size, 2, dtype=tf.float64) / size
        turns_per_step = tf.pow(tf.constant(self.max_wavelength, tf.float64), -exponents) / (
            2 * math.pi * self.scaling_factor
        )
        turns = tf.cast(positions, tf.float64)[..., tf.newaxis] * turns_per_step
        dtype = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        angles = 2 * math.pi * tf.cast(turns - tf.floor(turns), dtype)
        if len(inputs.shape) == 4:
            angles = angles[..., tf.newaxis, :]
        cos, sin = tf.cos(angles), tf.sin(angles)
        first, second = tf.split(tf.cast(inputs, dtype), 2, axis=-1)
        rotated = tf.concat([first * cos - second * sin, second * cos + first * sin], -1)
        return tf.cast(rotated, inputs.dtype)

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
        }


def positions_in_runs(ids):
    """int64 `[B, L]`: the position of each element in its run of equal `ids` `[B, L]`, from 0."""
    index = tf.range(tf.shape(ids)[1])
    run = tf.cumsum(tf.cast(tf.reshape(run_starts(ids), [-1]), tf.int32)) - 1
    flat = tf.reshape(tf.broadcast_to(index, tf.shape(ids)), [-1])
    first = tf.math.unsorted_segment_min(flat, run, tf.size(ids))
    return tf.cast(tf.reshape(flat - tf.gather(first, run), tf.shape(ids)), tf.int64)
