"""Random calls of the compiled core, and those that failed once; tests/building/fuzz.sh: more."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.core_calls import _core
from support.random_calls import Drawn, assert_refused, assert_right, draw
from support.validity import Call, faults

_ROWS, _STATE = (1, 47, 3, 17), {"log_mass": (1, 1, 16), "mean": (1, 1, 16, 17)}
_KEYS = {
    "query": _ROWS,
    "key": (1, 47, 1, 17),
    "value": (1, 47, 1, 17),
    "query_projection": (1, 16, 17),
    "key_projection": (1, 16, 17),
    "feature_bias": (3, 16),
    "key_bias": (1, 1, 47),
}
_OUT = {"out": _ROWS, "log_weight": (1, 47, 3), **_STATE}
_NEAR_FAR_GRAD = {
    **_KEYS,
    **{f"initial_{name}": shape for name, shape in _STATE.items()},
    "offsets": (1,),
    "start": (),
    **_OUT,
    **{f"grad_{name}": shape for name, shape in _OUT.items()},
}
_INTEGERS = {"offsets": "int64", "start": "int64"}

# What fuzzing found.
FOUND = [
    # Large logits: gradients must not leave the range of float32 between the steps.
    Drawn(
        Call(
            "NearFarGrad",
            _NEAR_FAR_GRAD,
            {**dict.fromkeys(_NEAR_FAR_GRAD, "float32"), **_INTEGERS},
            {"exact_window": 48, "scale": 3.0},
            start=1,
        ),
        seed=11396,
    ),
]


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
