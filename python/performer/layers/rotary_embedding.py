"""Rotary position embedding of queries and keys."""

import math
import numbers
import sys

import keras
import tensorflow as tf

from performer.composition.packed_blocks import run_starts
from performer.layers._positions import integer_scalar, positions_of


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
        sequence_axis: Axis of the positions, not the batch's. Defaults to 1.
        feature_axis: Axis of the dimensions that are rotated. Defaults to -1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, L, D)` or `(B, L, H, D)`, D even; or other axes, with `sequence_axis` and
            `feature_axis`.
        start_index: Integer, position of the first element of `inputs`. Defaults to 0.
        positions: Integers `(L,)` or `(B, L)`, the positions of all elements, in place of
            `start_index`.

    Returns:
        Tensor of the shape of `inputs`. Its dtype is that of `inputs` where the layer's is float32
            (the default), and the layer's otherwise.

    Raises:
        ValueError: an argument outside its range; D odd; axes that `inputs` does not have.

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

    def __init__(
        self,
        max_wavelength=10000,
        scaling_factor=1.0,
        sequence_axis=1,
        feature_axis=-1,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        for name, value in (("max_wavelength", max_wavelength), ("scaling_factor", scaling_factor)):
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not 0 < value <= sys.float_info.max:
                raise ValueError(
                    f"`{name}` must be a number above 0, and finite. Received: {name}={value!r}"
                )
        for name, value in (("sequence_axis", sequence_axis), ("feature_axis", feature_axis)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}")
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.sequence_axis = int(sequence_axis)
        self.feature_axis = int(feature_axis)
        self.built = True

    def call(self, inputs, start_index=0, positions=None):
        """Rotates `inputs`; see the class."""
        rank = len(inputs.shape)
        axes = [axis + rank * (axis < 0) for axis in (self.sequence_axis, self.feature_axis)]
        if len(set(axes)) < 2 or not all(0 < axis < rank for axis in axes):
            raise ValueError(
                "`sequence_axis` and `feature_axis` must be two axes of the inputs behind the "
                f"batch. Received: sequence_axis={self.sequence_axis}, "
                f"feature_axis={self.feature_axis}, inputs.shape={tuple(inputs.shape)}"
            )
        sequence, feature = axes
        size = inputs.shape[feature]
        if size is None or size % 2:
            raise ValueError(
                "Rotary positions rotate pairs of dimensions, and need an even number of them. "
                f"Received: inputs.shape={tuple(inputs.shape)}"
            )
        if positions is None:
            positions = tf.range(tf.shape(inputs, tf.int64)[sequence]) + integer_scalar(
                "start_index", start_index
            )
        else:
            positions = positions_of(inputs, positions, sequence)
        exponents = tf.range(0, size, 2, dtype=tf.float64) / size
        turns_per_step = tf.pow(tf.constant(self.max_wavelength, tf.float64), -exponents) / (
            2 * math.pi * self.scaling_factor
        )
        turns = tf.cast(positions, tf.float64)[..., tf.newaxis] * turns_per_step
        result = self.compute_dtype
        result = inputs.dtype if result in (None, "float32") else tf.as_dtype(result)
        dtype = tf.float64 if tf.float64 in (inputs.dtype, result) else tf.float32
        angles = 2 * math.pi * tf.cast(turns - tf.floor(turns), dtype)
        cos, sin = (_expand(x, rank, sequence, feature) for x in (tf.cos(angles), tf.sin(angles)))
        first, second = tf.split(tf.cast(inputs, dtype), 2, axis=feature)
        rotated = tf.concat([first * cos - second * sin, second * cos + first * sin], feature)
        return tf.cast(rotated, result)

    def compute_output_shape(self, input_shape, **kwargs):
        """The shape of the inputs."""
        return input_shape

    def compute_output_spec(self, inputs, *args, **kwargs):
        """What a symbolic call returns."""
        # `Layer` would give it the compute dtype.
        return keras.Operation.compute_output_spec(self, inputs, *args, **kwargs)

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
            "sequence_axis": self.sequence_axis,
            "feature_axis": self.feature_axis,
        }


def _expand(x, rank, sequence, feature):
    """`(L, D/2)` or `(B, L, D/2)` with the axes of an input of this rank, of which others are 1."""
    if feature < sequence:
        x = tf.linalg.matrix_transpose(x)
    index = [
        slice(None) if axis in (sequence, feature) or (axis == 0 and len(x.shape) == 3) else None
        for axis in range(rank)
    ]
    return x[tuple(tf.newaxis if i is None else i for i in index)]


def positions_in_runs(ids):
    """int64 `[B, L]`: the position of each element in its run of equal `ids` `[B, L]`, from 0."""
    index = tf.range(tf.shape(ids)[1])
    run = tf.cumsum(tf.cast(tf.reshape(run_starts(ids), [-1]), tf.int32)) - 1
    flat = tf.reshape(tf.broadcast_to(index, tf.shape(ids)), [-1])
    first = tf.math.unsorted_segment_min(flat, run, tf.size(ids))
    return tf.cast(tf.reshape(flat - tf.gather(first, run), tf.shape(ids)), tf.int64)
