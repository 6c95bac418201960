"""No call of a kernel races or leaves its memory: run once in every build, with the race detector,
with AddressSanitizer and UndefinedBehaviorSanitizer."""

import pytest

from support.cases import NARROW, TOKENS
from support.core_calls import backward
from support.emulated_calls import all_cases, dtypes, emulated, run
from support.emulated_kernels import CALLS, call, inputs
from support.inputs import OPS, cotangents, make


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_keep_to_their_memory(op, name):
    emulated.reset_races()
    call(name, op, inputs(name, op))


@pytest.mark.parametrize("name", ["narrow half", "narrow float32", "sub-chunks"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_of_small_blocks_keep_to_their_memory(op, name):
    emulated.reset_races()
    call(name, op, inputs(name, op), shared_bytes=emulated.small_shared_bytes)


@pytest.mark.parametrize(
    ("causal", "name"),
    [(c, name) for c in (False, True) for name in NARROW if name not in TOKENS],
)
@dtypes
def test_options_keep_to_their_memory(causal, name, dtype):
    emulated.reset_races()
    case = all_cases(causal)[name]
    backward(make(case, dtype), cotangents(case, dtype), causal, run, **case.options)
