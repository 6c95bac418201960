"""The CUDA kernels on a GPU: against the reference, and the same bits again."""

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support import near_far
from support.cases import GPU_CASES, cases, gpu_dtypes, parameters
from support.causality import POISONS, check_jumps, check_past, check_prefix_alone, jumps
from support.compare import assert_close, assert_same_bits
from support.core_calls import backward, expected, forward
from support.gpu_calls import dtypes, needs_gpu, run
from support.inputs import Case, cotangents, forms, make
from support.promises import check_batch_row_alone, check_gradients, check_results

pytestmark = needs_gpu


def all_cases(causal):
    return {**cases(causal), **GPU_CASES}


def dtypes_of(name):
    return gpu_dtypes({**all_cases(False), **all_cases(True)}[name])


PARAMETERS = parameters(all_cases, dtypes_of)
every_case = pytest.mark.parametrize(("causal", "name", "dtype"), PARAMETERS)


@every_case
def test_results_are_those_of_the_reference(causal, name, dtype):
    check_results(run, all_cases(causal)[name], causal, dtype)


@every_case
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    check_gradients(run, all_cases(causal)[name], causal, dtype)


@pytest.mark.parametrize(("causal", "name", "dtype"), near_far.gpu_parameters())
def test_results_with_a_window_are_those_of_the_reference(causal, name, dtype):
    near_far.check_results(run, name, causal, dtype)


@pytest.mark.parametrize(("causal", "name", "dtype"), near_far.gpu_parameters())
def test_gradients_with_a_window_are_those_of_the_reference(causal, name, dtype):
    near_far.check_gradients(run, name, causal, dtype)


@dtypes
@pytest.mark.parametrize("window", [16, 64, 100])
@pytest.mark.parametrize("t", [11, 64, 70])
def test_with_a_window_too_the_future_changes_no_bit_of_the_past(dtype, t, window):
    near_far.check_past(run, dtype, t, window)


@forms
@dtypes
def test_with_a_window_masks_company_and_other_sequences_change_no_bit(causal, dtype):
    for masked in ("holes", "left", "row"):
        near_far.check_masked(run, causal, masked, dtype)
    near_far.check_company(run, causal, dtype)
    near_far.check_packed_alone(run, causal, dtype)
    near_far.check_rows_that_see_nothing(run, causal, dtype)


@forms
@dtypes
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("row", [0, 40, 134])
def test_with_a_window_nan_shows_in_exactly_the_rows_that_see_it(causal, name, row, dtype):
    near_far.check_nan_in_key(run, causal, name, row, dtype)


SIZES = [
    "narrow, 256 features",
    "wide, two blocks of features",
    "of 256, two blocks of features",
    "packed, with empty sequences",
]


@pytest.mark.parametrize(("causal", "name", "dtype"), [p for p in PARAMETERS if p[1] in SIZES])
def test_fifty_runs_give_the_same_bits(causal, name, dtype):
    case = all_cases(causal)[name]
    x, incoming = make(case, dtype), cotangents(case, dtype)

    def once():
        results = forward(x, causal, run, **case.options)
        gradients = backward(x, incoming, causal, run, **case.options)
        return {**results, **{f"gradient of {n}": g for n, g in gradients.items()}}

    first = once()
    for _ in range(49):
        for output, result in once().items():
            assert_same_bits(result, first[output], what=output)


@forms
@dtypes
def test_a_batch_row_has_the_bits_it_has_alone(causal, dtype):
    check_batch_row_alone(
        run, all_cases(causal)["an initial state for each, 500 rows"], causal, dtype
    )


@dtypes
@pytest.mark.parametrize("poison", POISONS)
def test_the_future_changes_no_bit_of_the_past(dtype, poison):
    case = GPU_CASES["narrow, 128 features, entry std 3"]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    check_past(run, x, dtype, [(70, poison)], incoming=incoming)


@dtypes
def test_sub_chunks_are_cut_without_looking_ahead(dtype):
    case = Case(batch=1, rows=135, heads=2, groups=1, features=40, bias="1GS")
    x = jumps(case, dtype)
    check_jumps(run, case, dtype)
    check_past(run, x, dtype, [(61, "NaN"), (91, "growing"), (96, "noise"), (110, "growing")])
    check_prefix_alone(run, x, [61, 96, 101])


@dtypes
def test_long_sequences_are_split_and_merged(dtype):
    case = GPU_CASES["packed, splits of some sequences"]
    x = make(case, dtype)
    for causal in (False, True):
        results = forward(x, causal, run, packed=True)
        exact = expected(x, causal, packed=True)
        rms = tolerances(dtype, causal=causal).rms
        assert_close(results["out"], exact["out"], rms=rms)


def test_memory_that_is_not_there_is_an_error_and_the_next_call_works():
    from performer import _core
    from performer.bench.implementations import torch_kernels

    case = GPU_CASES["two splits, the first one ends in masked keys"]
    x = make(case, "bfloat16")
    with pytest.raises(MemoryError, match="out of GPU memory"):
        _core.run_on_gpu(
            "Summarize",
            {
                name: (256, x[name].shape, str(x[name].dtype))
                for name in ("key", "value", "key_projection", "key_bias", "offsets")
            },
            lambda shape, dtype: (None, 256),
            lambda size: 0,
            stream=0,
        )
    assert torch_kernels.missing() == ""
    assert np.isfinite(forward(x, True, run)["log_mass"]).all()
