"""Every input of every operator, with every kind of wrong shape or type, in every way to call it.

The rows come from the signatures that the core reports; whether one is to be refused, from the
model (`support.validity`). What the core does not refuse must be right, and its bits those of the
other ways.
"""

from functools import cache, partial

import numpy as np
import pytest
import tensorflow as tf

from support.compare import assert_same_bits
from support.core_calls import _core, run
from support.inputs import OPS
from support.operator_calls import call, function, named, needs_library, needs_xla
from support.random_calls import Drawn, assert_refused, assert_right
from support.refused_calls import PACKED, good_inputs
from support.validity import Call, faults

pytestmark = needs_library
HUGE = 2**40


def shapes_of(name, pattern, shape):
    """Other shapes for an input: its ranks, then each of its axes."""
    yield from ((), shape[1:], (*shape, 1), (1, *shape))
    for axis, _ in enumerate(pattern.split()):
        for size in (0, 1, shape[axis] + 1, 2 * shape[axis]):
            yield (*shape[:axis], size, *shape[axis + 1 :])
        if len(shape) > 1:  # without any number, or there would be no memory for it
            huge = [0] * len(shape)
            huge[axis] = HUGE
            yield tuple(huge)


@cache
def rows(op, packed):
    """Pairs of a `Drawn` and its inputs."""
    good = good_inputs(PACKED) if packed else good_inputs()
    signature = _core.signature(op)["inputs"]
    good = {name: good[name] for name, *_ in signature}
    attributes = {"packed": True} if packed else {}
    found = []

    def add(name, array):
        x = {**good, name: array}
        shapes = {name: a.shape for name, a in x.items()}
        dtypes = {name: str(a.dtype) for name, a in x.items()}
        offsets = tuple(x["offsets"].ravel().tolist())
        found.append((Drawn(Call(op, shapes, dtypes, attributes, offsets)), x))  # start is 0

    for name, kind, pattern in signature:
        for shape in dict.fromkeys(shapes_of(name, pattern, good[name].shape)):
            x = np.zeros(shape, good[name].dtype)
            if kind != "int64" and x.size > 0:
                x = np.resize(good[name], shape)
            add(name, x)
        if not packed:
            for dtype in ("float16", "float64", "int32", "int64"):
                if good[name].dtype != dtype:
                    add(name, np.zeros(good[name].shape, dtype))
    return found


@cache
def unknown(op, packed, compiled):
    """The operator as a function of tensors of which only the types are known."""
    kinds = {"T": tf.float32, "U": tf.float32, "int64": tf.int64}
    signature = _core.signature(op)["inputs"]
    specs = [tf.TensorSpec(None, kinds[kind], name) for name, kind, _ in signature]

    @tf.function(input_signature=specs, autograph=False, jit_compile=compiled or None)
    def graph(*tensors):
        names = [name for name, *_ in signature]
        return function(op)(**dict(zip(names, tensors, strict=True)), packed=packed)

    return graph


def in_graph(op, x, packed=False, compiled=False):
    return named(op, unknown(op, packed, compiled)(*x.values()))


REFUSALS = (tf.errors.OpError, ValueError, TypeError)


@cache
def results_of_core(op, packed):
    """What the core gives for each of the rows, which is right; None where it refuses, rightly."""
    return [judged(run, drawn, x) for drawn, x in rows(op, packed)]


def judged(way, drawn, x, right=assert_right):
    """What a call gives, which `right` looks at; None where it is refused, as it must be then."""
    wrong = faults(drawn.call)
    try:
        results = way(drawn.call.op, x, **drawn.call.attributes)
    except REFUSALS as error:
        assert wrong, f"{drawn}: refused, {error}"
        assert_refused(drawn, error)
        return None
    assert not wrong, f"{drawn}: not refused, {wrong}"
    results = {name: np.asarray(a) for name, a in results.items()}
    right(drawn, x, results)
    return results


def assert_same(expected, drawn, x, results):
    for name, result in expected.items():
        assert_same_bits(results[name], result, what=f"{name} of {drawn}")


def assert_as_the_core(way, op, packed, every=1, fixed_types=False):
    """All rows, or every n-th; without those of another type where `way` fixes the types."""
    found, tensors = [], {id(a): tf.constant(a) for _, x in rows(op, packed) for a in x.values()}
    chosen = list(zip(rows(op, packed), results_of_core(op, packed), strict=True))[::every]
    for (drawn, x), expected in chosen:
        if fixed_types and set(drawn.call.dtypes.values()) - {"float32", "int64"}:
            continue
        x = {name: tensors[id(a)] for name, a in x.items()}
        found.append(judged(way, drawn, x, partial(assert_same, expected)))
    assert found.count(None) > 2
    assert found.count(None) < len(found) or every > 1


both = pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])


@both
@pytest.mark.parametrize("op", OPS)
def test_the_core(op, packed):
    found = results_of_core(op, packed)
    assert 2 < found.count(None) < len(found)


@both
@pytest.mark.parametrize("op", OPS)
def test_eagerly(op, packed):
    assert_as_the_core(call, op, packed)


@both
@pytest.mark.parametrize("op", OPS)
def test_in_a_graph_that_knows_no_shape(op, packed):
    assert_as_the_core(in_graph, op, packed, fixed_types=True)


@needs_xla
@pytest.mark.parametrize("op", OPS)
def test_under_xla(op):
    assert_as_the_core(
        lambda op, x: in_graph(op, x, compiled=True), op, False, every=31, fixed_types=True
    )
