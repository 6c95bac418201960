"""Linear attention in the place of that of keras-hub's decoders, which is called in its own way.

keras-hub is not imported here: its layers are known by their names. Its decoders tell attention who
sees whom by a mask of T * S numbers, the causal one times that of the keys. Those of a copy are
made to hand on a `CausalMask` instead.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from performer.convert.weights import carry_weights
from performer.layers import Performer


class CausalMask(NamedTuple):
    """In the place of an `attention_mask`: a query sees no later key, and of others these.

    Attributes:
        keys: `[B, S]`, true or 1 where a key exists; None where all do.
    """

    keys: Any


class InDecoder(keras.layers.Layer):
    """Calls a `Performer` as a decoder of keras-hub calls its attention.

    Args:
        attention: the `Performer`, built.
    """

    def __init__(self, attention):
        super().__init__(name="in_decoder", dtype=attention.dtype_policy)
        self.attention = attention
        self.built = True

    def _attend(self, query, value, key, attention_mask, cache, training):
        if cache is not None:
            raise ValueError(
                f"The layer {self.attention.name!r} has linear attention, which keeps no cache of "
                "keys and values. To generate, call the model on all that there is so far. "
                f"Received: `cache` of the shape {tuple(cache.shape)}"
            )
        # keras-hub's attention does not look at masks that Keras has attached to its inputs.
        inputs = [None if x is None else tf.identity(x) for x in (query, value, key)]
        return self.attention(*inputs, training=training, **_masks(attention_mask))


class InTransformer(InDecoder):
    """In the place of a `CachedMultiHeadAttention`."""

    def call(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        training=None,
    ):
        """Attention of `query` to `key` and `value`; a cache, and so its index, is refused."""
        return self._attend(query, value, key, attention_mask, cache, training)


class InLlama(InDecoder):
    """In the place of a `LlamaAttention`."""

    def call(
        self,
        hidden_states,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        training=None,
    ):
        """Attention of the hidden states to each other; a cache, and so its index, is refused."""
        states = hidden_states, hidden_states, None
        return self._attend(*states, attention_mask, cache, training)


def is_of_decoder(layer) -> bool:
    """Whether a layer is attention of keras-hub that `in_decoder` has something for."""
    kind = type(layer)
    return kind.__module__.startswith("keras_hub.") and kind.__name__ in _PLACES


def in_decoder(layer, arguments) -> keras.layers.Layer:
    """What takes the place of attention of keras-hub, with its weights.

    Args:
        layer: one for which `is_of_decoder` is true, built.
        arguments: of `Performer`, over what the layer says.
    """
    place, config_of = _PLACES[type(layer).__name__]
    attention = Performer(**config_with(config_of(layer), arguments))
    if place is InLlama:
        shape = layer.get_build_config()["input_shape"]
        attention.build(shape, shape)
    carry_weights(layer, attention)
    return place(attention)


def config_with(config, arguments):
    """Arguments of `Performer` from a layer's configuration and what is asked for."""
    config = {**config, **arguments}
    if isinstance(config["dtype"], dict):
        config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
    return config


def _llama(layer):
    """The configuration; the layer's own `get_config` fails in keras-hub 0.32."""
    return {
        "num_heads": layer.num_query_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "key_dim": layer._query_dense.kernel.shape[-1],
        "use_bias": False,
        "dropout": layer.dropout,
        "rotary_embedding": layer.rotary_embedding_layer,
        "kernel_initializer": layer.kernel_initializer,
        "name": layer.name,
        "dtype": layer.dtype_policy,
    }


_PLACES: dict[str, tuple[type[InDecoder], Any]] = {
    "CachedMultiHeadAttention": (InTransformer, lambda layer: layer.get_config()),
    "LlamaAttention": (InLlama, _llama),
}


def without_scores(decoder, attention) -> None:
    """Has a decoder give `attention` a `CausalMask` where that says it all, if it is its own."""
    if isinstance(attention, InDecoder) and decoder._self_attention_layer is attention:
        original = decoder._compute_self_attention_mask
        decoder._compute_self_attention_mask = functools.partial(_mask, original)


def _mask(original, **given):
    """In the place of a decoder's `_compute_self_attention_mask`, of which it has the arguments."""
    general = given["decoder_attention_mask"] is not None
    cached = given["self_attention_cache"] is not None
    if general or cached or not given.get("use_causal_mask", True):
        return original(**given)
    keys = given["decoder_padding_mask"]
    if keys is None:
        keys = getattr(given["decoder_sequence"], "_keras_mask", None)
    return CausalMask(keys)


def arguments_of_call(layer, given):
    """Arguments of a call of `Performer` from those of a call of the layer that it replaces.

    Args:
        layer: exact attention, or a `Performer`.
        given: the arguments by name; tensors are eager.
    """
    if not is_of_decoder(layer):
        return given
    query = given.get("hidden_states", given.get("query"))
    inputs = {"query": query, "value": given.get("value", query), "key": given.get("key")}
    # keras-hub's attention does not look at masks that Keras has attached to its inputs.
    inputs = {name: None if x is None else tf.identity(x) for name, x in inputs.items()}
    mask = given.get("attention_mask")
    if mask is not None and len(mask.shape) == 3 and mask.shape[1] != 1:
        found = np.asarray(mask) != 0
        last = found[:, -1:]
        if np.array_equal(found, last & np.tri(*found.shape[1:]).astype(bool)):
            mask = CausalMask(last[:, 0])
    return {**inputs, **_masks(mask)}


def _masks(mask) -> dict[str, Any]:
    """Arguments of a call of `Performer` that say what an `attention_mask` of keras-hub says."""
    if isinstance(mask, CausalMask):
        keys = None if mask.keys is None else tf.cast(mask.keys, tf.bool)
        return {"use_causal_mask": True, "key_mask": keys}
    return {"attention_mask": None if mask is None else tf.cast(mask, tf.bool)}
