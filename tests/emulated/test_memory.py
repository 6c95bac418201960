"""No call of a kernel races or leaves its memory: run once in every build, with the race detector,
with AddressSanitizer and UndefinedBehaviorSanitizer."""

import pytest

from kit.core import make
from kit.core_cases import NARROW, cases
from kit.emulated import dtypes, emulated, run
from kit.emulated_calls import CALLS, OPS, call, inputs


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("op", OPS)
def test_kernels_keep_to_their_memory(op, name):
    emulated.reset_races()
    call(name, op, inputs(name, op))


@pytest.mark.parametrize("name", NARROW)
@dtypes
def test_options_keep_to_their_memory(name, dtype):
    emulated.reset_races()
    case = cases(True)[name]
    run("Causal", make(case, dtype), **case.options)
