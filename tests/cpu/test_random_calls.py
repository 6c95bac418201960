"""Random calls of the compiled core, and those that failed once; tests/building/fuzz.sh: more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.core_calls import _core
from support.random_calls import Drawn, assert_refused, assert_right, draw
from support.validity import Call, faults

# What fuzzing found.
FOUND: list[Drawn] = []


def check(drawn):
    wrong, x = faults(drawn.call), drawn.inputs()
    if wrong:
        with pytest.raises(ValueError) as caught:
            _core.run(drawn.call.op, x, **drawn.call.attributes)
        assert_refused(drawn, caught.value)
    else:
        assert_right(drawn, x, _core.run(drawn.call.op, x, **drawn.call.attributes))


@settings(max_examples=200, deadline=None, database=None)
@given(st.randoms(use_true_random=False))
def test_a_random_call_is_refused_or_right(random):
    check(draw(random))


@pytest.mark.parametrize("drawn", FOUND, ids=lambda drawn: drawn.call.op)
def test_what_failed_once_is_refused_or_right(drawn):
    check(drawn)


def test_the_model_knows_good_calls_from_bad_ones():
    shapes = {
        "key": (2, 3, 1, 4),
        "value": (2, 3, 1, 5),
        "key_projection": (1, 6, 4),
        "key_bias": (2, 1, 3),
        "offsets": (1,),
    }
    dtypes = dict.fromkeys(shapes, "float32") | {"offsets": "int64"}
    assert faults(Call("Summarize", shapes, dtypes)) == []
    for name in shapes.keys() - {"offsets"}:
        assert faults(Call("Summarize", {**shapes, name: shapes[name][1:]}, dtypes))
        assert faults(Call("Summarize", shapes, {**dtypes, name: "float16"}))
