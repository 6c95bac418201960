"""The causal CUDA kernels, emulated: the future cannot change one bit of the past."""

import zlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from support import emulated_calls
from support.cases import ONE_HEAD
from support.causality import (
    POISONED,
    POISONS,
    check_jumps,
    check_nan_in_key,
    check_nan_in_query,
    check_packed_apart,
    check_past,
    check_prefix_alone,
    jumps,
    with_masked,
)
from support.compare import assert_close
from support.core_calls import expected
from support.emulated_calls import SPLIT, dtypes
from support.inputs import Case, cotangents, make
from support.promises import check_results

PLAIN = Case(batch=1, rows=135, heads=2, groups=1, features=40, bias="1GS")
WIDE = replace(ONE_HEAD, rows=70, dim=72, features=136, value_dim=72, bias="11S")
GROUPED = replace(PLAIN, heads=4, groups=2, features=10)
SPLITS = replace(ONE_HEAD, rows=SPLIT + 36, value_dim=8)


def run(op, x, **options):
    """Runs an operator; other inputs run under another schedule."""
    inputs = b"".join(x[name].tobytes() for name in POISONED)
    return emulated_calls.run(op, x, seed=zlib.crc32(inputs), **options)


@dtypes
@pytest.mark.parametrize("t", [1, 15, 63, 64, 65, 100, 134])
def test_what_comes_at_t_and_after_changes_no_earlier_bit(dtype, t):
    check_past(run, make(PLAIN, dtype), dtype, product([t], POISONS))


@dtypes
@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=["narrow", "wide"])
def test_nor_a_bit_of_an_earlier_gradient_of_a_query(dtype, case):
    x, incoming = make(case, dtype), cotangents(case, dtype)
    check_past(run, x, dtype, [(37, "NaN"), (64, "growing")], incoming=incoming)


@dtypes
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_other_feature_maps_are_causal_too(dtype, feature_map):
    futures = product([40], ("NaN", "huge", "growing"))
    check_past(run, make(PLAIN, dtype), dtype, futures, feature_map=feature_map)


@dtypes
def test_wide_heads_and_blocks_of_features_are_causal_too(dtype):
    check_past(run, make(WIDE, dtype), dtype, product([37], ("NaN", "inf", "growing")))


@dtypes
def test_keys_that_outgrow_the_past_are_cut_and_right(dtype):
    check_jumps(run, PLAIN, dtype)


@dtypes
def test_sub_chunks_are_cut_without_looking_ahead(dtype):
    x = jumps(PLAIN, dtype)
    futures = [(61, "NaN"), (91, "growing"), (96, "noise"), (101, "NaN"), (110, "growing")]
    check_past(run, x, dtype, futures)
    check_prefix_alone(run, x, [t for t, _ in futures])


@dtypes
@pytest.mark.parametrize("masked", [range(5), range(30, 66), range(134)])
def test_chunks_that_start_with_masked_keys_are_causal(dtype, masked):
    x = with_masked(make(PLAIN, dtype), masked)
    check_past(run, x, dtype, [(3, "NaN"), (33, "growing"), (64, "NaN"), (67, "growing")])


@dtypes
def test_a_nan_in_a_query_row_stays_in_that_row(dtype):
    check_nan_in_query(run, PLAIN, dtype, gradients=False)


@dtypes
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_nan_in_a_key_shows_from_its_row_on_in_its_group(dtype, name):
    check_nan_in_key(run, GROUPED, dtype, name)


@dtypes
def test_packed_sequences_do_not_touch_each_other(dtype):
    check_packed_apart(run, GROUPED, dtype, gradients=False)


@dtypes
def test_a_later_split_changes_no_bit_of_an_earlier_one(dtype):
    check_results(run, SPLITS, True, dtype)
    check_past(run, make(SPLITS, dtype), dtype, product((SPLIT - 24, SPLIT, SPLIT + 6), POISONS))


@dtypes
@pytest.mark.parametrize("row", [SPLIT - 24, SPLIT, SPLIT + 6])
def test_a_nan_in_a_value_shows_in_its_split_and_the_next_from_its_row_on(dtype, row):
    x = make(SPLITS, dtype)
    x["value"][:, row] = np.nan
    out = run("Causal", x)["out"].astype(np.float32)
    shows = np.arange(SPLITS.rows)[None, :, None, None] >= row
    assert np.array_equal(np.isnan(out), np.broadcast_to(shows, out.shape))


def test_features_that_nobody_has_seen_weigh_nothing():
    """Some features have mass from the start, others from their first key on."""
    x = make(replace(ONE_HEAD, rows=70, features=32, bias="11S", state=1))
    x["initial_log_mass"][..., ::2] = -np.inf
    x["initial_mean"][:, :, ::2] = np.nan
    x["initial_log_mass"][..., 1::2] -= 200
    x["key_bias"][..., :40] = -np.inf
    exact = {**x, "initial_mean": np.nan_to_num(x["initial_mean"])}
    wanted = expected(exact, True)
    for name, result in run("Causal", x).items():
        assert_close(result, wanted[name], rms=6e-5, what=name)
