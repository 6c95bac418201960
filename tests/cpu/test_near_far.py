"""Near-and-far attention of the compiled core: results, gradients, what changes no bit."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support import near_far
from support.compare import assert_close, assert_same_bits
from support.core_calls import isas, run
from support.inputs import Case, forms, make
from support.near_far import (
    CASES,
    INPUTS,
    NARROW,
    ONE_HEAD,
    OPTIONS,
    OUTPUTS,
    PLAIN,
    STREAMED,
    check_gradients,
    check_gradients_of_rows_that_see_nothing,
    check_gradients_of_values_with_a_mean,
    check_masked,
    check_masked_gradients,
    check_nan_in_key,
    check_results,
    check_rows_that_see_nothing,
    check_state_without_keys,
    check_stream,
    given,
    plain,
)

PARAMETERS = [
    (causal, name, dtype)
    for causal in (False, True)
    for name in {**CASES, **(STREAMED if causal else {})}
    for dtype in ["float32", "float64", *(["bfloat16", "float16"] if name in NARROW else [])]
]
cases = pytest.mark.parametrize(("causal", "name", "dtype"), PARAMETERS)


def gradients(x, results, incoming, **options):
    return near_far.gradients(run, x, results, incoming, **options)


@isas
@cases
def test_results_are_those_of_the_reference(causal, name, dtype, isa):
    check_results(partial(run, isa=isa), name, causal, dtype)


@isas
@cases
def test_gradients_are_those_of_the_reference(causal, name, dtype, isa):
    check_gradients(partial(run, isa=isa), name, causal, dtype)


@forms
def test_gradients_are_finite_differences_of_the_core_itself(causal):
    """<gradient, direction> against the core's own results, one direction for each input."""
    x, incoming, options = given(NARROW[0], causal, "float64")
    grads = gradients(x, run("NearFar", x, **options), incoming, **options)
    rng = np.random.default_rng(3)

    def loss(inputs):
        results = run("NearFar", inputs, **options)
        seen = np.where(np.isneginf(results["log_weight"]), 0, results["log_weight"])
        results["log_weight"] = seen
        return sum(np.sum(results[name] * incoming[f"grad_{name}"]) for name in OUTPUTS)

    for name, grad in grads.items():
        direction = rng.normal(size=x[name].shape)
        direction[~np.isfinite(x[name])] = 0
        ends = []
        for step in (1e-6, -1e-6):
            moved = np.where(direction == 0, x[name], x[name] + step * direction)
            ends.append(loss({**x, name: moved}))
        numeric = (ends[0] - ends[1]) / 2e-6
        assert abs(np.sum(grad * direction) - numeric) <= 1e-6 * max(1, abs(numeric)), name


