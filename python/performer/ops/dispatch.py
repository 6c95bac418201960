"""Runs an operator: compiled where the library is loaded, as plain TensorFlow otherwise."""

from __future__ import annotations

import contextlib
import threading

import tensorflow as tf

from performer import composition, loader
from performer.ops import gradients as gradients  # registers the gradients of the operators,
from performer.ops import vectorize as vectorize  # and how loops over them are vectorized
from performer.ops.sizes import wait_for_sizes

# Operators that have no kernel for GPUs.
_CPU_ONLY = ("near_far", "append_rows")

_thread = threading.local()


@contextlib.contextmanager
def composed():
    """A context in which this thread, and no other, takes the composition for every operator.

    What is traced inside holds plain TensorFlow operations only.

    Example:

    >>> import tensorflow as tf
    >>> from performer.ops import dispatch
    >>> with dispatch.composed():
    ...     dispatch.has_kernel("causal", "", 0), dispatch.is_composed()
    (True, True)
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
    composition. So does an operator without a kernel for the device, see `has_kernel`.

    Args:
        operator: "summarize", "read", "causal" or "near_far".
        offsets: int64 [N + 1] of packed sequences, or None.
        **inputs: the operator's other inputs and attributes; of "near_far" also `start`.

    Returns:
        The operator's outputs.
    """
    compiled = None
    if not callable(inputs.get("feature_map")):
        compiled = _compiled(operator, next(iter(inputs.values())).device)
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
    compiled = _compiled("append_rows", rows.device)
    return tf.concat([rows, more], 1) if compiled is None else compiled(rows=rows, more=more)


def _compiled(operator: str, device: str):
    """The function of a compiled operator, if there is one that runs on `device`; else None."""
    if is_composed():
        return None
    library, name = loader.ops(), f"performer_{operator}"
    gpus = len(tf.config.list_logical_devices("GPU")) if operator in _CPU_ONLY else 0
    known = hasattr(library, name) and has_kernel(operator, device, gpus)
    return getattr(library, name) if known else None


def has_kernel(operator: str, device: str, gpus: int) -> bool:
    """Whether the compiled operator runs where its inputs are, without a way through the CPU.

    Args:
        operator: as `run`.
        device: of an input: the name of a device, or "" in a graph that is placed later.
        gpus: number of GPUs that TensorFlow sees.

    Example:

    >>> from performer.ops.dispatch import has_kernel
    >>> has_kernel("near_far", "/device:CPU:0", 1), has_kernel("near_far", "/device:GPU:0", 1)
    (True, False)
    >>> has_kernel("near_far", "", 0), has_kernel("near_far", "", 1), has_kernel("causal", "", 1)
    (True, False, True)
    """
    if operator not in _CPU_ONLY or not gpus:
        return True
    return "CPU" in device.upper()
