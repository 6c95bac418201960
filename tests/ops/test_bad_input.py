"""Bad input of the TensorFlow operators: the right exception, a message that helps, no harm."""

from functools import cache

import numpy as np
import pytest
import tensorflow as tf

from support.compare import assert_same_bits
from support.core_calls import _core, run
from support.inputs import OPS
from support.operator_calls import call, function, needs_library, traced
from support.refused_calls import TABLE, good_inputs, name_of

pytestmark = needs_library
INVALID = tf.errors.InvalidArgumentError
every_row = pytest.mark.parametrize("bad", TABLE, ids=name_of)


@cache
def good(op):
    return call(op, good_inputs())


def assert_next_call_is_right(op):
    for name, result in call(op, good_inputs()).items():
        assert_same_bits(result, good(op)[name], what=f"{name} of the next call")


def assert_message(caught, says):
    for part in says:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"


@every_row
def test_eager_calls_refuse_bad_input(bad):
    with pytest.raises(INVALID) as caught:
        call(bad.op, bad.inputs(), **bad.attributes)
    assert_message(caught, bad.says)
    assert_next_call_is_right(bad.op)


@every_row
def test_tracing_refuses_what_it_can_know(bad):
    with pytest.raises(INVALID if bad.late else ValueError) as caught:
        traced(bad.op, "static", bad.inputs(), **bad.attributes)
    assert_message(caught, bad.says)
    assert_next_call_is_right(bad.op)


@every_row
def test_graphs_of_unknown_shapes_refuse_bad_input_when_they_run(bad):
    known = bool(
        bad.attributes.keys() - {"packed", "causal"}
    )  # a bad attribute shows while tracing
    with pytest.raises(ValueError if known else INVALID) as caught:
        traced(bad.op, "unknown", bad.inputs(), **bad.attributes)
    assert_message(caught, bad.says)
    assert_next_call_is_right(bad.op)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "float64", "float16", "str"])
def test_an_input_of_another_type_is_refused(op, dtype):
    first = _core.signature(op)["inputs"][0][0]
    for name, _, _ in _core.signature(op)["inputs"]:
        if name == first and dtype in ("float64", "float16"):
            continue  # then the others are wrong
        x = good_inputs()
        x[name] = np.zeros(x[name].shape, dtype)
        for make_call in (call, lambda *a: traced(a[0], "unknown", a[1])):
            with pytest.raises((INVALID, TypeError, ValueError, tf.errors.NotFoundError)):
                make_call(op, x)
    assert_next_call_is_right(op)


@pytest.mark.parametrize("op", OPS)
def test_a_state_type_that_does_not_belong_to_the_type_is_refused(op):
    for narrow, wide in ((np.float32, np.float64), (np.float64, np.float32)):
        kinds = {"T": narrow, "U": wide, "int64": np.int64}
        x = good_inputs()
        for name, kind, _ in _core.signature(op)["inputs"]:
            x[name] = x[name].astype(kinds[kind])
        for shapes in ("static", "unknown"):
            with pytest.raises((INVALID, ValueError)) as caught:
                traced(op, shapes, x)
            assert_message(caught, ("U", "must be double if T is double"))
        with pytest.raises((INVALID, tf.errors.NotFoundError, tf.errors.UnimplementedError)):
            call(op, x)
    assert_next_call_is_right(op)


def test_outputs_whose_size_overflows_are_refused_while_tracing():
    shapes = {
        "query": (2**27, 2**27, 1, 1),
        "query_projection": (1, 6, 1),
        "feature_bias": (1, 6),
        "log_mass": (2**27, 1, 6),
        "mean": (2**27, 1, 6, 2**16),
        "offsets": (1,),
    }
    with tf.Graph().as_default(), pytest.raises(ValueError) as caught:
        types = {"offsets": tf.int64}
        function("Read")(
            **{
                name: tf.compat.v1.placeholder(types.get(name, tf.float32), shape)
                for name, shape in shapes.items()
            }
        )
    assert_message(caught, ("out", "at most 2**56 elements", str(2**27)))


def test_sizes_beyond_32_bits_are_inferred_right():
    with tf.Graph().as_default():
        out = function("Read")(
            query=tf.compat.v1.placeholder(tf.float32, (2**20, 2**13, 1, 1)),
            query_projection=tf.zeros([1, 6, 1]),
            feature_bias=tf.zeros([1, 6]),
            log_mass=tf.compat.v1.placeholder(tf.float32, (2**20, 1, 6)),
            mean=tf.compat.v1.placeholder(tf.float32, (2**20, 1, 6, 7)),
            offsets=tf.constant([0], tf.int64),
        )
    assert out.shape == [2**20, 2**13, 1, 7]


@pytest.fixture
def larger_than_any_memory():
    sequences, width = 2**20, 65536  # results of 2^54 bytes
    return {
        "key": np.zeros((sequences, 0, 1, 1), np.float32),
        "value": np.zeros((sequences, 0, 1, width), np.float32),
        "key_projection": np.zeros((1, width, 1), np.float32),
        "key_bias": np.zeros((1, 1, 1), np.float32),
        "offsets": np.zeros(1, np.int64),
    }


def test_the_core_refuses_results_too_large_for_memory(larger_than_any_memory):
    with pytest.raises((MemoryError, ValueError)):  # ValueError: NumPy cannot count the bytes
        run("Summarize", larger_than_any_memory)
    assert_next_call_is_right("Summarize")


@pytest.mark.slow  # TensorFlow waits for memory, 10 s
def test_the_operator_refuses_them_too_and_the_next_call_is_right(larger_than_any_memory):
    x = larger_than_any_memory
    with pytest.raises(tf.errors.ResourceExhaustedError):
        call("Summarize", x)
    assert_next_call_is_right("Summarize")


def test_without_a_sequence_nothing_is_too_large(larger_than_any_memory):
    x = larger_than_any_memory
    x["key"], x["value"] = x["key"][:0], x["value"][:0]
    width = x["value"].shape[-1]
    assert call("Summarize", x)["mean"].shape == [0, 1, width, width]
