"""The CUDA kernels, emulated, against the reference: every type, layout and option."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support.compare import assert_close, assert_same_bits
from support.core_calls import expected, forward
from support.emulated_calls import (
    GPU_CASES,
    SCHEDULES,
    SPLIT,
    all_cases,
    counting,
    dtypes,
    each_dtype,
    parameters,
    run,
)
from support.inputs import Case, cotangents, forms, make
from support.promises import check_batch_row_alone, check_gradients, check_results


@pytest.mark.parametrize(("causal", "name", "dtype"), parameters())
def test_results_are_those_of_the_reference(causal, name, dtype):
    check_results(run, all_cases(causal)[name], causal, dtype)


WIDTHS = ["narrow, 256 features", "wide, two blocks of features", "of 256, two blocks of features"]
SCHEDULED = [
    "less than a chunk, holes, a projection for each head",
    "packed, with empty sequences",
    *WIDTHS,
]


@forms
@each_dtype(SCHEDULED)
def test_results_are_the_same_bits_under_every_schedule(causal, name, dtype):
    case = all_cases(causal)[name]
    results = [
        forward(make(case, dtype), causal, run, order=order, seed=seed, **case.options)
        for order, seed in SCHEDULES
    ]
    for other in results[1:]:
        for output, x in results[0].items():
            assert_same_bits(other[output], x, what=output)


@forms
@each_dtype(["narrow, 128 features, entry std 3", "wide, two blocks of features"])
def test_the_tensor_cores_of_an_a100_keep_the_promises_too(causal, name, dtype):
    """They add in two steps, with a bit less; all other tests have those of an H100."""
    on_an_a100 = partial(run, tensor_cores="A100")
    check_results(on_an_a100, GPU_CASES[name], causal, dtype)
    check_gradients(on_an_a100, GPU_CASES[name], causal, dtype)


@pytest.mark.parametrize("tensor_cores", ["H100", "A100"])
def test_float32_means_of_long_splits_do_not_drift(tensor_cores):
    """Tensor cores cut off toward zero, which would pull a mean of values of one sign down by 6e-6
    here, and the more, the longer a split is."""
    case = Case(batch=1, rows=16384, heads=1, groups=1, dim=16, value_dim=16, features=16, std=0.5)
    x = make(case)
    x["value"] = 1 + np.abs(x["value"])
    got = run("Summarize", x, tensor_cores=tensor_cores)["mean"]
    exact = expected(x, False)["mean"]
    assert abs(np.mean(got / exact - 1)) < 1e-6
    assert_close(got, exact, relative=6e-5)


@forms
@dtypes
def test_a_batch_row_has_the_bits_it_has_alone(causal, dtype):
    check_batch_row_alone(
        run, all_cases(causal)["an initial state for each, 500 rows"], causal, dtype
    )


@forms
@dtypes
def test_a_packed_sequence_has_the_bits_it_has_alone(causal, dtype):
    case = GPU_CASES["packed, splits of some sequences"]
    x, state = make(case, dtype), 1
    packed = forward(x, causal, run, packed=True)
    begin, end = case.offsets[state : state + 2]
    alone = {n: a[:, begin:end] if a.shape[:2] == (1, case.rows) else a for n, a in x.items()}
    alone["key_bias"] = x["key_bias"][..., begin:end]
    for name in ("initial_log_mass", "initial_mean"):
        alone[name] = x[name][state : state + 1]
    result = forward(alone, causal, run)
    assert_same_bits(result["out"], packed["out"][:, begin:end], what="out")
    for name in ("log_mass", "mean"):
        assert_same_bits(result[name], packed[name][state : state + 1], what=name)


@dtypes
def test_two_calls_with_the_state_between_them_are_one(dtype):
    case = GPU_CASES["narrow, 128 features, entry std 3"]
    x, half = make(case, dtype), 40
    rows = {n: a for n, a in x.items() if a.ndim == 4 and a.shape[1] == case.rows}
    first = {**x, **{n: a[:, :half] for n, a in rows.items()}}
    first["key_bias"] = x["key_bias"][..., :half]
    before = run("Causal", first)
    second = {**x, **{n: a[:, half:] for n, a in rows.items()}}
    second["key_bias"] = x["key_bias"][..., half:]
    second["initial_log_mass"], second["initial_mean"] = before["log_mass"], before["mean"]
    after, bound = run("Causal", second), tolerances(dtype, causal=True)
    exact = expected(x, True)
    assert_close(after["out"], exact["out"][:, half:], rms=bound.rms)
    assert_close(after["mean"], exact["mean"], rms=bound.rms)


@forms
@each_dtype(["narrow, 128 features, entry std 3", *WIDTHS[1:]])
def test_operands_are_read_without_bank_conflicts(causal, name, dtype):
    with counting() as counters:
        forward(make(GPU_CASES[name], dtype), causal, run, **GPU_CASES[name].options)
    assert counters["ldmatrix_conflicts"] == 0
    assert (counters["ldmatrix"] > 0) == (dtype != "float32")


# mma instructions a token, D = E = 64, M = 256. A product of M x D (or M x E) takes 8. Causal has
# five of them, two in the states before its tiles, the lower triangle of f kb (5 of 8) and that of
# local v (1.25 of 2). The gradients of Summarize and Read have five each, of which one is for the
# gradient of the projection. Causal's has the states too, 16. The queries' part of it is 57: five
# products, 5, 2 and 1.25 in triangles, 0.75 for masses of 16 rows, and 8 for two products of the
# tile before in each second tile. The keys' part is 16 for reverse states and 60.5: five products,
# twice 5 and twice 1.25 in triangles, and likewise 8. The gradient of the queries' projection has
# four products, 5 and 2 in triangles, 0.75, 8, and 1.25 for each of 4 blocks of features; that of
# the keys' projection has four products, 5, 8, and 1.25 for each of 8 blocks of features.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tensor_cores_do_no_more_than_counted(dtype):
    rows = 4 * SPLIT
    case = replace(GPU_CASES["narrow, 256 features"], rows=rows)
    x = {**make(case, dtype), **cotangents(case, dtype)}
    x["key"], x["value"], x["query"] = (x[name] * 0 for name in ("key", "value", "query"))
    states = {causal: forward(x, causal, run) for causal in (False, True)}
    counts = {}
    for op in ("Summarize", "Read", "Causal", "SummarizeGrad", "ReadGrad", "CausalGrad"):
        with counting() as counters:
            run(op, {**x, **states[op.startswith("Causal")]})
        counts[op] = counters["mma"] / rows
    assert counts == {
        "Summarize": 16,
        "Read": 16,
        "Causal": 46.25,
        "SummarizeGrad": 40,
        "ReadGrad": 40,
        "CausalGrad": 257.25,
    }
    for op, for_projections in (("SummarizeGrad", 8), ("ReadGrad", 8), ("CausalGrad", 52.75 + 55)):
        with counting() as counters:
            run(op, {**x, **states[op == "CausalGrad"]}, projection_gradient=False)
        assert counters["mma"] / rows == counts[op] - for_projections


# At D = E = 256 a product takes 32. Each of two slices computes what weights are made of: two
# products for the gradients of Summarize and Read, of which Read's have taken as many before.
def test_wide_heads_take_no_more_products_than_counted():
    rows = 128
    case = replace(GPU_CASES["of 256, two blocks of features"], rows=rows, features=256)
    x = {**make(case, "bfloat16"), **cotangents(case, "bfloat16")}
    x["key"], x["value"], x["query"] = (x[name] * 0 for name in ("key", "value", "query"))
    states = {causal: forward(x, causal, run) for causal in (False, True)}
    counts = {}
    for op in ("Summarize", "Read", "Causal", "SummarizeGrad", "ReadGrad", "CausalGrad"):
        for asked in (True, False) if op.endswith("Grad") else (None,):
            options = {} if asked is None else {"projection_gradient": asked}
            with counting() as counters:
                run(op, {**x, **states[op.startswith("Causal")]}, **options)
            counts[op, asked] = counters["mma"] / rows
    assert counts == {
        ("Summarize", None): 64,
        ("Read", None): 64,
        ("Causal", None): 170,
        ("SummarizeGrad", True): 7 * 32,
        ("SummarizeGrad", False): 6 * 32,
        ("ReadGrad", True): 9 * 32,
        ("ReadGrad", False): 8 * 32,
        ("CausalGrad", True): 1162,
        ("CausalGrad", False): 705,
    }


def test_what_the_kernels_do_not_take_is_refused():
    case = GPU_CASES["narrow, 256 features"]
    with pytest.raises(ValueError, match="float64"):
        run("Causal", make(case, "float64"))
    for dtype, most in (("float32", "128 in float32 on"), ("bfloat16", "256 on")):
        width = int(most[:3]) + 1
        wide = make(replace(case, dim=width), dtype)
        with pytest.raises(ValueError, match=rf"key dimension D must be at most {most}.*{width}"):
            run("Summarize", wide)


@pytest.mark.parametrize("op", ["Summarize", "Read", "Causal"])
def test_a_gpu_without_memory_is_an_error(op):
    case = replace(GPU_CASES["two splits, the first one ends in masked keys"], batch=1, heads=1)
    x = make(case, "bfloat16")
    x.update(forward(x, False, run))
    needed = 0
    while True:
        try:
            run(op, x, allocations=needed)
        except MemoryError as error:
            assert "out of GPU memory" in str(error)
            needed += 1
        else:
            break
    assert needed > 0
