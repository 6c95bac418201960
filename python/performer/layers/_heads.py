"""Grouped-query attention: dense sublayers with fewer heads of key and value than of query."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class RepeatedHeads(keras.layers.EinsumDense):
    """An `EinsumDense` to `[B, ..., G, D]` that repeats every head: `[B, ..., G * repeats, D]`.

    With it, the parent's exact attention serves grouped heads as they are.
    """

    def __init__(self, *args, repeats, **kwargs):
        super().__init__(*args, **kwargs)
        self._repeats = repeats

    def call(self, inputs, training=None):
        """Projects, then repeats."""
        return tf.repeat(super().call(inputs, training=training), self._repeats, axis=-2)


class GroupedHeads:
    """What `MultiHeadAttention` lacks for grouped heads: a `build` that tells them apart."""

    # Of `MultiHeadAttention`.
    _num_heads: int
    _key_dim: int
    _value_dim: int
    _use_bias: bool
    _build_attention: Callable[[int], None]
    _make_output_dense: Callable[..., Any]
    _get_common_kwargs_for_sublayer: Callable[[], dict]

    def _build_grouped(self, query_shape, value_shape, key_shape, key_heads, repeats):
        """Builds the sublayers that `MultiHeadAttention.build` does, under the same names.

        Args:
            query_shape, value_shape, key_shape: of the layer's inputs.
            key_heads: G, heads of key and value.
            repeats: how often each of them appears in the output of its sublayer.
        """
        self._query_dense = self._dense("query", query_shape, self._num_heads, self._key_dim)
        self._key_dense = self._dense("key", key_shape, key_heads, self._key_dim, repeats)
        if getattr(self, "_use_gate", False):
            self._gate_dense = self._dense(
                "gate", query_shape, self._num_heads, self._value_dim, activation="sigmoid"
            )
        self._value_dense = self._dense("value", value_shape, key_heads, self._value_dim, repeats)
        self._build_attention(len(value_shape) + 1)
        self._output_dense = self._make_output_dense(
            query_shape, self._get_common_kwargs_for_sublayer(), "attention_output"
        )
        self._output_dense.build((*query_shape[:-1], self._num_heads, self._value_dim))

    def _dense(self, name, shape, heads, dim, repeats=1, activation=None):
        """A built sublayer from `[B, ..., channels]` (its `shape`) to `[B, ..., heads, dim]`."""
        axes = "abcdefghijklmnopqrstuvw"[: len(shape) - 1]
        kind = keras.layers.EinsumDense if repeats == 1 else RepeatedHeads
        dense = kind(
            f"{axes}x,xyz->{axes}yz",
            output_shape=[None] * (len(shape) - 2) + [heads, dim],
            bias_axes="yz" if self._use_bias else None,
            activation=activation,
            name=name,
            **self._get_common_kwargs_for_sublayer(),
            **({} if repeats == 1 else {"repeats": repeats}),
        )
        dense.build(shape)
        return dense
