"""Gradients of the compiled operators, registered with TensorFlow when this module is imported.

The gradient of a forward operator is its Grad operator. The gradient of a Grad operator goes
through the plain composition, which is differentiable to any order. There the saved results
(log_mass, mean, out) are functions of the other inputs. They receive no gradient of their own, and
the total is right.
"""

from __future__ import annotations

import re

import tensorflow as tf

from performer import composition, loader
from performer.ops import gpus
from performer.shapes import dims

_SHARED = ("feature_map", "scale", "feature_epsilon", "packed")
# The schema of the forward operators, in the order of their registration (cc/core/schema.cc). An
# eager gradient function is not given the names.
_FORMS = {
    # operator: (composition, differentiable inputs, outputs, attributes)
    "Summarize": (
        composition.summarize,
        ("key", "value", "key_projection", "key_bias"),
        ("log_mass", "mean"),
        (*_SHARED, "key_norm"),
    ),
    "Read": (
        composition.read,
        ("query", "query_projection", "feature_bias", "log_mass", "mean"),
        ("out",),
        _SHARED,
    ),
    "Causal": (
        composition.causal,
        (
            "query",
            "key",
            "value",
            "query_projection",
            "key_projection",
            "feature_bias",
            "key_bias",
            "initial_log_mass",
            "initial_mean",
        ),
        ("out", "log_mass", "mean"),
        (*_SHARED, "key_norm"),
    ),
    "NearFar": (
        composition.near_far,
        (
            "query",
            "key",
            "value",
            "query_projection",
            "key_projection",
            "feature_bias",
            "key_bias",
            "initial_log_mass",
            "initial_mean",
        ),
        ("out", "log_weight", "log_mass", "mean"),
        ("exact_window", "causal", "scale", "key_norm", "query_norm", "packed"),
    ),
}


def _constants(form: str):
    """The inputs without a gradient, which come after the others."""
    return ("offsets", "start") if form == "NearFar" else ("offsets",)


def function_name(form: str) -> str:
    """The name of `Performer>{form}` in the library: "NearFarGrad" is performer_near_far_grad."""
    return re.sub("(?<!^)(?=[A-Z])", "_", f"performer{form}").lower()


def _attributes(op, names):
    values = {name: op.get_attr(name) for name in names}
    if isinstance(values.get("feature_map"), bytes):
        values["feature_map"] = values["feature_map"].decode()
    return values


def _dense(gradients, like):
    """Incoming gradients as tensors; zeros where nothing came in."""
    return [
        tf.zeros_like(x) if g is None else tf.convert_to_tensor(g)
        for g, x in zip(gradients, like, strict=True)
    ]


def _of_projections(name: str) -> bool:
    """Whether the gradient of an input belongs to those that `projection_gradient` asks for."""
    return "projection" in name or name == "feature_bias"


def _asks_for_projections(op, inputs) -> bool:
    """Whether the tape watches a projection or its bias. A layer's draw is not trained, say.

    Without a tape (`tf.gradients`, the gradient of a function from outside) that is not known.
    """
    skipped = getattr(op, "skip_input_indices", None) or ()
    return any(_of_projections(name) and i not in skipped for i, name in enumerate(inputs))


def _composed(form, primary, constants, incoming, options):
    """Gradients of the inputs `primary`, by the plain composition."""
    composition, inputs, _, _ = _FORMS[form]
    with tf.GradientTape() as tape:
        tape.watch(primary)
        results = composition(
            **dict(zip(inputs, primary, strict=True)),
            **dict(zip(_constants(form), constants, strict=True)),
            **options,
        )
    return tape.gradient(results, primary, incoming, unconnected_gradients="zero")


def _first_order(form: str):
    """Gradient function of `Performer>{form}`: its Grad operator, where that has a kernel."""
    _, inputs, outputs, attributes = _FORMS[form]
    grad_name = function_name(f"{form}Grad")

    def gradient(op, *incoming):
        arguments = dict(zip((*inputs, *_constants(form)), op.inputs, strict=True))
        if not gpus.takes_inputs(grad_name.removeprefix("performer_"), arguments):
            # Tensors of their own: of one that is given twice, a tape knows the sum.
            given, count = [tf.identity(x) for x in op.inputs], len(inputs)
            found = _composed(
                form,
                given[:count],
                given[count:],
                _dense(incoming, op.outputs),
                _attributes(op, attributes),
            )
            return [*found, *[None] * len(_constants(form))]
        arguments.update(zip(outputs, op.outputs, strict=True))
        arguments.update(
            zip((f"grad_{name}" for name in outputs), _dense(incoming, op.outputs), strict=True)
        )
        grad_op = getattr(loader.ops(), grad_name)
        asked = _asks_for_projections(op, inputs)
        gradients = grad_op(**arguments, **_attributes(op, attributes), projection_gradient=asked)
        found = [
            x if asked or not _of_projections(name) else None
            for name, x in zip(inputs, gradients, strict=True)
        ]
        return [*found, *[None] * len(_constants(form))]

    return gradient


def _second_order(form: str):
    """Gradient function of `Performer>{form}Grad`, by differentiating the composition twice."""
    _, inputs, outputs, attributes = _FORMS[form]

    def gradient(op, *incoming):
        # Tensors of their own: of one that is given twice, a tape knows the sum of both gradients.
        given = [tf.identity(x) for x in op.inputs]
        count, saved = len(inputs), [name for name in outputs if name not in inputs]
        names = _constants(form)
        primary, constants = given[:count], given[count : count + len(names)]
        cotangents = given[count + len(names) + len(saved) :]
        options = _attributes(op, attributes)
        with tf.GradientTape() as outer:
            outer.watch([*primary, *cotangents])
            first = _composed(form, primary, constants, cotangents, options)
        second = outer.gradient(
            first, [*primary, *cotangents], _dense(incoming, first), unconnected_gradients="zero"
        )
        nothing = [None] * (len(names) + len(saved))
        return [*second[:count], *nothing, *second[count:]]

    return gradient


for _form in _FORMS:
    tf.RegisterGradient(f"Performer>{_form}")(_first_order(_form))
    tf.RegisterGradient(f"Performer>{_form}Grad")(_second_order(_form))


@tf.RegisterGradient("Performer>AppendRows")
def _of_append_rows(op, incoming):
    return tf.split(incoming, [dims(x)[1] for x in op.inputs], 1)
