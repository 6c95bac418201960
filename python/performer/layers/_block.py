"""What the encoder and the decoder block have in common: their arguments and the feed-forward."""

import zlib

import keras
import tensorflow as tf

from performer.layers._arguments import clone_initializer
from performer.layers.performer import Performer

_OF_THE_BLOCK = (
    "num_heads", "key_dim", "dropout", "attention_method", "supports", "rotary_embedding", "seed",
    "name", "dtype",
)  # fmt: skip


class Block(keras.layers.Layer):
    """Base of `PerformerEncoder` and `PerformerDecoder`, which describe the arguments."""

    def __init__(
        self,
        intermediate_dim,
        num_heads,
        dropout=0,
        activation="relu",
        layer_norm_epsilon=1e-5,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        normalize_first=False,
        *,
        kernel_regularizer=None,
        bias_regularizer=None,
        attention_method="linear",
        supports=256,
        rotary_embedding=None,
        attention_options=None,
        seed=None,
        **kwargs,
    ):
        # Without autocast, which would round states; the sublayers cast what they compute with.
        super().__init__(autocast=False, **kwargs)
        deserialize = keras.saving.deserialize_keras_object
        self.intermediate_dim = intermediate_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.normalize_first = normalize_first
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.attention_method = attention_method
        self.supports = supports
        if isinstance(rotary_embedding, dict):
            rotary_embedding = deserialize(rotary_embedding)
        self.rotary_embedding = rotary_embedding
        taken = sorted(set(attention_options or {}) & set(_OF_THE_BLOCK))
        if taken:
            raise ValueError(
                "`attention_options` must not hold what the block decides or takes as an argument "
                f"of its own ({', '.join(_OF_THE_BLOCK)}). Received: {', '.join(taken)}"
            )
        self.attention_options = {
            name: deserialize(value) if isinstance(value, dict) else value
            for name, value in (attention_options or {}).items()
        }
        self.seed = seed
        self.supports_masking = True
        # Made now, an attention layer refuses wrong options now, and knows whether XLA can take it.
        self.supports_jit = self._attention(1, "attention").supports_jit

    def _attention(self, key_dim, name, **options):
        """An attention layer as the arguments say."""
        return Performer(
            **{
                "num_heads": self.num_heads,
                "key_dim": key_dim,
                "dropout": self.dropout,
                "attention_method": self.attention_method,
                "supports": self.supports if self.attention_method == "linear" else None,
                "seed": self.seed,
                "dtype": self.dtype_policy,
                "name": name,
                **self._kernels(),
                **self.attention_options,
                **options,
            }
        )

    def _make_attention(self, name, query_shape, value_shape, layer_name=None, **options):
        """Returns an attention layer, its norm and its dropout, built."""
        hidden = query_shape[-1]
        if hidden < self.num_heads:
            raise ValueError(
                "The inputs must have at least `num_heads` channels. "
                f"Received: num_heads={self.num_heads} and inputs of shape {tuple(query_shape)}"
            )
        layer = self._attention(hidden // self.num_heads, layer_name or name, **options)
        layer.build(query_shape, value_shape)
        return layer, self._norm(f"{name}_layer_norm", query_shape), self._drop(f"{name}_dropout")

    def _build_feedforward(self, shape):
        """Creates the layers of the feed-forward but for its norm."""
        inner = (*shape[:-1], self.intermediate_dim)
        self._feedforward_intermediate_dense = self._dense(
            self.intermediate_dim, "intermediate", shape, activation=self.activation
        )
        self._feedforward_output_dense = self._dense(shape[-1], "output", inner)
        self._feedforward_dropout = self._drop("feedforward_dropout")

    def _dense(self, units, name, shape, activation=None):
        layer = keras.layers.Dense(
            units,
            activation=activation,
            dtype=self.dtype_policy,
            name=f"feedforward_{name}_dense",
            **self._kernels(),
        )
        layer.build(shape)
        return layer

    def _norm(self, name, shape):
        layer = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )
        layer.build(shape)
        return layer

    def _drop(self, name):
        # With one seed for all, the sublayers would drop the same entries.
        seed = None if self.seed is None else (self.seed + zlib.crc32(name.encode())) % 2**31
        return keras.layers.Dropout(self.dropout, seed=seed, dtype=self.dtype_policy, name=name)

    def _kernels(self):
        """The arguments that say how a sublayer's weights begin and what holds them back."""
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
        }

    def _residual(self, x, branch, norm, dropout, training):
        """`x` plus what `branch` makes of it, normalized before the branch or after the sum.

        Args:
            x: `(B, L, dim)`.
            branch: function of `(B, L, dim)` to a pair, the first of it `(B, L, dim)`.

        Returns:
            The sum, and the second of the pair.
        """
        y, more = branch(norm(x) if self.normalize_first else x)
        x = x + dropout(y, training=training)
        return x if self.normalize_first else norm(x), more

    def _feedforward(self, x, training):
        """The second half of a block."""

        def branch(y):
            return self._feedforward_output_dense(self._feedforward_intermediate_dense(y)), None

        norm, dropout = self._feedforward_layer_norm, self._feedforward_dropout
        return self._residual(x, branch, norm, dropout, training)[0]

    def _cast(self, x):
        """An input in the compute dtype, without an attached mask."""
        return tf.identity(tf.cast(x, self.compute_dtype))

    def compute_output_shape(self, inputs_shape, *args, **kwargs):
        """The shape of the sequence."""
        return inputs_shape

    def compute_output_spec(self, *args, **kwargs):
        """What a symbolic call returns, scores and states included."""
        # `Layer` would take `compute_output_shape` for all of it.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def get_config(self):
        """Every argument of the constructor."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "activation": keras.activations.serialize(self.activation),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "normalize_first": self.normalize_first,
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "attention_method": self.attention_method,
            "supports": self.supports,
            "rotary_embedding": self.rotary_embedding and serialize(self.rotary_embedding),
            "attention_options": serialize(dict(self.attention_options)),
            "seed": self.seed,
        }
