"""Causal attention of the compiled core: the future cannot change one bit of the past."""

from functools import partial
from itertools import product

import pytest

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
from support.core_calls import isas, run
from support.inputs import Case, cotangents, make

PLAIN = Case(batch=1, rows=135, heads=4, groups=2, bias="1GS")


@isas
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("t", [1, 2, 31, 32, 33, 47, 48, 49, 70, 96, 134])
def test_what_comes_at_t_and_after_changes_no_earlier_bit(isa, t, poison):
    futures, incoming = [(t, poison)], cotangents(PLAIN)
    check_past(partial(run, isa=isa), make(PLAIN), "float32", futures, incoming=incoming)


@isas
@pytest.mark.parametrize("only", POISONED)
def test_one_poisoned_argument_changes_no_earlier_bit(isa, only):
    futures, incoming = product([45], POISONS), cotangents(PLAIN)
    check_past(
        partial(run, isa=isa), make(PLAIN), "float32", futures, incoming=incoming, only=[only]
    )


@isas
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("feature_map", ["softmax", "relu", "elu"])
def test_other_types_and_feature_maps_are_causal_too(isa, dtype, feature_map):
    x, incoming = make(PLAIN, dtype), cotangents(PLAIN, dtype)
    futures = product((5, 40, 64), ("NaN", "huge", "growing"))
    options = {"incoming": incoming, "feature_map": feature_map}
    check_past(partial(run, isa=isa), x, dtype, futures, **options)


@isas
@pytest.mark.parametrize("masked", [range(5), range(32, 40), range(30, 66), range(134)])
def test_chunks_that_start_with_masked_keys_are_causal(isa, masked):
    x, incoming = with_masked(make(PLAIN), masked), cotangents(PLAIN)
    futures = product((3, 33, 38, 64, 67), ("NaN", "huge", "growing"))
    check_past(partial(run, isa=isa), x, "float32", futures, incoming=incoming)


@isas
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keys_that_outgrow_the_past_are_cut_and_right(isa, dtype):
    check_jumps(partial(run, isa=isa), PLAIN, dtype)


@isas
@pytest.mark.parametrize("t", range(90, 112, 3))
def test_sub_chunks_are_cut_without_looking_ahead(isa, t):
    x, incoming = jumps(PLAIN, "float32"), cotangents(PLAIN)
    futures = product([t], ("noise", "NaN", "growing"))
    check_past(partial(run, isa=isa), x, "float32", futures, incoming=incoming)
    check_prefix_alone(partial(run, isa=isa), x, [t])


@isas
def test_a_nan_in_a_query_row_stays_in_that_row(isa):
    check_nan_in_query(partial(run, isa=isa), PLAIN, "float32", gradients=True)


@isas
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_nan_in_a_key_shows_from_its_row_on_in_its_group(isa, name):
    check_nan_in_key(partial(run, isa=isa), PLAIN, "float32", name)


@isas
def test_packed_sequences_do_not_touch_each_other(isa):
    check_packed_apart(partial(run, isa=isa), PLAIN, "float32", gradients=True)
