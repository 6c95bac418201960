"""Bad input of the compiled core: a ValueError that names argument, rule and value."""

from functools import cache

import numpy as np
import pytest

from support.compare import assert_same_bits
from support.core_calls import _core, run
from support.inputs import OPS
from support.refused_calls import TABLE, good_inputs, name_of


@cache
def good(op):
    return run(op, good_inputs())


def assert_next_call_is_right(op):
    for name, result in run(op, good_inputs()).items():
        assert_same_bits(result, good(op)[name], what=f"{name} of the next call")


def assert_refused(says, op, x, **options):
    with pytest.raises(ValueError) as caught:
        run(op, x, **options)
    for part in says:
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"
    assert_next_call_is_right(op)


def test_the_table_is_large():
    assert len(TABLE) >= 80
    assert len({name_of(bad) for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=name_of)
def test_bad_input_is_refused(bad):
    assert_refused(bad.says, bad.op, bad.inputs(), **bad.attributes)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool", "float64", "float16", "U3", "O"])
def test_an_input_of_another_type_is_refused(op, dtype):
    for name, kind, _ in _core.signature(op)["inputs"]:
        x = good_inputs()
        x[name] = np.zeros(x[name].shape, dtype)
        first = _core.signature(op)["inputs"][0][0]
        if name == first and dtype in ("float64", "float16"):
            continue  # then the others are wrong
        wanted = "int64" if kind == "int64" else "float32"
        assert_refused((name, "must have dtype", wanted, str(np.dtype(dtype))), op, x)


@pytest.mark.parametrize("op", OPS)
def test_a_missing_input_is_refused(op):
    for name, *_ in _core.signature(op)["inputs"]:
        x = good_inputs()
        given = {n: x[n] for n, *_ in _core.signature(op)["inputs"] if n != name}
        with pytest.raises(ValueError, match=name):
            _core.run(op, given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threads": 0}, ("threads", "at least 1", "0")),
        ({"threads": -1}, ("threads", "at least 1", "-1")),
        ({"threads": 10**6}, ("threads", "at most 1024", "1000000")),
        ({"isa": "z80"}, ("isa", "z80")),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    assert_refused(says, "Causal", good_inputs(), **options)


def test_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match=r"op must be one of Summarize, .*Attend"):
        _core.run("Attend", good_inputs())


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"epsilon": 0.1}, "unexpected keyword argument 'epsilon'"),
        ({"scale": "large"}, "scale has a value of a wrong type"),
        ({"feature_map": 1}, "feature_map has a value of a wrong type"),
        ({"packed": np.zeros(2)}, "packed has a value of a wrong type"),
    ],
)
def test_unknown_attributes_and_values_of_a_wrong_type_are_refused(attributes, says):
    with pytest.raises(TypeError, match=says):
        run("Causal", good_inputs(), **attributes)
    assert_next_call_is_right("Causal")


@pytest.mark.parametrize("function", [_core.exp2, _core.log2])
def test_functions_of_arrays_refuse_sizes_and_types(function):
    with pytest.raises(ValueError, match=r"multiple of .*15"):
        function(np.zeros(15, np.float32))
    for dtype in ("float16", "int32", "complex64"):
        with pytest.raises(ValueError, match=f"x must be float32 or float64; got {dtype}"):
            function(np.zeros(16, dtype))


@pytest.mark.parametrize("junk", [None, "text", object(), [1.0, 2.0], {}])
def test_what_is_no_array_is_refused(junk):
    x = {**good_inputs(), "key": junk}
    with pytest.raises((ValueError, TypeError)):
        run("Summarize", x)
    assert_next_call_is_right("Summarize")
