"""The base of encoder and decoder block: their arguments, residual sums and feed-forward."""

import zlib
from typing import Any

import keras
import tensorflow as tf

from performer.layers._arguments import clone_initializer
from performer.layers.performer import Performer

# Arguments of the attention layers that the block sets.
_SET_BY_BLOCK = (
    "num_heads", "key_dim", "dropout", "attention_method", "supports", "rotary_embedding", "seed",
    "name", "dtype", "exact_window", "far_bias",
)  # fmt: skip


class Block(keras.layers.Layer):
    """Base of `PerformerEncoder` and `PerformerDecoder`, which describe the arguments.

    A block is a sequence of residual parts ("self_attention", "cross_attention", "feedforward").
    The sublayers of a part are attributes: `_<part>_layer_norm`, `_<part>_dropout`, and
    `_<part>_layer` if it is attention. They, and the names of weights, are those of keras-hub.
    """

    _self_attention_layer: Any
    _cross_attention_layer: Any
    _feedforward_layer_norm: Any

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
        exact_window=None,
        far_bias=None,
        attention_options=None,
        seed=None,
        **kwargs,
    ):
        # Autocast would round states; the sublayers cast what they compute with.
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
        self.exact_window = exact_window
        self.far_bias = far_bias
        conflicts = sorted(set(attention_options or {}) & set(_SET_BY_BLOCK))
        if conflicts:
            raise ValueError(
                "`attention_options` must not hold what the block decides or takes as an argument "
                f"of its own ({', '.join(_SET_BY_BLOCK)}). Received: {', '.join(conflicts)}"
            )
        self.attention_options = {
            name: deserialize(value) if isinstance(value, dict) else value
            for name, value in (attention_options or {}).items()
        }
        self.seed = seed
        self.supports_masking = True
        # An attention layer made here refuses wrong options here, and says whether XLA can compile
        # it.
        self.supports_jit = self._attention(1, "attention", **self._window()).supports_jit

    def _window(self):
        """The arguments of self-attention that say what is near; other attention has no such."""
        return {"exact_window": self.exact_window, "far_bias": self.far_bias}

    def _attention(self, key_dim, name, **options):
        """An attention layer of the block's arguments and `options`."""
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
                **self._kernel_options(),
                **self.attention_options,
                **options,
            }
        )

    def _make_attention(self, name, query_shape, value_shape, layer_name=None, **options):
        """Creates the sublayers of the part `name`, which is attention."""
        hidden = query_shape[-1]
        if hidden < self.num_heads:
            raise ValueError(
                "The inputs must have at least `num_heads` channels. "
                f"Received: num_heads={self.num_heads} and inputs of shape {tuple(query_shape)}"
            )
        layer = self._attention(hidden // self.num_heads, layer_name or name, **options)
        layer.build(query_shape, value_shape)
        setattr(self, f"_{name}_layer", layer)
        setattr(self, f"_{name}_layer_norm", self._norm(f"{name}_layer_norm", query_shape))
        setattr(self, f"_{name}_dropout", self._drop(f"{name}_dropout"))

    def _build_feedforward(self, shape):
        """Creates the sublayers of the feed-forward, all but its norm.

        The subclass creates the norm, because its place in `weights` differs between the blocks.
        """
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
            **self._kernel_options(),
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
        # If all had the same seed, the sublayers would drop the same entries.
        seed = None if self.seed is None else (self.seed + zlib.crc32(name.encode())) % 2**31
        return keras.layers.Dropout(self.dropout, seed=seed, dtype=self.dtype_policy, name=name)

    def _kernel_options(self):
        """Initializers and regularizers for a sublayer."""
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
        }

    def _residual(self, part, branch, x, training):
        """`x` plus `branch(x)`, with the norm of the part before the branch or after the sum.

        Args:
            part: name of the part, which names its norm and its dropout.
            branch: function of `(B, L, dim)` to a pair, of which the first is `(B, L, dim)`.
            x: `(B, L, dim)`.

        Returns:
            The sum, and the second of the pair.
        """
        norm, dropout = getattr(self, f"_{part}_layer_norm"), getattr(self, f"_{part}_dropout")
        y, second = branch(norm(x) if self.normalize_first else x)
        x = x + dropout(y, training=training)
        return x if self.normalize_first else norm(x), second

    def _feedforward(self, x, training):
        """The last part of a block."""

        def branch(y):
            return self._feedforward_output_dense(self._feedforward_intermediate_dense(y)), None

        return self._residual("feedforward", branch, x, training)[0]

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
            **self._window(),
            "attention_options": serialize(dict(self.attention_options)),
            "seed": self.seed,
        }
