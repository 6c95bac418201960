"""Near-and-far attention by the CUDA kernels, emulated: results, gradients, what changes no bit."""

from functools import partial

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support import core_calls, near_far
from support.compare import assert_close, assert_same_bits
from support.emulated_calls import (
    SCHEDULES,
    SPLIT,
    counting,
    dtypes,
    run,
    run_in_small_blocks,
)
from support.inputs import Case, cotangents, forms, make

SIZES = [
    "splits, blocks of 64",
    "wide, 200 features",
    "packed, splits of some sequences",
    "of 256, 80 features",
]
sizes = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in SIZES for dtype in near_far.gpu_dtypes(name, SPLIT)],
)
windows = pytest.mark.parametrize("window", [16, 64, 100])


@pytest.mark.parametrize(("causal", "name", "dtype"), near_far.gpu_parameters(SPLIT))
def test_results_are_those_of_the_reference(causal, name, dtype):
    near_far.check_results(run, name, causal, dtype, SPLIT)


@forms
@dtypes
@pytest.mark.parametrize("name", SIZES[:3])
def test_the_tensor_cores_of_an_a100_keep_the_promises_too(causal, name, dtype):
    near_far.check_results(partial(run, tensor_cores="A100"), name, causal, dtype, SPLIT)


@forms
@dtypes
@pytest.mark.parametrize("name", ["splits, blocks of 64", "splits, blocks that are no tiles"])
def test_narrow_heads_run_in_small_blocks(causal, name, dtype):
    near_far.check_results(run_in_small_blocks, name, causal, dtype, SPLIT)


@forms
@dtypes
@pytest.mark.parametrize("name", ["splits, blocks that are no tiles", SIZES[2]])
def test_results_are_the_same_bits_under_every_schedule(causal, name, dtype):
    x, _, options = near_far.given(name, causal, dtype, SPLIT)
    results = [run("NearFar", x, order=order, seed=seed, **options) for order, seed in SCHEDULES]
    for other in results[1:]:
        for output, result in results[0].items():
            assert_same_bits(other[output], result, what=output)


@dtypes
@pytest.mark.parametrize(
    ("t", "window"), [(11, 16), (27, 16), (1, 64), (64, 64), (70, 64), (134, 64), (70, 100)]
)
def test_what_comes_at_t_and_after_changes_no_earlier_bit(dtype, t, window):
    near_far.check_past(run, dtype, t, window)


@windows
@dtypes
@forms
@pytest.mark.parametrize(("name", "row"), [("key", 0), ("key", 40), ("value", 40), ("value", 134)])
def test_nan_in_a_key_shows_in_exactly_the_rows_that_see_it(causal, name, row, dtype, window):
    near_far.check_nan_in_key(run, causal, name, row, dtype, window)


@forms
@dtypes
@pytest.mark.parametrize(("masked", "window"), [("holes", 16), ("left", 16), ("row", 64)])
def test_masked_keys_change_no_bit(causal, masked, dtype, window):
    near_far.check_masked(run, causal, masked, dtype, window)


@forms
@dtypes
def test_queries_that_see_nothing_give_exactly_zero(causal, dtype):
    near_far.check_rows_that_see_nothing(run, causal, dtype)


@forms
@pytest.mark.parametrize("rows", [0, 1, 31, 200])
def test_a_state_to_which_no_key_is_added_keeps_its_bits(causal, rows):
    near_far.check_state_without_keys(run, causal, rows)


@dtypes
def test_a_stream_with_the_rows_of_the_last_blocks_is_the_full_pass(dtype):
    """The state between calls is float32, and rounded where it is read."""
    near_far.check_stream(run, dtype, {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}[dtype])


@forms
@dtypes
def test_a_batch_row_and_a_head_have_the_bits_they_have_alone(causal, dtype):
    near_far.check_company(run, causal, dtype)


@forms
@dtypes
def test_a_packed_sequence_has_the_bits_it_has_alone(causal, dtype):
    near_far.check_packed_alone(run, causal, dtype, SPLIT)


