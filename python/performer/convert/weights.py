"""Weights carried from one attention layer to another."""

from __future__ import annotations

import keras

_SUBLAYERS = ("query", "key", "value", "gate", "attention_output")
EXACT = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def copy_weights(source, target) -> None:
    """Copies the dense kernels and biases of one attention layer to another.

    Between `Performer`, `MultiHeadAttention` and `GroupQueryAttention`, in any direction. They name
    and shape these weights alike. What else a layer has (the projection of a `Performer`, the state
    of a dropout) stays as it is.

    Args:
        source: Built attention layer.
        target: Attention layer with weights of the same shapes; built like `source` where it is
            not built yet.

    Raises:
        TypeError: Not one of these layers.
        ValueError: `source` is not built; a weight is missing on one side or has another shape
            there; a sublayer was quantized.

    Example:

    >>> import keras
    >>> from performer import Performer, convert
    >>> exact = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
    >>> exact.build((None, 10, 8), (None, 10, 8))
    >>> linear = Performer(num_heads=2, key_dim=4, supports=64)
    >>> convert.copy_weights(exact, linear)
    >>> bool((linear.query_dense.kernel.numpy() == exact.query_dense.kernel.numpy()).all())
    True
    """
    for name, layer in (("source", source), ("target", target)):
        if not isinstance(layer, EXACT):
            raise TypeError(
                f"`{name}` must be a Performer, MultiHeadAttention or GroupQueryAttention layer. "
                f"Received: {name}={layer!r}"
            )
    carry_weights(source, target)


def carry_weights(source, target) -> None:
    """`copy_weights` for layers of any type that have such weights."""
    if not source.built:
        raise ValueError(f"`source` must be built. Received: source={source!r}")
    if not target.built:
        target.build(**_build_shapes(source))
    given, wanted = _weights("source", source), _weights("target", target)
    for name in {**given, **wanted}:
        shapes = [
            None if w is None else tuple(w.shape) for w in (given.get(name), wanted.get(name))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`source` and `target` must have the same weights. Of `{name}`, `source` "
                f"({source.name}) has the shape {shapes[0]}, `target` ({target.name}) {shapes[1]}"
            )
    for name, weight in wanted.items():
        weight.assign(given[name])


def _weights(argument, layer):
    """The dense weights of an attention layer, by names like "query/kernel"."""
    weights = {}
    for sublayer in _SUBLAYERS:
        attribute = {"attention_output": "output"}.get(sublayer, sublayer)
        dense = getattr(layer, f"_{attribute}_dense", None)
        if dense is None:
            continue
        if getattr(dense, "quantization_mode", None):
            raise ValueError(
                f"The weights of a quantized layer cannot be copied. Received: {argument} with "
                f"{sublayer!r} in {dense.quantization_mode!r}"
            )
        # With LoRA this is the merged kernel, and assigning it is refused by Keras.
        weights[f"{sublayer}/kernel"] = dense.kernel
        if dense.bias is not None:
            weights[f"{sublayer}/bias"] = dense.bias
    return weights


def _build_shapes(layer):
    """Keyword arguments of a layer's `build`, from those that it was built with."""
    config = layer.get_build_config()
    return config.get("shapes_dict") or config
