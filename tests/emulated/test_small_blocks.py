"""GPUs whose blocks have little shared memory (sm_86, sm_89, sm_120): heads of up to 64 run in
smaller blocks, wider ones mostly not."""

import pytest

from support.emulated_calls import GPU_CASES, dtypes, run_in_small_blocks
from support.inputs import forms, make
from support.promises import check_gradients, check_results

NARROW = [
    "narrow, 256 features",
    "narrow, 128 features, entry std 3",
    "520 features",
    "three heads a group, 300 features",
    "packed, splits of some sequences",
]
WIDE = GPU_CASES["wide, two blocks of features"]
every_case = pytest.mark.parametrize("name", NARROW)


@forms
@every_case
@dtypes
def test_results_are_those_of_the_reference(causal, name, dtype):
    check_results(run_in_small_blocks, GPU_CASES[name], causal, dtype)


@forms
@every_case
@dtypes
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    check_gradients(run_in_small_blocks, GPU_CASES[name], causal, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_wide_heads_in_16_bits_run_forward(dtype):
    check_results(run_in_small_blocks, WIDE, False, dtype)


@dtypes
def test_wide_heads_that_do_not_fit_are_an_error_that_says_what_does(dtype):
    x = make(WIDE, dtype)
    with pytest.raises(RuntimeError, match=r"this GPU has 101376.*D and E of at most 64"):
        run_in_small_blocks("Causal", x)
