"""Causal attention of the compiled core: the future cannot change one bit of the past."""

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits
from support.core_calls import Case, cotangents, expected, isas, make, run
from support.poison import POISONS, poisoned

PLAIN = Case(batch=1, rows=135, heads=4, groups=2, dim=16, features=10, value_dim=5, bias="1GS")
MAPS = [{}, {"feature_map": "relu"}, {"feature_map": "elu"}]


def with_query_gradient(x, incoming, **options):
    results = run("Causal", x, **options)
    grads = run("CausalGrad", {**x, **results, **incoming}, **options)
    return {"out": results["out"], "grad_query": grads["grad_query"]}


def assert_past_unchanged(x, changed, incoming, t, what, **options):
    before = with_query_gradient(x, incoming, **options)
    after = with_query_gradient(changed, incoming, **options)
    for name in before:
        assert_same_bits(after[name][:, :t], before[name][:, :t], what=f"{name}, {what}")


@isas
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("t", [1, 2, 31, 32, 33, 47, 48, 49, 70, 96, 134])
def test_what_comes_at_t_and_after_changes_no_earlier_bit(isa, t, poison):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    changed = poisoned(x, poison, t, "float32")
    assert_past_unchanged(x, changed, incoming, t, f"{poison} from {t} on", isa=isa)


@isas
@pytest.mark.parametrize("only", ["query", "key", "value", "key_bias"])
def test_one_poisoned_argument_changes_no_earlier_bit(isa, only):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    for poison in POISONS:
        changed = poisoned(x, poison, 45, "float32", [only])
        assert_past_unchanged(x, changed, incoming, 45, f"{poison} in {only}", isa=isa)


@isas
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@pytest.mark.parametrize("attributes", MAPS, ids=["softmax", "relu", "elu"])
def test_other_types_and_feature_maps_are_causal_too(isa, dtype, attributes):
    x, incoming = make(PLAIN, dtype), cotangents(PLAIN, dtype)
    for poison in ("NaN", "huge", "growing"):
        for t in (5, 40, 64):
            changed = poisoned(x, poison, t, dtype)
            assert_past_unchanged(
                x, changed, incoming, t, f"{poison} from {t} on", isa=isa, **attributes
            )


@isas
@pytest.mark.parametrize("masked", [range(5), range(32, 40), range(30, 66), range(134)])
def test_chunks_that_start_with_masked_keys_are_causal(isa, masked):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    x["key_bias"][..., list(masked)] = -np.inf
    for name in ("key", "value"):
        x[name][:, list(masked)] = np.nan
    for t in (3, 33, 38, 64, 67):
        for poison in ("NaN", "huge", "growing"):
            changed = poisoned(x, poison, t, "float32")
            assert_past_unchanged(x, changed, incoming, t, f"{poison} from {t} on", isa=isa)


def jumps(case, dtype="float32"):
    """Inputs whose keys grow by 40 nats now and then, and fall back: sub-chunks are cut there."""
    x = make(case, dtype)
    rng = np.random.default_rng(4)
    x["key_bias"][:] = np.where(rng.random(x["key_bias"].shape) < 0.06, 40.0, 0.0)
    x["key_bias"][..., 60:] += 45.0
    x["key_bias"][..., 90:95] = -np.inf
    x["key_bias"][..., 100:] = np.arange(x["key_bias"].shape[-1] - 100) * 33.0
    return x


@isas
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_keys_that_outgrow_the_past_are_cut_and_right(isa, dtype):
    x = jumps(PLAIN, dtype)
    results = run("Causal", x, isa=isa)
    bound = tolerances(dtype, causal=True)
    for name, exact in expected(x, True).items():
        worst = bound.worst if name == "out" else None
        assert_close(results[name], exact, rms=bound.rms, worst=worst, what=name)


@isas
@pytest.mark.parametrize("t", range(90, 112, 3))
def test_sub_chunks_are_cut_without_looking_ahead(isa, t):
    x, incoming = jumps(PLAIN), cotangents(PLAIN)
    for poison in ("noise", "NaN", "growing"):
        changed = poisoned(x, poison, t, "float32")
        assert_past_unchanged(x, changed, incoming, t, f"{poison} from {t} on", isa=isa)
    cut = {name: a[:, :t] if a.ndim == 4 and a.shape[1] == 135 else a for name, a in x.items()}
    cut["key_bias"] = x["key_bias"][..., :t]
    assert_same_bits(
        run("Causal", cut, isa=isa)["out"], run("Causal", x, isa=isa)["out"][:, :t], what="prefix"
    )


@isas
def test_a_nan_in_a_query_row_stays_in_that_row(isa):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    before = run("Causal", x, isa=isa)
    x["query"][0, 50, 1] = np.nan
    after = run("Causal", x, isa=isa)
    assert np.isnan(after["out"][0, 50, 1]).all()
    after["out"][0, 50, 1] = before["out"][0, 50, 1]
    for name in before:
        assert_same_bits(after[name], before[name], what=name)
    grads = run("CausalGrad", {**x, **after, **incoming}, isa=isa)
    others = np.delete(grads["grad_query"][0], 50, 0)
    assert np.isfinite(others).all()


@isas
def test_a_nan_in_a_key_shows_from_its_row_on_in_its_group(isa):
    for name in ("key", "value"):
        x = make(PLAIN)
        x[name][0, 50, 1] = np.nan
        shows = np.zeros((1, 135, 4, 5), bool)
        shows[:, 50:, 2:] = True
        assert np.array_equal(np.isnan(run("Causal", x, isa=isa)["out"]), shows), name


@isas
def test_packed_sequences_do_not_touch_each_other(isa):
    offsets = np.array([0, 40, 40, 90, 135])
    x, incoming = {**make(PLAIN), "offsets": offsets}, cotangents(PLAIN)
    for name in ("grad_log_mass", "grad_mean"):
        incoming[name] = np.repeat(incoming[name], 4, 0)
    before = with_query_gradient(x, incoming, isa=isa, packed=True)
    changed = {name: a.copy() for name, a in x.items()}
    changed["key"][:, 40:90], changed["query"][:, 40:90] = np.nan, np.inf
    after = with_query_gradient(changed, incoming, isa=isa, packed=True)
    for name in before:
        for rows in (slice(0, 40), slice(90, 135)):
            assert_same_bits(after[name][:, rows], before[name][:, rows], what=name)
