"""`tf.vectorized_map` and `GradientTape.jacobian` over the compiled operators, without a loop.

A vectorized loop runs an operator n times, on inputs that differ (stacked, [n, ...]) or do not. As
no head can see another, the n runs are one run with n times the heads: iteration i becomes heads
i H to (i + 1) H - 1 of the query, and i G to (i + 1) G - 1 of key, value and state. Every output
has the bits that its iteration would have alone, but for gradients that heads share, which are
summed in another order.

TensorFlow has no public place to register this. Where its private one is missing, nothing is
registered; TensorFlow then runs a loop, and says so.
"""

from __future__ import annotations

import tensorflow as tf

from performer import loader
from performer.ops.gradients import function_name
from performer.shapes import dims

OPERATORS = {
    f"Performer>{form}{grad}": function_name(f"{form}{grad}")
    for form in ("Summarize", "Read", "Causal", "NearFar")
    for grad in ("", "Grad")
}
_HEAD_AXIS = {
    "query": 2,
    "key": 2,
    "value": 2,
    "out": 2,
    "log_weight": 2,
    "query_projection": 0,
    "key_projection": 0,
    "feature_bias": 0,
    "key_bias": 1,
    "log_mass": 1,
    "mean": 1,
    "initial_log_mass": 1,
    "initial_mean": 1,
}
_HEADLESS = ("offsets", "start")
# These may have one head, for all.
_SHARED = ("query_projection", "key_projection", "feature_bias", "key_bias")


def _larger(one, other):
    known = isinstance(one, int) and isinstance(other, int)
    return max(one, other) if known else tf.maximum(one, other)


def _fold(x, stacked, axis, count, heads):
    """[n, ..., h, ...], or [..., h, ...] for all n, to [..., n heads, ...]; h is 1 or `heads`."""
    x = x if stacked else x[None]
    x = tf.transpose(x, [*range(1, axis + 1), 0, *range(axis + 1, len(x.shape))])
    shape = dims(x)
    x = tf.broadcast_to(x, [*shape[:axis], count, heads, *shape[axis + 2 :]])
    return tf.reshape(x, [*shape[:axis], count * heads, *shape[axis + 2 :]])


def _unfold(x, axis, count, heads, size):
    """[..., n heads, ...] to [n, ..., size, ...]: summed over the heads where size is 1 of more."""
    shape, rank = dims(x), len(x.shape)
    x = tf.reshape(x, [*shape[:axis], count, size, heads // size, *shape[axis + 1 :]])
    return tf.transpose(
        tf.reduce_sum(x, axis + 2), [axis, *range(axis), *range(axis + 1, rank + 1)]
    )


def _run(op, count, inputs):
    """All iterations of an operator.

    Args:
        op: `tf.Operation` of one iteration.
        count: n, int or scalar tensor.
        inputs: for each input of op a pair: a tensor, and whether it is stacked.

    Returns:
        The operator's outputs, stacked.
    """
    names = [argument.name for argument in op.op_def.input_arg]
    sizes = {
        name: dims(x)[_HEAD_AXIS[name.removeprefix("grad_")] + bool(stacked)]
        for name, (x, stacked) in zip(names, inputs, strict=True)
        if name not in _HEADLESS
    }
    groups = sizes["key"] if "key" in sizes else sizes["log_mass"]
    heads = {
        name: _larger(sizes[name], groups) if name in _SHARED else sizes[name] for name in sizes
    }
    folded = {}
    for name, (x, stacked) in zip(names, inputs, strict=True):
        # One for all heads serves all iterations, unless each has to get its own gradient.
        serves_all = name in _SHARED and x.shape[_HEAD_AXIS[name]] == 1 and not stacked
        if name in _HEADLESS or (serves_all and not op.type.endswith("Grad")):
            folded[name] = x
        else:
            axis = _HEAD_AXIS[name.removeprefix("grad_")]
            folded[name] = _fold(x, stacked, axis, count, heads[name])
    attributes = {
        attribute.name: op.get_attr(attribute.name)
        for attribute in op.op_def.attr
        if attribute.type != "type"
    }
    results = getattr(loader.ops(), OPERATORS[op.type])(**folded, **attributes)
    results = results if isinstance(results, tuple) else (results,)

    def stacked_output(name, x):
        name = name.removeprefix("grad_")
        each = heads["query"] if name in ("out", "log_weight") else heads.get(name, groups)
        return _unfold(x, _HEAD_AXIS[name], count, each, sizes.get(name, each))

    outputs = [argument.name for argument in op.op_def.output_arg]
    return [stacked_output(name, x) for name, x in zip(outputs, results, strict=True)]


def _register():
    """Registers `_run` for every operator, if this TensorFlow has where."""
    try:
        from tensorflow.python.ops.parallel_for import pfor

        register, refusal, wrap = pfor.RegisterPFor, pfor.ConversionNotImplementedError, pfor.wrap
    except (ImportError, AttributeError):
        return

    def convert(pfor_input):
        op, length = pfor_input.op, pfor_input.pfor.loop_len_vector
        inputs = [(x, stacked) for x, stacked, _ in pfor_input.inputs]
        if any(x.shape.rank is None for x, _ in inputs):
            raise refusal("the rank of an input is unknown.")
        names = [argument.name for argument in op.op_def.input_arg]
        for name in set(names) & set(_HEADLESS):
            if inputs[names.index(name)][1]:
                raise refusal(f"iterations differ in {name}.")
        static = tf.get_static_value(length)
        count = length[0] if static is None else int(static[0])
        return [wrap(x, True) for x in _run(op, count, inputs)]

    def convert_append_rows(pfor_input):
        count = pfor_input.pfor.loop_len_vector[0]
        parts = [
            x if stacked else tf.repeat(x[None], count, 0) for x, stacked, _ in pfor_input.inputs
        ]
        return wrap(tf.concat(parts, 2), True)

    for name in OPERATORS:
        register(name)(convert)
    register("Performer>AppendRows")(convert_append_rows)


_register()