@isas
@forms
def test_a_window_that_holds_all_keys_is_exact_attention(causal, isa):
    x, _, options = given("blocks of 64, entry std 2", causal, "float64")
    out = run("NearFar", x, isa=isa, **{**options, "exact_window": 1000})["out"][0, :, 0]
    q, k, v = (x[name][0, :, 0] for name in ("query", "key", "value"))
    logits = q @ k.T / np.sqrt(q.shape[-1]) + x["key_bias"][0, 0]
    if causal:
        logits[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    assert_close(out, weights / weights.sum(-1, keepdims=True) @ v, relative=1e-12)


@isas
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("t", [1, 10, 11, 27, 64, 70, 134])
def test_what_comes_at_t_and_after_changes_no_earlier_bit(isa, t, poison):
    x, incoming = plain()
    before = run("NearFar", x, isa=isa, **OPTIONS)
    dq = gradients(x, before, incoming, isa=isa, **OPTIONS)["query"]
    for name in ("query", "key", "value"):
        x[name][:, t:] = poison
        incoming["grad_out"][:, t:] = poison
        after = run("NearFar", x, isa=isa, **OPTIONS)
        for output in ("out", "log_weight"):
            assert_same_bits(after[output][:, :t], before[output][:, :t], what=output)
        after_dq = gradients(x, after, incoming, isa=isa, **OPTIONS)["query"]
        assert_same_bits(after_dq[:, :t], dq[:, :t], what="grad_query")


@isas
@forms
@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("row", [0, 40, 134])
def test_nan_in_a_key_shows_in_exactly_the_rows_that_see_it(isa, causal, name, row):
    check_nan_in_key(partial(run, isa=isa), causal, name, row)


@isas
@forms
@pytest.mark.parametrize("masked", ["holes", "left", "row"])
def test_masked_keys_change_no_bit_and_have_gradient_zero(isa, causal, masked):
    check_masked(partial(run, isa=isa), causal, masked)
    check_masked_gradients(partial(run, isa=isa), causal, masked)


@isas
@forms
def test_queries_that_see_nothing_give_and_get_exactly_zero(isa, causal):
    check_rows_that_see_nothing(partial(run, isa=isa), causal)
    check_gradients_of_rows_that_see_nothing(partial(run, isa=isa), causal)


@isas
@forms
@pytest.mark.parametrize("given", [-1e30, 1e30, np.nan])
def test_a_log_weight_that_is_none_of_the_call_changes_no_other_query(isa, causal, given):
    """The gradient takes it as it is: weights may overflow then, in this row alone."""
    (x, incoming), options = plain(), {**OPTIONS, "causal": causal}
    results = run("NearFar", x, isa=isa, **options)
    right = gradients(x, results, incoming, isa=isa, **options)["query"]
    results["log_weight"][0, 40, 1] = given
    wrong = gradients(x, results, incoming, isa=isa, **options)["query"]
    others = np.ones(right.shape[:3], bool)
    others[0, 40, 1] = False
    assert_same_bits(wrong[others], right[others])


@isas
@forms
def test_the_bits_depend_on_neither_threads_nor_company(isa, causal):
    case = replace(PLAIN, batch=3, rows=300, bias="BGS", state=3, query_projections=4)
    options = {"exact_window": 32, "causal": causal, "isa": isa}
    x, incoming = plain(case=case)
    results = run("NearFar", x, **options)
    grads = gradients(x, results, incoming, **options)
    many = run("NearFar", x, threads=7, **options)
    for name, result in {**many, **gradients(x, many, incoming, threads=7, **options)}.items():
        assert_same_bits(result, {**results, **grads}[name], what=name)
    # The last batch row alone, and its second key/value head with its two query heads.
    heads = {"query": 2, "grad_out": 2, "grad_log_weight": 2, "query_projection": 0}
    groups = {"key": 2, "value": 2, "key_bias": 1, "initial_log_mass": 1, "initial_mean": 1}
    groups |= {"grad_log_mass": 1, "grad_mean": 1}

    def alone(name, a):
        if name in ("start", "offsets"):
            return a
        a = a[-1:] if name not in INPUTS[3:6] and len(a) == case.batch else a
        if name in heads and a.shape[heads[name]] == case.heads:
            return np.take(a, [2, 3], heads[name])
        return np.take(a, [1], groups[name]) if name in groups else a

    x, incoming = ({n: alone(n, a) for n, a in given.items()} for given in (x, incoming))
    part = run("NearFar", x, **options)
    grads = {n: grads[n] for n in ("query", "key", "value", "key_bias")}
    mine = {n: g for n, g in gradients(x, part, incoming, **options).items() if n in grads}
    axis = {"out": (2, [2, 3]), "log_weight": (2, [2, 3]), "query": (2, [2, 3])}
    axis |= {"key": (2, [1]), "value": (2, [1])}
    for name, result in {**part, **mine}.items():
        whole = {**results, **grads}[name][-1:]
        at, chosen = axis.get(name, (1, [1]))
        assert_same_bits(result, np.take(whole, chosen, at), what=name)


@isas
def test_a_stream_with_the_rows_of_the_last_blocks_is_the_full_pass(isa):
    check_stream(partial(run, isa=isa), "float64", 1e-12)


@isas
def test_a_stream_does_not_drift(isa):
    """As in test_long_streams.py, in calls of one block."""
    w, tokens = 8, 4096
    rng = np.random.default_rng(0)
    case = replace(ONE_HEAD, rows=tokens, heads=1, groups=1, features=64, value_dim=4)
    x = make(case)
    x["query"] = np.repeat(rng.normal(size=[1, 1, 1, 16]).astype("float32"), tokens, 1)
    x["value"] += 1
    state = {name: x[name] for name in ("initial_log_mass", "initial_mean")}
    for end in range(w, tokens + 1, w):
        part = {name: x[name][:, max(end - 2 * w, 0) : end] for name in ("key", "value")}
        query = x["query"][:, end - w : end]
        options = {"exact_window": w, "causal": True, "isa": isa}
        results = run("NearFar", {**x, **part, **state, "query": query}, **options)
        state = {f"initial_{name}": results[name] for name in ("log_mass", "mean")}
    exact = {n: a if a.dtype == np.int64 else a.astype("float64") for n, a in x.items()}
    whole = run("NearFar", exact, exact_window=w, causal=True)
    np.testing.assert_allclose(state["initial_log_mass"], whole["log_mass"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(results["out"][0, -1], whole["out"][0, -1], rtol=0, atol=2e-6)


@isas
@forms
@pytest.mark.parametrize("rows", [0, 1, 31, 200])
def test_a_state_to_which_no_key_is_added_keeps_its_bits(isa, causal, rows):
    check_state_without_keys(partial(run, isa=isa), causal, rows)


@isas
@forms
@pytest.mark.parametrize("state", [0, 1])
def test_gradients_do_not_drown_in_what_values_have_in_common(isa, causal, state):
    check_gradients_of_values_with_a_mean(partial(run, isa=isa), causal, state, run)


# Far more states of blocks than fit into the workspace of a call with one sequence and head.
LONG = Case(batch=1, rows=1500, heads=2, groups=1, value_dim=16, features=40, bias="BGS", state=1)
LONG_OPTIONS = {"exact_window": 8}


@isas
@forms
@pytest.mark.parametrize("masked", ["", "left", "holes"])
def test_states_that_are_made_again_change_no_bit(isa, causal, masked):
    """A sequence has memory for the states of few blocks when it is alone, for all among others."""
    case = replace(LONG, masked=masked)
    options = {**LONG_OPTIONS, "causal": causal, "isa": isa}
    x, incoming = plain(case=case)
    shared = (*INPUTS[3:6], "start", "offsets")
    company = [
        {n: a if n in shared else np.concatenate([a] * 10) for n, a in y.items()}
        for y in (x, incoming)
    ]
    alone = run("NearFar", x, **options)
    among = run("NearFar", company[0], **options)
    for name, result in alone.items():
        assert_same_bits(among[name][-1:], result, what=name)
    grads = gradients(x, alone, incoming, **options)
    among = gradients(company[0], among, company[1], **options)
    for name in ("query", "key", "value", "key_bias"):
        assert_same_bits(among[name][-1:], grads[name], what=name)
    exact = {n: a if a.dtype == np.int64 else a.astype("f8") for n, a in {**x, **incoming}.items()}
    wanted = run("NearFar", exact, **options)
    bound = tolerances("float32", causal=causal)
    assert_close(alone["out"], wanted["out"], rms=bound.rms, what="out")
    for name, grad in gradients(exact, wanted, exact, **options).items():
        assert_close(grads[name], grad, rms=bound.gradient_rms, what=name)


@isas
@forms
@pytest.mark.parametrize("groups", [1, 2])
def test_threads_that_share_a_sequence_change_no_bit(isa, causal, groups):
    case = replace(LONG, heads=2 * groups, groups=groups, masked="left")
    options = {**LONG_OPTIONS, "causal": causal, "isa": isa}
    x, _ = plain(case=case)
    streamed = {**x, "query": x["query"][:, -700:]} if causal else x
    for inputs in (
        x,
        streamed,
        {**x, "initial_log_mass": np.full_like(x["initial_log_mass"], -np.inf)},
    ):
        once = run("NearFar", inputs, **options)
        for threads in (2, 3, 8):
            again = run("NearFar", inputs, threads=threads, **options)
            for name, result in once.items():
                assert_same_bits(again[name], result, what=f"{name}, {threads} threads")


@isas
def test_threads_that_share_a_sequence_see_no_later_key(isa):
    x, _ = plain(case=LONG)
    options = {**LONG_OPTIONS, "causal": True, "isa": isa}
    once, cut = run("NearFar", x, **options), 801
    for name in ("key", "value", "query"):
        x[name][:, cut:] = np.nan
    for threads in (2, 8):
        out = run("NearFar", x, threads=threads, **options)["out"]
        assert_same_bits(out[:, :cut], once["out"][:, :cut], what=f"out, {threads} threads")
