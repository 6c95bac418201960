"""What the compiled core must satisfy whatever the inputs: deletion, streams, bounds, zeros."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from performer import reference
from support.compare import assert_close, assert_finite, assert_same_bits
from support.core_calls import backward, expected, forward, isas, run
from support.inputs import Case, cotangents, forms, make

PLAIN = Case(batch=1, rows=130, heads=4, groups=2, dim=16, features=24, value_dim=5, bias="1GS")
ROWS = ("query", "key", "value")


def part(x, rows):
    """The inputs cut to some rows."""
    cut = {name: a[:, rows] if name in ROWS else a for name, a in x.items()}
    if x["key_bias"].shape[-1] > 1:
        cut["key_bias"] = x["key_bias"][..., rows]
    return cut


@isas
@pytest.mark.parametrize("rows", [1, 40])
def test_the_mean_of_a_feature_that_saw_nothing_may_hold_anything(rows, isa):
    x = make(replace(PLAIN, rows=rows, bias="111", state=1))
    x["initial_log_mass"][..., ::2] = -np.inf
    x["initial_mean"][..., ::2, :] = 0
    wanted = forward(x, causal=True, isa=isa)
    x["initial_mean"][..., ::2, :] = np.nan
    for name, result in forward(x, causal=True, isa=isa).items():
        assert_same_bits(result, wanted[name], what=name)


@isas
@forms
@pytest.mark.parametrize("attributes", [{}, {"feature_map": "relu"}, {"feature_map": "elu"}])
def test_a_masked_key_is_a_deleted_key(causal, isa, attributes):
    case = replace(PLAIN, bias="11S")
    x, incoming = make(case), cotangents(case)
    kept = np.sort(np.random.default_rng(0).choice(130, 70, replace=False))
    gone = np.setdiff1d(np.arange(130), kept)
    masked = {name: a.copy() for name, a in x.items()}
    masked["key_bias"][..., gone] = -np.inf
    masked["key"][:, gone], masked["value"][:, gone] = np.inf, np.nan
    incoming["grad_out"][:, gone] = 0
    results = forward(masked, causal, isa=isa, **attributes)
    wanted = forward(part(x, kept), causal, isa=isa, **attributes)
    assert_close(results["out"][:, kept], wanted["out"], worst=5e-6, what="out")
    for name in ("log_mass", "mean"):
        assert_close(results[name], wanted[name], worst=5e-6, what=name)
    grads = backward(masked, incoming, causal, isa=isa, **attributes)
    incoming["grad_out"] = incoming["grad_out"][:, kept]
    wanted = backward(part(x, kept), incoming, causal, isa=isa, **attributes)
    for name in ROWS:
        assert_close(grads[name][:, kept], wanted[name], rms=6e-5, what=name)
    for name in ("query_projection", "key_projection", "feature_bias"):
        assert_close(grads[name], wanted[name], rms=6e-5, what=name)


@isas
def test_a_duplicated_key_is_a_key_of_twice_the_weight(isa):
    x = make(replace(PLAIN, bias="11S"))
    twice = part(x, np.repeat(np.arange(130), 2))
    x["key_bias"] += np.float32(np.log(2))
    for name, result in run("Summarize", x, isa=isa).items():
        assert_close(run("Summarize", twice, isa=isa)[name], result, worst=5e-6, what=name)


@isas
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_stream_of_ragged_steps_is_the_whole(isa, dtype):
    x = make(replace(PLAIN, masked="left", state=1), dtype)
    whole = run("Causal", x, isa=isa)
    out, state = [], {name: x[name] for name in ("initial_log_mass", "initial_mean")}
    cuts = [0, 1, 2, 2, 5, 37, 38, 70, 130]
    for begin, end in pairwise(cuts):
        step = run("Causal", {**part(x, slice(begin, end)), **state}, isa=isa)
        out.append(step["out"])
        state = {f"initial_{name}": step[name] for name in ("log_mass", "mean")}
    worst = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.02}[dtype]
    assert_close(np.concatenate(out, 1), whole["out"], worst=worst, what="out")
    # Products of bfloat16 round the features, which weigh the values of a mean.
    assert_close(state["initial_mean"], whole["mean"], worst=worst, what="mean")
    worst = 1e-12 if dtype == "float64" else 1e-5
    assert_close(state["initial_log_mass"], whole["log_mass"], worst=worst, what="log_mass")


@isas
def test_steps_at_chunk_boundaries_join_gradients_too(isa):
    """The gradient of a stream in two parts, chained by hand through the state, is that of all."""
    case = replace(PLAIN, masked="left", state=1)
    x, incoming = make(case, "float64"), cotangents(case, "float64")
    whole = backward(x, incoming, causal=True, isa=isa)
    first, second = part(x, slice(0, 75)), part(x, slice(75, 130))
    middle = run("Causal", first, isa=isa)
    second |= {f"initial_{name}": middle[name] for name in ("log_mass", "mean")}
    late = backward(
        second, {**incoming, "grad_out": incoming["grad_out"][:, 75:]}, causal=True, isa=isa
    )
    chained = {f"grad_{name}": late[f"initial_{name}"] for name in ("log_mass", "mean")}
    early = backward(
        first, {**chained, "grad_out": incoming["grad_out"][:, :75]}, causal=True, isa=isa
    )
    for name in ROWS:
        joined = np.concatenate([early[name], late[name]], 1)
        assert_close(joined, whole[name], relative=1e-10, what=name)
    for name in ("initial_log_mass", "initial_mean"):
        assert_close(early[name], whole[name], relative=1e-10, what=name)


@isas
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 95, 130])
def test_the_last_causal_row_is_the_bidirectional_one_of_its_prefix(isa, length):
    x = part(make(PLAIN), slice(0, length))
    causal, both = forward(x, True, isa=isa), forward(x, False, isa=isa)
    assert_close(causal["out"][:, -1], both["out"][:, -1], worst=5e-6, what="out")
    for name in ("log_mass", "mean"):
        assert_close(causal[name], both[name], worst=5e-6, what=name)


@isas
@forms
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 0), ("float16", 0)])
def test_a_constant_value_comes_back(causal, isa, dtype, bound):
    x = make(replace(PLAIN, rows=1000, masked="left", bias="B1S", std=2.0), dtype)
    x["value"][...] = 1.25
    out = forward(x, causal, isa=isa)["out"].astype(np.float64)
    sees = np.zeros_like(out) if causal else np.full_like(out, 1.25)
    sees[:, 5:] = 1.25  # left padding: 5 rows
    assert np.abs(out - sees).max() <= bound * 1.25


@isas
@forms
def test_outputs_lie_between_the_smallest_and_the_largest_value(causal, isa):
    x = make(replace(PLAIN, rows=700, std=4.0))
    out = forward(x, causal, isa=isa)["out"]
    low, high = x["value"].min((0, 1, 2)), x["value"].max((0, 1, 2))
    assert np.all(out >= low - 1e-6 * np.abs(low))
    assert np.all(out <= high + 1e-6 * np.abs(high))


@isas
@forms
@pytest.mark.parametrize("same", ["keys", "projection"])
def test_without_anything_to_tell_keys_apart_the_mean_of_the_values_comes_back(causal, isa, same):
    x = make(replace(PLAIN, bias="111"))
    if same == "keys":
        x["key"][:] = x["key"][:, :1]
    else:
        x["key_projection"][:], x["query_projection"][:] = 0, 0
    options = {"key_norm": same == "keys"}
    mean = x["value"].astype(np.float64)
    mean = (
        np.cumsum(mean, 1) / np.arange(1, 131)[:, None, None] if causal else mean.mean(1)[:, None]
    )
    out = forward(x, causal, isa=isa, **options)["out"]
    assert_close(out, np.broadcast_to(np.repeat(mean, 2, 2), out.shape), worst=1e-6)


@isas
@forms
@pytest.mark.parametrize("size", [1e4, 3e2])
@pytest.mark.parametrize("attributes", [{}, {"feature_map": "relu"}, {"feature_map": "elu"}])
def test_huge_entries_stay_finite(causal, isa, size, attributes):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    for name in ("query", "key"):
        x[name] = np.clip(x[name] * size, -size, size).astype(np.float32)
    results = forward(x, causal, isa=isa, **attributes)
    for name, result in results.items():
        assert_finite(result, what=name)
    low, high = x["value"].min(), x["value"].max()
    assert results["out"].min() >= low - 1e-5
    assert results["out"].max() <= high + 1e-5
    for name, grad in backward(x, incoming, causal, isa=isa, **attributes).items():
        assert_finite(grad, what=f"gradient of {name}")


@isas
def test_the_largest_values_stay_finite(isa):
    for causal, size in ((False, 1e30), (True, 1e10)):
        x = make(PLAIN)
        x["value"] *= np.float32(size)
        out = forward(x, causal, isa=isa)["out"]
        exact = expected(x, causal)["out"]
        assert_close(out / size, exact / size, worst=2e-5)


@isas
@pytest.mark.parametrize("rises", ["at once", "in the middle of a chunk"])
def test_sums_of_large_values_do_not_grow_with_the_length(isa, rises):
    """Keys just below a cut weigh e^29 times the reference: 1500 such values of 1e23 have a sum
    beyond float32, those of one chunk do not."""
    x = make(Case(batch=1, rows=1500, dim=4, features=2, value_dim=3, bias="11S", std=0.1))
    x["value"][:] = 1e23 * (1 + np.abs(x["value"]) / 8)
    x["key_bias"][:] = 29
    x["key_bias"][..., : 1 if rises == "at once" else 100] = 0
    results = forward(x, True, isa=isa)
    exact = expected(x, True)
    for name, size in (("out", 1e23), ("mean", 1e23), ("log_mass", 1)):
        assert_close(results[name] / size, exact[name] / size, worst=1e-5, what=name)


@isas
@forms
def test_the_largest_and_smallest_halves_are_read_right(causal, isa):
    case = replace(PLAIN, batch=1, rows=40, bias="111")
    x = make(case, "float16")
    x["value"][:] = np.where(np.arange(5) % 2, 65504, -65504)
    assert_same_bits(forward(x, causal, isa=isa)["out"], np.repeat(x["value"], 2, 2))
    x["value"][:] = 2.0**-24 * np.arange(1, 6)  # denormals
    assert_same_bits(forward(x, causal, isa=isa)["out"], np.repeat(x["value"], 2, 2))
    x["query"][:] = 65504
    assert_finite(forward(x, causal, isa=isa)["out"])


@isas
@forms
def test_denormal_values_keep_their_precision(causal, isa):
    x = make(PLAIN)
    x["value"] *= np.float32(1e-40)
    x["query"][:, ::2] *= np.float32(1e-40)
    assert_close(forward(x, causal, isa=isa)["out"], expected(x, causal)["out"], worst=1e-43)


@isas
def test_softmax_features_ignore_a_shift_of_all_keys_by_bias(isa):
    x = make(PLAIN)
    for causal in (False, True):
        still = forward(x, causal, isa=isa)
        moved = forward({**x, "key_bias": x["key_bias"] + 7}, causal, isa=isa)
        assert_close(moved["out"], still["out"], worst=1e-5, what="out")
        assert_close(moved["log_mass"], still["log_mass"] + 7, worst=1e-5, what="log_mass")


@isas
@forms
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_rows_that_see_nothing_are_exactly_zero(causal, isa, dtype):
    case = Case(rows=70, bias="B1S", masked="row", heads=2, groups=1)
    x = make(case, dtype)
    x["key_bias"][0, 0, :40] = -np.inf
    x["key"][0, :40], x["value"][0, :40] = np.nan, np.inf
    results = forward(x, causal, isa=isa)
    fully_masked = np.zeros_like(results["out"], bool)
    fully_masked[1] = True
    fully_masked[0, :40] = causal
    assert np.array_equal(results["out"] == 0, fully_masked)
    assert np.isneginf(results["log_mass"][1]).all()
    assert not results["mean"][1].any()


@isas
def test_merged_halves_read_as_the_whole(isa):
    x = make(PLAIN)
    halves = [run("Summarize", part(x, rows), isa=isa) for rows in (slice(0, 47), slice(47, 130))]
    whole = run("Summarize", x, isa=isa)
    for g in range(2):
        states = [
            (h["log_mass"][0, g].astype(float), h["mean"][0, g].astype(float)) for h in halves
        ]
        log_mass, mean = reference.merge(*states)
        assert_close(whole["log_mass"][0, g], log_mass, worst=2e-6, what="log_mass")
        assert_close(whole["mean"][0, g], mean, worst=2e-6, what="mean")
