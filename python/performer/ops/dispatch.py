"""Runs an operator: compiled where the library is loaded, as plain TensorFlow otherwise."""

from __future__ import annotations

import tensorflow as tf

from performer import composition, loader
from performer.ops import gradients as gradients  # registers the gradients of the operators,
from performer.ops import vectorize as vectorize  # and how loops over them are vectorized
from performer.ops.sizes import LAYOUTS, sizes_when_run


def run(operator: str, offsets, **inputs):
    """Calls an operator.

    The compiled one knows three feature maps by name; a function as `feature_map` takes the
    composition.

    Args:
        operator: "summarize", "read" or "causal".
        offsets: int64 [N + 1] of packed sequences, or None.
        **inputs: the operator's other inputs and attributes.

    Returns:
        The operator's outputs.
    """
    compiled = None if callable(inputs["feature_map"]) else loader.ops()
    function = (
        getattr(compiled, f"performer_{operator}") if compiled else getattr(composition, operator)
    )
    packed = offsets is not None
    if not packed:
        with tf.device("/CPU:0"):  # every device reads it there
            offsets = tf.constant([0], tf.int64)
    found = [] if compiled else sizes_when_run(operator, inputs, packed)
    with tf.control_dependencies(found):
        inputs = {k: tf.identity(x) if k in LAYOUTS[operator] else x for k, x in inputs.items()}
    return function(offsets=offsets, packed=packed, **inputs)
