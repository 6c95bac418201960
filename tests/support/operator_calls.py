"""Calls of the raw TensorFlow operators, eager and traced, and of their plain composition."""

from __future__ import annotations

import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels, op_def_registry

from performer import composition, loader
from performer.ops.gradients import function_name  # the import registers the gradients, too
from support.inputs import FORWARD as FORWARD
from support.inputs import known_attributes

needs_xla = pytest.mark.skipif(
    loader.xla_status().state != "loaded",
    reason=loader.xla_status().message or "the operators for XLA are loaded",
)
needs_library = pytest.mark.skipif(
    loader.ops() is None, reason="the compiled operators are not installed"
)


def function(op: str):
    """The Python wrapper of `Performer>{op}`."""
    return getattr(loader.ops(), function_name(op))


def arguments(op: str, x: dict) -> dict:
    """Those entries that are inputs of an operator, as tensors."""
    names = [argument.name for argument in definition(op).input_arg]
    return {name: tf.convert_to_tensor(x[name]) for name in names}


def definition(op: str):
    """The registered OpDef."""
    found = op_def_registry.get(f"Performer>{op}")
    assert found is not None, f"Performer>{op} is not registered"
    return found


def call(op: str, x: dict, **attributes) -> dict:
    """Runs an operator eagerly (or into the graph of the caller); its outputs by name."""
    results = function(op)(**arguments(op, x), **known_attributes(op, attributes))
    return named(op, results)


def named(op, results) -> dict:
    """The outputs of an operator by name."""
    names = [output.name for output in definition(op).output_arg]
    results = [results] if len(names) == 1 else list(results)
    return dict(zip(names, results, strict=True))


def traced(op: str, shapes: str, x: dict, **attributes) -> dict:
    """Runs an operator in a tf.function.

    Args:
        shapes: "static", "dynamic" (ranks known) or "unknown" (not even these); "compiled": by XLA
            from unknown ones.
    """
    attributes, inputs = known_attributes(op, attributes), arguments(op, x)
    known = {
        "static": lambda shape: shape,
        "dynamic": lambda shape: [None] * len(shape),
        "unknown": lambda shape: None,
        "compiled": lambda shape: None,
    }[shapes]
    specs = [tf.TensorSpec(known(tensor.shape), tensor.dtype) for tensor in inputs.values()]

    @tf.function(input_signature=specs, autograph=False, jit_compile=shapes == "compiled" or None)
    def graph(*tensors):
        return function(op)(**dict(zip(inputs, tensors, strict=True)), **attributes)

    return named(op, graph(*inputs.values()))


def composed(op: str, x: dict, **attributes) -> dict:
    """The same by the plain composition (forward operators)."""
    attributes = known_attributes(op, attributes)
    if op == "NearFar":  # the operator has defaults
        attributes = {"exact_window": 64, "causal": False, **attributes}
    name = function_name(op).removeprefix("performer_")
    return named(op, getattr(composition, name)(**arguments(op, x), **attributes))


def has_gpu_kernel(op: str) -> bool:
    """Whether the loaded operators have kernels for GPUs; there need be no GPU."""
    registered = kernels.get_registered_kernels_for_op(f"Performer>{op}").kernel
    return any(kernel.device_type == "GPU" for kernel in registered)
