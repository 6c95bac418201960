"""No call of a kernel leaves its memory, or leaves a number of its results unwritten.

In every build: buffers start as NaN and have guards of NaN around them, so results are finite only
if they are written, from what was written or given; the guards and the inputs keep their bits; and
another schedule gives the same bits. The build with the race detector also fails on a race, the one
with AddressSanitizer and UndefinedBehaviorSanitizer on a read out of bounds.
"""

import numpy as np
import pytest

from support.cases import CASES, NARROW, TOKENS
from support.compare import assert_same_bits
from support.core_calls import backward, forward
from support.emulated_calls import all_cases, dtypes, emulated, run
from support.emulated_kernels import EVERY_CALL, call, inputs
from support.inputs import GPU_OPS, Case, cotangents, forms, make


def assert_kept(run_once):
    """A call under two schedules: all results are numbers, and the same bits."""
    emulated.reset_races()
    results = run_once(order="forward")
    for name, result in results.items():
        assert not np.isnan(result.astype(np.float32)).any(), f"{name} has NaN"
    for name, result in run_once(order="random", seed=2).items():
        assert_same_bits(result, results[name], what=f"{name}, another schedule")


@pytest.mark.parametrize(("name", "op"), EVERY_CALL)
def test_kernels_keep_to_their_memory(name, op):
    x = inputs(name, op)
    assert_kept(lambda **schedule: call(name, op, x, **schedule))


@pytest.mark.parametrize("name", ["narrow half", "narrow float32", "sub-chunks"])
@pytest.mark.parametrize("op", GPU_OPS)
def test_kernels_of_small_blocks_keep_to_their_memory(op, name):
    x, small = inputs(name, op), emulated.small_shared_bytes
    assert_kept(lambda **schedule: call(name, op, x, shared_bytes=small, **schedule))


# The offsets of more sequences than two launches store. How is the same for every operator.
OF_490 = Case(batch=1, rows=490, heads=1, groups=1, offsets=tuple(range(491)))  # one row each
FEW = CASES["packed, with empty sequences"]


@pytest.mark.parametrize(
    ("op", "case"),
    [
        *(pytest.param(op, FEW, id=op) for op in (*GPU_OPS, "NearFar", "NearFarGrad")),
        ("Summarize", OF_490),
    ],
)
def test_a_captured_call_of_packed_sequences_needs_nothing_of_the_host(op, case):
    """A graph runs when its call has returned, and its offsets are gone."""
    x = {**make(case, "bfloat16"), **cotangents(case, "bfloat16")}
    if op == "NearFarGrad":
        x.update(run("NearFar", x, **case.options))
    elif op not in ("Summarize", "Causal", "NearFar"):
        x.update(forward(x, op.startswith("Causal"), run, **case.options))
    wanted = run(op, x, **case.options)
    for name, result in run(op, x, captured=True, **case.options).items():
        assert_same_bits(result, wanted[name], what=name)


@forms
@pytest.mark.parametrize("name", [name for name in NARROW if name not in TOKENS])
@dtypes
def test_options_keep_to_their_memory(causal, name, dtype):
    case = all_cases(causal)[name]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    assert_kept(lambda **schedule: backward(x, incoming, causal, run, **case.options, **schedule))
