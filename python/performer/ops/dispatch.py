"""Runs an operator: compiled where the library is loaded, as plain TensorFlow otherwise."""

from __future__ import annotations

import contextlib
import threading

import tensorflow as tf

from performer import composition, loader
from performer.ops import gpus
from performer.ops import gradients as gradients  # registers the gradients of the operators,
from performer.ops import vectorize as vectorize  # and how loops over them are vectorized
from performer.ops.sizes import wait_for_sizes

_thread = threading.local()


@contextlib.contextmanager
def composed():
    """A context in which this thread, and no other, takes the composition for every operator.

    What is traced inside holds plain TensorFlow operations only.

    Example:

    >>> import tensorflow as tf
    >>> from performer.ops import dispatch
    >>> with dispatch.composed():
    ...     dispatch.is_composed()
    True
    """
    before = is_composed()
    _thread.composed = True
    try:
        yield
    finally:
        _thread.composed = before


def is_composed() -> bool:
    """Whether this thread is inside `composed`."""
    return getattr(_thread, "composed", False)


def run(operator: str, offsets, **inputs):
    """Calls an operator.

    The compiled one knows three feature maps by name; a function as `feature_map` takes the
    composition. So does a call without a kernel for the device, see `gpus.takes`.

    Args:
        operator: "summarize", "read", "causal" or "near_far".
        offsets: int64 [N + 1] of packed sequences, or None.
        **inputs: the operator's other inputs and attributes; of "near_far" also `start`.

    Returns:
        The operator's outputs.
    """
    compiled = None
    if not callable(inputs.get("feature_map")):
        compiled = _compiled(operator, inputs)
    packed = offsets is not None
    with tf.device("/CPU:0"):  # every device reads them there
        if not packed:
            offsets = tf.constant([0], tf.int64)
        if compiled is not None and "start" in inputs:
            inputs["start"] = tf.cast(inputs["start"], tf.int64)
    if compiled is None:
        inputs = wait_for_sizes(operator, inputs, packed)
    function = compiled or getattr(composition, operator)
    return function(offsets=offsets, packed=packed, **inputs)


def append_rows(rows, more):
    """`more` [B, L, ...] after `rows` [B, R, ...]: [B, R + L, ...], both of one type.

    What a stream does in every step. On the CPU, for B = 1, most calls copy none of the rows.

    Example:

    >>> import tensorflow as tf
    >>> from performer.ops.dispatch import append_rows
    >>> append_rows(tf.zeros([1, 5, 3]), tf.zeros([1, 2, 3])).shape
    TensorShape([1, 7, 3])
    """
    compiled = _compiled("append_rows", {"value": rows})
    return tf.concat([rows, more], 1) if compiled is None else compiled(rows=rows, more=more)


def _compiled(operator: str, inputs: dict):
    """The function of a compiled operator, if there is one that runs where the inputs are."""
    if is_composed():
        return None
    function = getattr(loader.ops(), f"performer_{operator}", None)
    return function if function is None or gpus.takes_inputs(operator, inputs) else None
