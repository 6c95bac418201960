"""Runs an operator: compiled where the library is loaded, as plain TensorFlow otherwise."""

from __future__ import annotations

import tensorflow as tf

from performer import composite, library
from performer import gradients as gradients  # registers the gradients of the operators


def run(operator: str, offsets, **inputs):
    """Calls an operator.

    Args:
        operator: "summarize", "read" or "causal".
        offsets: int64 [N + 1] of packed sequences, or None.
        **inputs: the operator's other inputs and attributes.

    Returns:
        The operator's outputs.
    """
    compiled = library.ops()
    function = (
        getattr(compiled, f"performer_{operator}") if compiled else getattr(composite, operator)
    )
    packed = offsets is not None
    if not packed:
        with tf.device("/CPU:0"):  # every device reads it there
            offsets = tf.constant([0], tf.int64)
    return function(offsets=offsets, packed=packed, **inputs)
