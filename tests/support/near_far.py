"""Near-and-far attention: its cases, and what every backend promises of a call of NearFar.

`run` runs an operator: `support.core_calls.run`, `support.emulated_calls.run` or
`support.gpu_calls.run`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from performer import reference
from performer.features.tolerances import tolerances
from support import cases
from support.cases import GPU_SPLIT
from support.causality import POISONED, POISONS, poisoned
from support.compare import assert_close, assert_finite, assert_same_bits
from support.inputs import DTYPES, Case, cotangents, make

OUTPUTS = ("out", "log_weight", "log_mass", "mean")
INPUTS = ("query", "key", "value", "query_projection", "key_projection", "feature_bias")
INPUTS += ("key_bias", "initial_log_mass", "initial_mean")
ONE_HEAD = Case(batch=1, heads=1, groups=1)
# (case, position of the first key row, attributes)
CASES = {
    "five blocks": (Case(rows=40), 0, {"exact_window": 8}),
    "a window of one row": (replace(ONE_HEAD, rows=9), 0, {"exact_window": 1}),
    "one block that is not full": (Case(rows=5, bias="B1S"), 3, {"exact_window": 16}),
    "the last block is full": (Case(rows=45, state=1), 3, {"exact_window": 8}),
    "grouped heads, projections for each, a state for each, holes": (
        Case(
            rows=61,
            heads=6,
            query_projections=6,
            key_projections=2,
            feature_biases=6,
            bias="BGS",
            masked="holes",
            state=2,
        ),
        9,
        {"exact_window": 8},
    ),
    "projections for each group, no norms": (
        Case(
            rows=50, heads=4, query_projections=2, key_projections=2, feature_biases=2, bias="1G1"
        ),
        0,
        {"exact_window": 8, "query_norm": False, "key_norm": False, "scale": 0.3},
    ),
    "packed, with empty sequences": (
        replace(cases.CASES["packed, with empty sequences"], key_projections=1, bias="11S"),
        0,
        {"exact_window": 8},
    ),
    "blocks of 64, entry std 2": (
        replace(ONE_HEAD, rows=210, dim=64, value_dim=64, features=72, bias="B1S", std=2.0),
        7,
        {"exact_window": 64},
    ),
    "blocks of 128, chunks of queries": (
        Case(batch=1, rows=330, groups=1, dim=72, value_dim=24, features=20, state=1),
        70,
        {"exact_window": 128},
    ),
    "a window beyond the sequence": (
        Case(rows=100, bias="B1S", masked="left", state=2),
        990,
        {"exact_window": 1000},
    ),
    "many blocks": (replace(ONE_HEAD, rows=95, bias="B1S"), 1, {"exact_window": 3}),
    "all keys of a batch row masked": (
        Case(rows=40, bias="B1S", masked="row"),
        0,
        {"exact_window": 8},
    ),
    "no rows": (Case(rows=0, state=2), 0, {"exact_window": 8}),
    "no value dim": (Case(rows=40, value_dim=0), 0, {"exact_window": 8}),
}
# Causal calls with more keys than queries.
STREAMED = {
    "a token": (Case(rows=23, queries=1, batch=3, state=3, bias="B1S"), 5, {"exact_window": 8}),
    "queries of a part of a block": (Case(rows=43, queries=13), 2, {"exact_window": 8}),
    "a token alone": (Case(rows=1, queries=1), 0, {"exact_window": 8}),
    "a token that ends a block": (
        Case(rows=16, queries=1, bias="BGS", masked="holes", state=1),
        0,
        {"exact_window": 8},
    ),
    "a token, rows that are read in place": (
        Case(
            rows=128,
            queries=1,
            heads=4,
            query_projections=4,
            feature_biases=2,
            bias="B1S",
            masked="left",
            dim=64,
            value_dim=64,
            features=24,
            state=2,
        ),
        69,
        {"exact_window": 64, "query_norm": False, "scale": 0.1},
    ),
    "keys without queries": (Case(rows=43, queries=0, state=1), 2, {"exact_window": 8}),
}
NARROW = (
    "grouped heads, projections for each, a state for each, holes",
    "blocks of 64, entry std 2",
    "a token, rows that are read in place",
)


def gpu_cases(split: int) -> dict[str, tuple]:
    """What only the CUDA kernels can get wrong: their tiles, and splits of so many rows."""
    return {
        "splits, blocks of 64": (
            replace(ONE_HEAD, rows=2 * split + 70, dim=64, value_dim=64, features=128, bias="11S"),
            0,
            {"exact_window": 64},
        ),
        "splits, blocks that are no tiles": (
            Case(batch=1, rows=2 * split + 70, heads=3, groups=1, features=72, state=1, bias="1GS"),
            13,
            {"exact_window": 40},
        ),
        "wide, 200 features": (
            replace(ONE_HEAD, rows=200, dim=128, value_dim=128, features=200, state=1),
            0,
            {"exact_window": 32},
        ),
        "of 256, 80 features": (
            replace(ONE_HEAD, rows=200, dim=256, value_dim=256, features=80, state=1),
            0,
            {"exact_window": 32},
        ),
        "several tiles in a block, keys wider than values": (
            Case(batch=1, rows=430, groups=1, dim=80, value_dim=24, features=80, bias="11S"),
            70,
            {"exact_window": 130},
        ),
        "rows that are not aligned": (
            Case(rows=75, dim=20, value_dim=67, features=33, bias="BGS", masked="holes"),
            2,
            {"exact_window": 24},
        ),
        "packed, splits of some sequences": (
            cases.split_cases(split)["packed, splits of some sequences"],
            0,
            {"exact_window": 32},
        ),
    }


def table(causal: bool, split: int = GPU_SPLIT) -> dict[str, tuple]:
    """The cases of a form on a GPU."""
    return {**CASES, **(STREAMED if causal else {}), **gpu_cases(split)}


def gpu_parameters(split: int = GPU_SPLIT) -> list[tuple]:
    """(causal, name, dtype) of them: every type where it has code of its own."""
    return [
        (causal, name, dtype)
        for causal in (False, True)
        for name in table(causal, split)
        for dtype in gpu_dtypes(name, split)
    ]


def gpu_dtypes(name: str, split: int = GPU_SPLIT) -> list[str]:
    """The types of a case: every one that the kernels take it in where it has code of its own."""
    if name in gpu_cases(split):
        return cases.gpu_dtypes(gpu_cases(split)[name][0])
    return ["float32", "bfloat16", "float16"] if name in NARROW else ["float32"]


def given(name, causal, dtype="float32", split=GPU_SPLIT):
    """Inputs, incoming gradients, and options of a case."""
    case, start, attributes = table(True, split)[name]
    x = {**make(case, dtype), "start": np.array(start, np.int64)}
    incoming = cotangents(case, dtype)
    rows = x["query"].shape[:3]
    wide = x["key_bias"].dtype
    incoming["grad_log_weight"] = np.random.default_rng(7).normal(size=rows).astype(wide)
    return x, incoming, {**case.options, **attributes, "causal": causal}


def arguments(x, dtype, options):
    """Of the reference: float64, with projections that are rounded once."""
    options = dict(options)
    packed = options.pop("packed")
    y = {name: x[name] for name in INPUTS[:7]}
    for name in ("query_projection", "key_projection"):
        y[name] = y[name].astype(DTYPES[dtype])
    y = {name: a.astype(np.float64) for name, a in y.items()}
    state = [x[name].astype(np.float64) for name in INPUTS[7:]]
    offsets = x["offsets"] if packed else None
    return {**y, **options, "offsets": offsets, "initial_state": state, "start": int(x["start"])}


@cache
def wanted(name, causal, dtype, split=GPU_SPLIT):
    """The outputs of a case in float64."""
    x, _, options = given(name, causal, dtype, split)
    out, log_weight, state = reference.near_far_attention(**arguments(x, dtype, options))
    return dict(zip(OUTPUTS, (out, log_weight, *state), strict=True))


def check_results(run, name, causal, dtype, split=GPU_SPLIT):
    """Results are those of the reference."""
    x, _, options = given(name, causal, dtype, split)
    bound, results = tolerances(dtype, causal=causal), run("NearFar", x, **options)
    for output, exact in wanted(name, causal, dtype, split).items():
        worst = bound.worst if output == "out" else None
        assert_close(results[output], exact, rms=bound.rms, worst=worst, what=output)


def gradients(run, x, results, incoming, **options):
    """Gradients by input name."""
    grads = run("NearFarGrad", {**x, **results, **incoming}, **options)
    return {name.removeprefix("grad_"): grad for name, grad in grads.items()}


@cache
def wanted_gradients(name, causal, dtype, split=GPU_SPLIT):
    """The gradients of a case in float64."""
    x, incoming, options = given(name, causal, dtype, split)
    incoming = {n: a.astype(np.float64) for n, a in incoming.items()}
    return reference.near_far_attention_gradients(
        **arguments(x, dtype, options),
        grad_out=incoming["grad_out"],
        grad_log_weight=incoming["grad_log_weight"],
        grad_state=(incoming["grad_log_mass"], incoming["grad_mean"]),
    )


def check_gradients(run, name, causal, dtype, split=GPU_SPLIT):
    """Gradients are those of the reference."""
    x, incoming, options = given(name, causal, dtype, split)
    grads = gradients(run, x, run("NearFar", x, **options), incoming, **options)
    bound = tolerances(dtype, causal=causal).gradient_rms
    for argument, exact in wanted_gradients(name, causal, dtype, split).items():
        assert grads[argument].dtype == x[argument].dtype, argument
        assert_close(grads[argument], exact, rms=bound, what=argument)


PLAIN = Case(batch=1, rows=135, heads=4, groups=2, dim=16, bias="1GS")
OPTIONS = {"exact_window": 16, "causal": True}


def plain(dtype="float32", case=PLAIN, start=5):
    """Inputs and incoming gradients of a case."""
    x, incoming = make(case, dtype), cotangents(case, dtype)
    x["start"] = np.array(start, np.int64)
    rows = x["query"].shape[:3]
    incoming["grad_log_weight"] = np.random.default_rng(7).normal(size=rows)
    incoming["grad_log_weight"] = incoming["grad_log_weight"].astype(x["key_bias"].dtype)
    return x, incoming


def check_past(run, dtype, t, window):
    """Whatever comes at row t and after changes no bit of an earlier row."""
    x, _ = plain(dtype)
    options = {**OPTIONS, "exact_window": window}
    before = run("NearFar", x, **options)
    for poison in POISONS:
        after = run("NearFar", poisoned(x, poison, t, dtype), **options)
        for output in ("out", "log_weight"):
            assert_finite(before[output], what=output)
            assert_same_bits(
                after[output][:, :t], before[output][:, :t], what=f"{output}, {poison} from {t}"
            )


def check_past_of_gradients(run, dtype, t, window):
    """The same of the gradients of earlier queries."""
    x, incoming = plain(dtype)
    options = {**OPTIONS, "exact_window": window}
    before = gradients(run, x, run("NearFar", x, **options), incoming, **options)["query"]
    for poison in POISONS:
        whole = {**x, "grad_out": incoming["grad_out"]}
        changed = poisoned(whole, poison, t, dtype, only=(*POISONED, "grad_out"))
        later = {**incoming, "grad_out": changed.pop("grad_out")}
        results = run("NearFar", changed, **options)
        after = gradients(run, changed, results, later, **options)["query"]
        assert_finite(before, what="grad_query")
        assert_same_bits(after[:, :t], before[:, :t], what=f"grad_query, {poison} from {t}")


def check_nan_in_key(run, causal, name, row, dtype="float32", window=16):
    """A NaN in a key or value shows in exactly the rows that see it."""
    x, _ = plain(dtype)
    x[name][0, row, 0] = np.nan
    results = run("NearFar", x, **{**OPTIONS, "causal": causal, "exact_window": window})
    seen = np.arange(PLAIN.rows) >= (row if causal else 0)
    broken = np.isnan(results["out"][0].astype(np.float32)).any(-1)
    assert np.array_equal(broken[:, :2].all(-1), seen)
    assert not broken[:, 2:].any()


def check_masked(run, causal, masked, dtype="float32", window=16):
    """Masked keys change no bit, whatever they hold."""
    case = replace(PLAIN, batch=2, bias="BGS", masked=masked)
    x, _ = plain(dtype, case)
    options = {**OPTIONS, "causal": causal, "exact_window": window}
    results = run("NearFar", x, **options)
    hidden = np.isneginf(x["key_bias"]).transpose(0, 2, 1)
    x["key"][hidden], x["value"][hidden] = 3, -7
    other = run("NearFar", x, **options)
    for output in OUTPUTS:
        assert_same_bits(other[output], results[output], what=output)
    assert_finite(results["out"], what="out")


def check_masked_gradients(run, causal, masked, dtype="float32", window=16):
    """Nor does it those of gradients, and their own are 0."""
    case = replace(PLAIN, batch=2, bias="BGS", masked=masked)
    x, incoming = plain(dtype, case)
    options = {**OPTIONS, "causal": causal, "exact_window": window}
    results = run("NearFar", x, **options)
    grads = gradients(run, x, results, incoming, **options)
    hidden = np.isneginf(x["key_bias"]).transpose(0, 2, 1)
    x["key"][hidden], x["value"][hidden] = 3, -7
    for name, grad in gradients(run, x, results, incoming, **options).items():
        assert_same_bits(grad, grads[name], what=name)
        assert_finite(grad, what=name)
    for name in ("key", "value"):
        assert not grads[name].astype(np.float32)[hidden].any(), name
    assert not grads["key_bias"].transpose(0, 2, 1)[hidden].any()


def check_gradients_of_rows_that_see_nothing(run, causal, dtype="float32"):
    """They are 0, whatever comes in."""
    x, incoming, options = given("all keys of a batch row masked", causal, dtype)
    incoming["grad_log_weight"][-1] = np.nan  # log_weight is -inf there
    results = run("NearFar", x, **options)
    for name, grad in gradients(run, x, results, incoming, **options).items():
        assert_finite(grad, what=name)
        if name in ("query", "key", "value", "key_bias"):
            assert not grad[-1].astype(np.float32).any(), name


def check_gradients_of_values_with_a_mean(run, causal, state, exact_run):
    """Those in float32 do not drown in what values have in common; `exact_run` takes float64."""
    case = Case(batch=1, rows=300, dim=16, value_dim=8, features=32, state=state)
    x, incoming = plain(case=case, start=0)
    x["value"] += 1000
    x["initial_mean"] += 1000 * (x["initial_log_mass"][..., None] > -np.inf)
    options = {"exact_window": 16, "causal": causal}
    grads = gradients(run, x, run("NearFar", x, **options), incoming, **options)
    exact, incoming = (
        {n: a if a.dtype == np.int64 else a.astype("float64") for n, a in given.items()}
        for given in (x, incoming)
    )
    results = exact_run("NearFar", exact, **options)
    wanted = gradients(exact_run, exact, results, incoming, **options)
    first = 16 if causal and not state else 0  # there the values of the first block are as they are
    for name in ("query", "key", "query_projection", "key_projection", "key_bias"):
        grad, right = grads[name], wanted[name]
        if name in ("query", "key"):
            grad, right = grad[:, first:], right[:, first:]
        error = np.sqrt(np.mean((grad - right) ** 2) / np.mean(right**2))
        assert error <= 1e-4, f"{name}: {error:.2g}"


def check_rows_that_see_nothing(run, causal, dtype="float32"):
    """They give 0, of log weight -inf."""
    x, _, options = given("all keys of a batch row masked", causal, dtype)
    results = run("NearFar", x, **options)
    assert not results["out"][-1].astype(np.float32).any()
    assert np.isneginf(results["log_weight"][-1]).all()


def check_state_without_keys(run, causal, rows, dtype="float32"):
    """A state to which no key is added keeps its bits."""
    x = make(Case(rows=rows, bias="111", state=2), dtype)
    x["key_bias"][:] = -np.inf
    x["key"][:], x["value"][:] = np.nan, np.nan
    x["initial_log_mass"][0, 0, 0], x["initial_mean"][0, 0, 0] = -np.inf, 0
    results = run("NearFar", x, exact_window=16, causal=causal)
    if causal and rows < 32:  # no block is far from the next row
        x["key_bias"][:] = 0
        x["key"][:], x["value"][:] = 1, 2
        results = run("NearFar", x, exact_window=16, causal=True)
    for name in ("log_mass", "mean"):
        assert_same_bits(results[name], x[f"initial_{name}"], what=name)


def check_stream(run, dtype, relative):
    """Calls with the rows of the last blocks and the state between them are one call."""
    x, _ = plain(dtype)
    full = run("NearFar", x, **OPTIONS)
    w, start, done = OPTIONS["exact_window"], int(x["start"]), 0
    state = {"log_mass": x["initial_log_mass"], "mean": x["initial_mean"]}
    for end in (1, 2, 26, *range(27, 46), 80, 135):  # tokens of a whole block among them
        kept = max(((start + done) // w - 1) * w - start, 0)  # rows of the last two blocks
        part = {**x, "start": np.array(start + kept, np.int64)}
        part["query"] = x["query"][:, done:end]
        part |= {name: x[name][:, kept:end] for name in ("key", "value")}
        part["key_bias"] = x["key_bias"][..., kept:end]
        part |= {f"initial_{name}": a for name, a in state.items()}
        results = run("NearFar", part, **OPTIONS)
        for output in ("out", "log_weight"):
            assert_close(results[output], full[output][:, done:end], relative=relative, what=output)
        state, done = {name: results[name] for name in state}, end
    for name, a in state.items():
        assert_close(a, full[name], relative=relative, what=name)


def check_company(run, causal, dtype="float32"):
    """The last batch row, and its second key/value head, have the bits that they have alone."""
    case = replace(PLAIN, batch=3, rows=300, bias="BGS", state=3, query_projections=4)
    options = {"exact_window": 32, "causal": causal}
    x, _ = plain(dtype, case)
    results = run("NearFar", x, **options)
    heads = {"query": 2, "query_projection": 0}
    groups = {"key": 2, "value": 2, "key_bias": 1, "initial_log_mass": 1, "initial_mean": 1}

    def alone(name, a):
        if name in ("start", "offsets"):
            return a
        a = a[-1:] if name not in INPUTS[3:6] and len(a) == case.batch else a
        if name in heads and a.shape[heads[name]] == case.heads:
            return np.take(a, [2, 3], heads[name])
        return np.take(a, [1], groups[name]) if name in groups else a

    part = run("NearFar", {n: alone(n, a) for n, a in x.items()}, **options)
    for name, result in part.items():
        axis, chosen = (2, [2, 3]) if name in ("out", "log_weight") else (1, [1])
        assert_same_bits(result, np.take(results[name][-1:], chosen, axis), what=name)


def check_packed_alone(run, causal, dtype, split=GPU_SPLIT):
    """A packed sequence has the bits that it has alone."""
    x, _, options = given("packed, splits of some sequences", causal, dtype, split)
    packed, number = run("NearFar", x, **options), 1
    begin, end = x["offsets"][number : number + 2]
    rows = x["query"].shape[1]
    alone = {n: a[:, begin:end] if a.shape[:2] == (1, rows) else a for n, a in x.items()}
    alone["key_bias"] = x["key_bias"][..., begin:end]
    for name in ("initial_log_mass", "initial_mean"):
        alone[name] = x[name][number : number + 1]
    for name, result in run("NearFar", alone, **{**options, "packed": False}).items():
        of_rows = name in ("out", "log_weight")
        whole = packed[name][:, begin:end] if of_rows else packed[name][number : number + 1]
        assert_same_bits(result, whole, what=name)
