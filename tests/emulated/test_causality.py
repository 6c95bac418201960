"""The causal CUDA kernel, emulated: the future cannot change one bit of the past."""

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits
from support.core_calls import Case, expected, make
from support.emulated_calls import dtypes, run
from support.emulated_cases import SPLIT
from support.poison import POISONS, poisoned

PLAIN = Case(batch=1, rows=135, heads=2, groups=1, dim=16, features=40, value_dim=5, bias="1GS")
WIDE = Case(batch=1, rows=70, heads=1, groups=1, dim=72, features=136, value_dim=72, bias="11S")


def assert_past_unchanged(case, dtype, poison, t, before=None, x=None, **options):
    x = make(case, dtype) if x is None else x
    before = run("Causal", x, **options) if before is None else before
    after = run("Causal", poisoned(x, poison, t, dtype), seed=t, **options)
    assert_same_bits(after["out"][:, :t], before["out"][:, :t], what=f"{poison} from {t} on")
    assert np.isfinite(after["out"][:, :t].astype(np.float32)).all()
    return before, after


@dtypes
@pytest.mark.parametrize("t", [1, 15, 63, 64, 65, 100, 134])
def test_what_comes_at_t_and_after_changes_no_earlier_bit(dtype, t):
    before = None
    for poison in POISONS:
        before, _ = assert_past_unchanged(PLAIN, dtype, poison, t, before)


@dtypes
@pytest.mark.parametrize("attributes", [{"feature_map": "relu"}, {"feature_map": "elu"}])
def test_other_feature_maps_are_causal_too(dtype, attributes):
    for poison in ("NaN", "huge", "growing"):
        assert_past_unchanged(PLAIN, dtype, poison, 40, **attributes)


@dtypes
def test_wide_heads_and_groups_of_features_are_causal_too(dtype):
    before = None
    for poison in ("NaN", "inf", "growing"):
        before, _ = assert_past_unchanged(WIDE, dtype, poison, 37, before)


def jumps(dtype):
    """Keys that grow by 40 nats now and then, and fall back: sub-chunks are cut there."""
    x = make(PLAIN, dtype)
    rng = np.random.default_rng(4)
    x["key_bias"][:] = np.where(rng.random(x["key_bias"].shape) < 0.06, 40.0, 0.0)
    x["key_bias"][..., 60:] += 45.0
    x["key_bias"][..., 90:95] = -np.inf
    x["key_bias"][..., 100:] = np.arange(x["key_bias"].shape[-1] - 100) * 33.0
    return x


@dtypes
def test_keys_that_outgrow_the_past_are_cut_and_right(dtype):
    x, bound = jumps(dtype), tolerances(dtype, causal=True)
    results = run("Causal", x)
    for name, exact in expected(x, True).items():
        worst = bound.worst if name == "out" else None
        assert_close(results[name], exact, rms=bound.rms, worst=worst, what=name)


@dtypes
def test_sub_chunks_are_cut_without_looking_ahead(dtype):
    x, before = jumps(dtype), None
    for t, poison in ((61, "NaN"), (91, "growing"), (96, "noise"), (101, "NaN"), (110, "growing")):
        before, _ = assert_past_unchanged(PLAIN, dtype, poison, t, before, x)
        cut = {name: a[:, :t] if a.ndim == 4 and a.shape[1] == 135 else a for name, a in x.items()}
        cut["key_bias"] = x["key_bias"][..., :t]
        assert_same_bits(run("Causal", cut)["out"], before["out"][:, :t], what="prefix")


@dtypes
@pytest.mark.parametrize("masked", [range(5), range(30, 66), range(134)])
def test_chunks_that_start_with_masked_keys_are_causal(dtype, masked):
    x = make(PLAIN, dtype)
    x["key_bias"][..., list(masked)] = -np.inf
    for name in ("key", "value"):
        x[name][:, list(masked)] = np.nan
    before = None
    for t, poison in ((3, "NaN"), (33, "growing"), (64, "NaN"), (67, "growing")):
        before, _ = assert_past_unchanged(PLAIN, dtype, poison, t, before, x)


@dtypes
def test_a_nan_in_a_query_row_stays_in_that_row(dtype):
    x = make(PLAIN, dtype)
    before = run("Causal", x)
    x["query"][0, 50, 1] = np.nan
    after = run("Causal", x)
    assert np.isnan(after["out"][0, 50, 1].astype(np.float32)).all()
    after["out"][0, 50, 1] = before["out"][0, 50, 1]
    for name in before:
        assert_same_bits(after[name], before[name], what=name)


@dtypes
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_nan_in_a_key_shows_from_its_row_on_in_its_group(dtype, name):
    case = Case(batch=1, rows=135, heads=4, groups=2, dim=16, features=10, value_dim=5)
    x = make(case, dtype)
    x[name][0, 50, 1] = np.nan
    shows = np.zeros((1, 135, 4, 5), bool)
    shows[:, 50:, 2:] = True
    results = run("Causal", x)
    assert np.array_equal(np.isnan(results["out"].astype(np.float32)), shows)
    assert np.isnan(results["mean"][0, 1]).all()
    assert np.isfinite(results["mean"][0, 0]).all()


@dtypes
def test_a_later_split_changes_no_bit_of_an_earlier_one(dtype):
    case = Case(batch=1, rows=SPLIT + 36, heads=1, groups=1, dim=16, value_dim=8, features=10)
    x = make(case, dtype)
    before, after = assert_past_unchanged(case, dtype, "NaN", SPLIT + 6, x=x)
    assert np.isnan(after["out"][:, SPLIT + 6 :].astype(np.float32)).all()
    early = poisoned(x, "NaN", SPLIT - 24, dtype, ["value"])
    assert np.isnan(run("Causal", early)["out"][:, SPLIT - 24 :].astype(np.float32)).all()
    assert before["out"].shape == after["out"].shape


def test_features_that_nobody_has_seen_weigh_nothing():
    """Some features have mass from the start, others from their first key on."""
    x = make(Case(batch=1, rows=70, heads=1, groups=1, features=32, bias="11S", state=1))
    x["initial_log_mass"][..., ::2] = -np.inf
    x["initial_mean"][:, :, ::2] = np.nan
    x["initial_log_mass"][..., 1::2] -= 200
    x["key_bias"][..., :40] = -np.inf
    exact = {**x, "initial_mean": np.nan_to_num(x["initial_mean"])}
    wanted = expected(exact, True)
    for name, result in run("Causal", x).items():
        assert_close(result, wanted[name], rms=6e-5, what=name)
