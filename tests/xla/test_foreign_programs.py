"""A program that was not made by our lowering may call the operators with anything: it is refused,
or right. Nothing is read or written outside of its buffers."""

from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf

from support import core_calls
from support.compare import assert_same_bits
from support.core_calls import _core
from support.operator_calls import needs_xla
from support.refused_calls import good_inputs

pytestmark = needs_xla
foreign = pytest.importorskip("support.foreign_programs")


def good(op):
    """The program of a good call, its inputs and its results."""
    x = good_inputs()
    inputs = [x[name] for name, *_ in _core.signature(op)["inputs"]]
    results = list(core_calls.run(op, x).values())
    described = [
        [foreign.Buffer(a.shape, str(a.dtype)) for a in all_] for all_ in (inputs, results)
    ]
    return foreign.Program(op, *described), inputs, results


def assert_right(op):
    program, inputs, results = good(op)
    for got, wanted in zip(program.run(inputs), results, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("op", ["Summarize", "CausalGrad", "NearFar", "NearFarGrad"])
def test_a_program_like_ours_gives_our_bits(op):
    assert_right(op)


def number(op, name):
    """The position of an operand."""
    return [given for given, *_ in _core.signature(op)["inputs"]].index(name)


def other_result(program, inputs, i, **changes):
    program.results[i] = replace(program.results[i], **changes)


def other_operand(program, inputs, name, dtype):
    i = number(program.op, name)
    inputs[i] = np.zeros(inputs[i].shape, dtype)
    program.operands[i] = replace(program.operands[i], dtype=dtype)


def other_shape(program, inputs, name, shape):
    i = number(program.op, name)
    inputs[i] = np.zeros(shape, inputs[i].dtype)
    program.operands[i] = replace(program.operands[i], shape=shape)


def other_attribute(program, inputs, name, value):
    del program.attributes[name]
    if value is not None:
        program.attributes[name] = value


BAD = {
    "a smaller result": (
        "Read",
        other_result,
        (0,),
        {"shape": (2, 5, 4, 1)},
        "out must have shape",
    ),
    "a larger result": ("Causal", other_result, (2,), {"shape": (2, 2, 6, 3)}, "mean must have sh"),
    "a scalar result": (
        "SummarizeGrad",
        other_result,
        (3,),
        {"shape": ()},
        "grad_key_bias must ha",
    ),
    "an empty result": (
        "CausalGrad",
        other_result,
        (8,),
        {"shape": (0,)},
        "grad_initial_mean must",
    ),
    "a narrow result": (
        "Read",
        other_result,
        (0,),
        {"dtype": "bfloat16"},
        "out must have type F32",
    ),
    "a state in half": ("Causal", other_result, (1,), {"dtype": "float16"}, "log_mass must have t"),
    "an integer result": ("ReadGrad", other_result, (0,), {"dtype": "int32"}, "F32 .*; got S32"),
    "integers": ("Summarize", other_operand, ("key", "int32"), {}, "must be float32, bfloat16"),
    "a value in half": ("Causal", other_operand, ("value", "float16"), {}, "value must have type"),
    "a wide state": ("Read", other_operand, ("mean", "float64"), {}, "mean must have type F32"),
    "a wide query": ("Read", other_operand, ("query", "float64"), {}, "query_projection must have"),
    "short offsets": (
        "Causal",
        other_operand,
        ("offsets", "int32"),
        {},
        "offsets must have type S64",
    ),
    "another shape": (
        "Causal",
        other_shape,
        ("initial_mean", (1, 2, 6, 2)),
        {},
        "P = 2 as in init",
    ),
    "a scalar": ("Summarize", other_shape, ("key", ()), {}, "key must have shape.*rank 0"),
    "a float32 scale": (
        "Summarize",
        other_attribute,
        ("scale", "0.0 : f32"),
        {},
        "another version",
    ),
    "text as scale": ("Summarize", other_attribute, ("scale", '"1"'), {}, "another version"),
    "no scale": ("Summarize", other_attribute, ("scale", None), {}, "another version"),
    "a NaN scale": (
        "Read",
        other_attribute,
        ("scale", "0x7FF8000000000000 : f64"),
        {},
        "scale must",
    ),
    "an integer as packed": ("Read", other_attribute, ("packed", "1 : i32"), {}, "another version"),
    "no window": ("NearFar", other_attribute, ("exact_window", "0 : i64"), {}, "exact_window must"),
    "a narrow start": (
        "NearFar",
        other_operand,
        ("start", "int32"),
        {},
        "start must have type S64",
    ),
    "another map": ("Read", other_attribute, ("feature_map", '"cosh"'), {}, "another version"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_program_with_other_buffers_or_attributes_is_refused(case):
    op, change, arguments, changes, message = case
    program, inputs, _ = good(op)
    change(program, inputs, *arguments, **changes)
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        program.run(inputs)
    assert_right("Read")


@pytest.mark.parametrize("missing", ["operands", "results"])
def test_a_program_with_too_few_buffers_is_refused(missing):
    program, inputs, _ = good("Causal")
    getattr(program, missing).pop()
    with pytest.raises(tf.errors.InvalidArgumentError, match="another version of Performer"):
        program.run(inputs[: len(program.operands)])
