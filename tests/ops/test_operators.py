"""The TensorFlow operators: registration, shapes, graphs, and agreement with the core."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from support.compare import assert_close, assert_same_bits
from support.core_calls import _core, backward, run
from support.inputs import OPS, Case, cotangents, known_attributes, make
from support.operator_calls import (
    FORWARD,
    call,
    composed,
    definition,
    function,
    needs_library,
    traced,
)

pytestmark = needs_library

CASES = {
    "plain": Case(rows=70, heads=4, groups=2, bias="BGS", masked="holes", query_projections=4),
    "left padding, a state": Case(rows=40, bias="B1S", masked="left", state=1, feature_biases=2),
    "packed": Case(batch=1, rows=50, offsets=(0, 20, 20, 50), bias="11S", state=3),
    "relu": Case(attributes=(("feature_map", "relu"), ("feature_epsilon", 0.1))),
    "elu, scale": Case(attributes=(("feature_map", "elu"), ("scale", 0.3))),
    "no norm": Case(attributes=(("key_norm", False), ("scale", 0.5))),
    "no rows": Case(rows=0, state=2),
    "a window": Case(rows=70, bias="B1S", attributes=(("exact_window", 8), ("causal", True))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def all_inputs(case, dtype="float32"):
    """Inputs of all operators."""
    x, incoming = make(case, dtype), cotangents(case, dtype)
    near_far = run("NearFar", x, **case.options)
    return {**x, **incoming, **near_far, **run("Causal", x, **case.options)}


@pytest.mark.parametrize("op", OPS)
def test_the_registered_arguments_are_those_of_the_core(op):
    registered, signature = definition(op), _core.signature(op)
    for given, wanted in (
        (registered.input_arg, signature["inputs"]),
        (registered.output_arg, signature["outputs"]),
    ):
        found = [(arg.name, arg.type_attr or tf.as_dtype(arg.type).name) for arg in given]
        assert found == [(name, kind) for name, kind, _ in wanted]


@pytest.mark.parametrize("op", OPS)
def test_every_attribute_but_the_type_has_its_default(op):
    attributes = {attr.name: attr for attr in definition(op).attr}
    defaults = {
        name: {"string": "s", "float": "f", "bool": "b", "int": "i", "type": "type"}[attr.type]
        for name, attr in attributes.items()
        if name != "T"
    }
    values = {
        name: getattr(attributes[name].default_value, field) for name, field in defaults.items()
    }
    wanted = {
        "feature_map": b"softmax",
        "scale": 0.0,
        "feature_epsilon": np.float32(1e-3),
        "packed": False,
        "U": tf.float32.as_datatype_enum,
    }
    wanted |= {"key_norm": True, "exact_window": 64, "causal": False, "query_norm": True}
    wanted |= {"projection_gradient": True} if op.endswith("Grad") else {}
    wanted = known_attributes(op, wanted)
    assert values == wanted
    types = {tf.as_dtype(t).name for t in attributes["T"].allowed_values.list.type}
    assert types == {"float32", "bfloat16", "float16", "float64"}


@every_case
@pytest.mark.parametrize("op", OPS)
def test_eager_and_traced_calls_give_the_bits_of_the_core(op, case):
    x = all_inputs(case)
    wanted = run(op, x, **case.options)
    for name, result in call(op, x, **case.options).items():
        assert_same_bits(result, wanted[name], what=f"{name}, eager")
    for shapes in ("static", "dynamic", "unknown"):
        for name, result in traced(op, shapes, x, **case.options).items():
            assert_same_bits(result, wanted[name], what=f"{name}, {shapes} shapes")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_other_types_give_the_bits_of_the_core(op, dtype):
    case = CASES["plain"]
    x = all_inputs(case, dtype)
    wanted = run(op, x, **case.options)
    for name, result in call(op, x, **case.options).items():
        assert result.dtype.name == wanted[name].dtype.name, name
        bits = [
            np.asarray(a).view(f"u{wanted[name].dtype.itemsize}") for a in (result, wanted[name])
        ]
        assert np.array_equal(*bits), name


@every_case
@pytest.mark.parametrize("op", FORWARD)
def test_operators_are_their_composition(op, case):
    x = all_inputs(case, "float64")
    wanted = composed(op, x, **case.options)
    for name, result in call(op, x, **case.options).items():
        assert_close(result, wanted[name], relative=1e-12, what=name)


@pytest.mark.parametrize("op", FORWARD)
def test_registered_gradients_are_those_of_the_core(op):
    case = CASES["left padding, a state"]
    x = all_inputs(case, "float64")
    differentiable = {
        name: tf.constant(x[name])
        for name, kind, _ in _core.signature(op)["inputs"]
        if kind != "int64"
    }
    options = {"exact_window": 8, "causal": True}
    with tf.GradientTape() as tape:
        tape.watch(differentiable)
        results = call(op, {**x, **differentiable}, **options)
        loss = sum(tf.reduce_sum(r * x[f"grad_{name}"]) for name, r in results.items())
    saved = run(op, x, **options)
    wanted = run(f"{op}Grad", {**x, **saved}, **options)
    for name, grad in tape.gradient(loss, differentiable).items():
        assert_same_bits(grad, wanted[f"grad_{name}"], what=name)


def test_an_output_without_a_gradient_counts_as_zero():
    x = make(CASES["plain"])
    incoming = cotangents(CASES["plain"])
    incoming["grad_log_mass"][:], incoming["grad_mean"][:] = 0, 0
    query = tf.constant(x["query"])
    with tf.GradientTape() as tape:
        tape.watch(query)
        out = call("Causal", {**x, "query": query})["out"]
    grad = tape.gradient(out, query, incoming["grad_out"])
    assert_same_bits(grad, backward(x, incoming, causal=True)["query"])


SPECS = {
    "Summarize": (
        {"key": [2, None, 3, 4], "value": [2, 9, 3, 5], "key_projection": [1, 6, 4]},
        {"key_bias": [None, 1, None]},
        [[2, 3, 6], [2, 3, 6, 5]],
    ),
    "Read": (
        {"query": [2, 9, 6, None], "query_projection": [1, 7, None], "feature_bias": None},
        {"log_mass": [2, 3, None], "mean": [None, 3, 7, 5]},
        [[2, 9, 6, 5]],
    ),
    "Causal": (
        {
            "query": [2, None, 6, 4],
            "key": [None, 9, 3, 4],
            "value": [None, None, None, 5],
            "query_projection": [6, None, 4],
            "key_projection": [1, 7, 4],
        },
        {
            "feature_bias": [1, None],
            "key_bias": None,
            "initial_log_mass": [1, 3, 7],
            "initial_mean": None,
        },
        [[2, 9, 6, 5], [2, 3, 7], [2, 3, 7, 5]],
    ),
}
SPECS["NearFar"] = (
    {**SPECS["Causal"][0], "query": [2, 9, 6, 4]},
    {**SPECS["Causal"][1], "start": None},
    [[2, 9, 6, 5], [2, 9, 6], *SPECS["Causal"][2][1:]],
)


@pytest.mark.parametrize("op", FORWARD)
def test_shape_inference_puts_together_what_each_argument_knows(op):
    given, rest, wanted = SPECS[op]
    shapes = {**given, **rest, "offsets": [None]}
    with tf.Graph().as_default():
        inputs = {
            name: tf.compat.v1.placeholder(
                tf.int64 if name in ("offsets", "start") else tf.float32, shape
            )
            for name, shape in shapes.items()
        }
        outputs = tf.nest.flatten(function(op)(**inputs))
    assert [x.shape.as_list() for x in outputs] == wanted


@pytest.mark.parametrize("op", OPS)
def test_unknown_ranks_give_outputs_of_known_rank_or_none(op):
    with tf.Graph().as_default():
        inputs = {
            name: tf.compat.v1.placeholder(tf.int64 if kind == "int64" else tf.float32, None)
            for name, kind, _ in _core.signature(op)["inputs"]
        }
        outputs = tf.nest.flatten(function(op)(**inputs))
    for output, (_, _, shape) in zip(outputs, _core.signature(op)["outputs"], strict=True):
        assert output.shape.rank in (None, len(shape.split()))


def test_packed_shapes_take_the_number_of_sequences_from_offsets():
    x = make(CASES["packed"])
    with tf.Graph().as_default():
        outputs = call("Causal", x, packed=True)
    assert outputs["log_mass"].shape == [3, 2, 10]
    assert outputs["mean"].shape == [3, 2, 10, 5]


def test_gradients_keep_the_shapes_of_broadcast_arguments():
    case = replace(CASES["left padding, a state"], bias="111", masked="")
    x = all_inputs(case)
    for name, grad in call("CausalGrad", x).items():
        assert grad.shape == x[name.removeprefix("grad_")].shape, name


def test_a_large_batch_of_single_rows():
    case = Case(batch=70_000, rows=1, heads=1, groups=1, dim=1, value_dim=1, features=1)
    x = make(case)
    out = call("Causal", x)["out"]
    assert_close(out, x["value"], worst=1e-6)


def test_odd_numbers_of_heads():
    x = make(Case(rows=3, heads=97, groups=97, dim=2, value_dim=2, features=3))
    for name, result in call("Causal", x).items():
        assert_close(result, composed("Causal", x)[name], worst=2e-5, what=name)


@pytest.mark.parametrize("op", OPS)
def test_denormals_count_as_they_do_in_the_core_though_tensorflow_takes_them_for_zero(op):
    x = all_inputs(Case(rows=70, heads=4, groups=2, state=2))
    for name in ("query", "value", "grad_out", "initial_mean", "mean", "grad_mean"):
        x[name] = x[name] * np.float32(1e-39)
    wanted = run(op, x)
    assert any(np.any((a != 0) & (np.abs(a) < 2.0**-126)) for a in wanted.values())
    for results in (call(op, x), traced(op, "static", x)):
        for name, result in results.items():
            assert_same_bits(result, wanted[name], what=name)