@forms
@dtypes
def test_a_window_that_holds_all_keys_is_exact_attention(causal, dtype):
    x, _, options = near_far.given("blocks of 64, entry std 2", causal, dtype)
    out = run("NearFar", x, **{**options, "exact_window": 1000})["out"][0, :, 0]
    q, k, v = (x[name][0, :, 0].astype(np.float64) for name in ("query", "key", "value"))
    logits = q @ k.T / np.sqrt(q.shape[-1]) + x["key_bias"][0, 0]
    if causal:
        logits[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ v
    assert_close(out, exact, rms=tolerances(dtype, causal=causal).rms)


@forms
@sizes
def test_operands_are_read_without_bank_conflicts(causal, name, dtype):
    x, _, options = near_far.given(name, causal, dtype, SPLIT)
    with counting() as counters:
        run("NearFar", x, **options)
    assert counters["ldmatrix_conflicts"] == 0
    assert (counters["ldmatrix"] > 0) == (dtype != "float32")


# mma instructions a token, D = E = 64, M = 256, W = 64. A product of M x D (or M x E) takes 8, two
# of them in the states of far keys and two in what queries read of them; a tile of 64 keys takes 4,
# and a query has two of them if causal, else three. The other direction has states of its own.
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_tensor_cores_do_no_more_than_counted(dtype):
    rows, blocks = 4 * SPLIT, 4 * SPLIT // 64
    case = Case(batch=1, rows=rows, heads=1, groups=1, dim=64, value_dim=64, features=256, state=1)
    x = make(case, dtype)
    counts = {}
    for causal in (False, True):
        with counting() as counters:
            run("NearFar", x, exact_window=64, causal=causal)
        counts[causal] = counters["mma"] / rows
    # The first block has none before it; the last one none behind it, and is not in the state.
    assert counts[True] == 16 * (blocks - 1) / blocks + 16 + 4 * (2 * blocks - 1) / blocks
    assert counts[False] == 16 + 16 + 16 + 4 * (3 * blocks - 2) / blocks


@forms
def test_a_gpu_without_memory_is_an_error(causal):
    x, _, options = near_far.given("splits, blocks that are no tiles", causal, "bfloat16", SPLIT)
    needed = 0
    while True:
        try:
            run("NearFar", x, allocations=needed, **options)
        except MemoryError as error:
            assert "out of GPU memory" in str(error)
            needed += 1
        else:
            break
    assert needed > 0


# In bfloat16 every case, and every type where it has code of its own.
@pytest.mark.parametrize(
    ("causal", "name", "dtype"),
    [
        (causal, name, dtype)
        for causal in (False, True)
        for name in near_far.table(causal, SPLIT)
        for dtype in (near_far.gpu_dtypes(name, SPLIT) if name in SIZES else ["bfloat16"])
    ],
)
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    near_far.check_gradients(run, name, causal, dtype, SPLIT)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_narrow_heads_run_in_small_blocks(causal, dtype):
    near_far.check_gradients(run_in_small_blocks, SIZES[0], causal, dtype, SPLIT)


@pytest.mark.parametrize(("causal", "dtype"), [(True, "float32"), (False, "bfloat16")])
def test_gradients_are_the_same_bits_under_every_schedule(causal, dtype):
    x, incoming, options = near_far.given(SIZES[2], causal, dtype, SPLIT)
    results = run("NearFar", x, **options)
    first, *others = (
        near_far.gradients(run, x, results, incoming, order=order, seed=seed, **options)
        for order, seed in SCHEDULES[1::2]
    )
    for other in others:
        for argument, grad in first.items():
            assert_same_bits(other[argument], grad, what=argument)


@pytest.mark.parametrize(
    ("dtype", "t", "window"),
    [("bfloat16", 27, 16), ("float16", 70, 64), ("float32", 70, 100)],
)
def test_what_comes_at_t_and_after_changes_no_bit_of_earlier_gradients(dtype, t, window):
    near_far.check_past_of_gradients(run, dtype, t, window)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_keys_change_no_bit_of_gradients_and_have_none(causal, dtype):
    near_far.check_masked_gradients(run, causal, "holes", dtype, window=64)
    near_far.check_gradients_of_rows_that_see_nothing(run, causal, dtype)


@forms
@pytest.mark.parametrize("state", [0, 1])
def test_gradients_do_not_drown_in_what_values_have_in_common(causal, state):
    near_far.check_gradients_of_values_with_a_mean(run, causal, state, core_calls.run)


@forms
@dtypes
def test_gradients_of_projections_are_zero_where_they_are_not_asked_for(causal, dtype):
    x, incoming, options = near_far.given(SIZES[0], causal, dtype, SPLIT)
    results = run("NearFar", x, **options)
    whole = near_far.gradients(run, x, results, incoming, **options)
    part = near_far.gradients(run, x, results, incoming, **options, projection_gradient=False)
    for name in ("query_projection", "key_projection", "feature_bias"):
        assert not part.pop(name).any(), name
        assert whole.pop(name).any(), name
    for name, grad in whole.items():
        assert_same_bits(part[name], grad, what=name)


@forms
@pytest.mark.parametrize("name", [*SIZES[:2], SIZES[3]])
def test_operands_of_gradients_are_read_without_bank_conflicts(causal, name):
    x, incoming, options = near_far.given(name, causal, "bfloat16", SPLIT)
    results = run("NearFar", x, **options)
    with counting() as counters:
        near_far.gradients(run, x, results, incoming, **options)
    assert counters["ldmatrix"] > 0
    assert counters["ldmatrix_conflicts"] == 0


# Of the gradient, likewise: states as above, and as many products in reverse states. Queries have
# four of each (and 1/16 of two more, which sum rounded operands). Keys have five of features, as R
# counts twice, and four of near queries. Gradients of projections have three, those of keys four.
def test_the_tensor_cores_do_no_more_than_counted_in_the_gradient():
    rows, blocks = 4 * SPLIT, 4 * SPLIT // 64
    case = Case(batch=1, rows=rows, heads=1, groups=1, dim=64, value_dim=64, features=256, state=1)
    x, incoming = make(case, "bfloat16"), cotangents(case, "bfloat16")
    counts = {}
    for causal in (False, True):
        options = {"exact_window": 64, "causal": causal}
        results = run("NearFar", x, **options)
        for asked in (False, True):
            with counting() as counters:
                near_far.gradients(run, x, results, incoming, projection_gradient=asked, **options)
            counts[causal, asked] = counters["mma"] / rows
    last = (blocks - 1) / blocks
    near = (1.75 * blocks - 1) / blocks  # of the triangle three quarters
    assert counts[True, False] == 16 * last + 16 + 34 + 8.5 * near + 40 * last + 8 * near
    assert counts[True, True] == counts[True, False] + 24 + 32 * last
    near = (3 * blocks - 2) / blocks
    assert counts[False, False] == 32 + 32 + 34 + 8.5 * near + 40 + 8 * near
    assert counts[False, True] == counts[False, False] + 24 + 32


@forms
def test_a_gradient_without_memory_is_an_error(causal):
    x, incoming, options = near_far.given(SIZES[0], causal, "bfloat16", SPLIT)
    x |= {**run("NearFar", x, **options), **incoming}
    for allowed in (0, 5, 10, 15):
        with pytest.raises(MemoryError, match="out of GPU memory"):
            run("NearFarGrad", x, allocations=allowed, **options)
