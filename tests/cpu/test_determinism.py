"""The same bits from the compiled core, whatever the threads and the company of a row."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from support.compare import assert_close, assert_same_bits
from support.core_calls import backward, forward, isas
from support.inputs import Case, cotangents, forms, make

# Inputs without an axis of batch rows.
OF_NO_ROW = ("query_projection", "key_projection", "feature_bias", "offsets", "start")
ROWS = ("out", "query", "key", "value", "key_bias")  # results that a batch row has for itself
PLAIN = Case(
    batch=5,
    rows=530,  # more than a split of keys
    heads=6,
    groups=3,
    query_projections=6,
    key_projections=3,
    feature_biases=3,
    bias="BGS",
    masked="left",
    state=5,
)
PACKED = replace(PLAIN, batch=1, offsets=(0, 0, 100, 101, 530), state=1, bias="1GS", masked="")
# Fewer sequences and heads than threads, and far more sub-chunks than two windows of them hold.
FEW = Case(
    batch=1,
    rows=4850,
    heads=2,
    groups=1,
    dim=3,
    features=512,
    query_projections=2,
    feature_biases=2,
    bias="BGS",
    masked="left",
    state=1,
)


def few(case=FEW, dtype="float32"):
    """Inputs with keys that outweigh all before by far: chunks of several sub-chunks, one of so
    many that they fill more than a window."""
    x = make(case, dtype)
    heavier = np.zeros(case.rows)
    heavier[[70, 100, 101, 143, 144, 900, *range(2020, 2060), 3300, 4800]] = 40
    x["key_bias"] += np.cumsum(heavier).astype(x["key_bias"].dtype)
    return x


def everything(x, incoming, causal, **options):
    """Results and gradients by name; of two that share a name (log_mass) both."""
    results = forward(x, causal, **options)
    grads = backward(x, incoming, causal, **options)
    return {**results, **{name: grad for name, grad in grads.items() if name not in results}}


def assert_all_same(actual, wanted, what):
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert_same_bits(actual[name], wanted[name], what=f"{name}, {what}")


@isas
@forms
@pytest.mark.parametrize("case", [PLAIN, PACKED], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threads_change_no_bit(case, causal, isa, dtype):
    x, incoming = make(case, dtype), cotangents(case, dtype)
    once = everything(x, incoming, causal, isa=isa, **case.options)
    for threads in (2, 3, 8, 64):
        again = everything(x, incoming, causal, isa=isa, threads=threads, **case.options)
        assert_all_same(again, once, f"{threads} threads")


SHARED = {
    "one": FEW,
    "empty state": replace(FEW, state=0, rows=4848),
    "four": replace(FEW, batch=2, heads=4, groups=2, masked="holes"),
    "packed": replace(FEW, bias="1GS", masked="", state=1, offsets=(0, 0, 1600, 1601, 4850)),
}
BOTH_TYPES = ("one", "packed")


@isas
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case,
            dtype,
            id=f"{dtype}-{name}",
            # How threads share a sequence does not depend on its type; sanitizers take long.
            marks=pytest.mark.slow if dtype == "bfloat16" and name not in BOTH_TYPES else [],
        )
        for dtype in ("float32", "bfloat16")
        for name, case in SHARED.items()
    ],
)
def test_threads_that_share_a_sequence_change_no_bit(case, isa, dtype):
    x = few(case, dtype)
    once = forward(x, True, isa=isa, **case.options)
    assert not any(np.isnan(result.astype(np.float32)).any() for result in once.values())
    for threads in (2, 3, 8):
        again = forward(x, True, isa=isa, threads=threads, **case.options)
        assert_all_same(again, once, f"{threads} threads")


@isas
def test_threads_that_share_a_sequence_see_no_later_key(isa):
    x, cut = few(), 2500
    once = forward(x, True, isa=isa)
    for name in ("key", "value", "query"):
        x[name][:, cut:] = np.nan
    x["key_bias"][..., cut:] = np.inf
    for threads in (1, 2, 8):
        out = forward(x, True, isa=isa, threads=threads)["out"]
        assert_same_bits(out[:, :cut], once["out"][:, :cut], what=f"out, {threads} threads")


@isas
def test_fifty_runs_of_threads_that_share_a_sequence_give_the_same_bits(isa):
    case = replace(FEW, rows=1700)
    x = make(case)
    once = forward(x, True, isa=isa)
    for _ in range(50):
        assert_all_same(forward(x, True, isa=isa, threads=2), once, "again")


@isas
@forms
def test_fifty_runs_give_the_same_bits(causal, isa):
    case = replace(PLAIN, batch=2, rows=70, state=1)
    x, incoming = make(case), cotangents(case)
    once = everything(x, incoming, causal, isa=isa)
    for _ in range(50):
        assert_all_same(everything(x, incoming, causal, isa=isa, threads=2), once, "again")


@forms
def test_calls_at_the_same_time_do_not_disturb_each_other(causal):
    case = replace(PLAIN, batch=2, rows=70, state=1)
    calls = [(make(case, seed=seed), cotangents(case, seed=seed)) for seed in range(4)]
    wanted = [everything(*call, causal) for call in calls]
    found = [None] * len(calls)

    def work(i):
        for _ in range(5):
            found[i] = everything(*calls[i], causal, threads=2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in enumerate(wanted):
        assert_all_same(found[i], results, f"caller {i}")


@isas
@forms
def test_a_batch_row_alone_has_the_bits_it_has_among_others(causal, isa):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    together = everything(x, incoming, causal, isa=isa, threads=2)
    for b in (0, 3, 4):
        alone = {name: a if name in OF_NO_ROW else a[b : b + 1] for name, a in x.items()}
        grads_in = {name: a[b : b + 1] for name, a in incoming.items()}
        results = everything(alone, grads_in, causal, isa=isa)
        for name in (*ROWS, "log_mass", "mean"):
            assert_same_bits(results[name], together[name][b : b + 1], what=f"{name}, row {b}")


@isas
@forms
def test_permuted_batch_rows_permute_the_results(causal, isa):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    order = np.array([3, 0, 4, 2, 1])
    moved = everything(
        {name: a if name in OF_NO_ROW else a[order] for name, a in x.items()},
        {name: a[order] for name, a in incoming.items()},
        causal,
        isa=isa,
    )
    still = everything(x, incoming, causal, isa=isa)
    for name in (*ROWS, "log_mass", "mean"):
        assert_same_bits(moved[name], still[name][order], what=name)


@isas
@forms
def test_permuted_heads_permute_the_results(causal, isa):
    x, incoming = make(PLAIN), cotangents(PLAIN)
    groups = np.array([2, 0, 1])
    heads = (groups[:, None] * 2 + np.arange(2)).ravel()  # the two query heads of each group
    axis = {"query": (heads, 2), "out": (heads, 2), "query_projection": (heads, 0)}
    axis |= dict.fromkeys(("key", "value"), (groups, 2))
    axis |= dict.fromkeys(("key_projection", "feature_bias"), (groups, 0))
    states = ("initial_log_mass", "initial_mean", "log_mass", "mean")
    axis |= dict.fromkeys(("key_bias", *states), (groups, 1))

    def permuted(name, array):
        return np.take(array, *axis[name]) if name in axis else array

    moved = everything(
        {name: permuted(name, a) for name, a in x.items()},
        {name: permuted(name.removeprefix("grad_"), a) for name, a in incoming.items()},
        causal,
        isa=isa,
    )
    for name, result in everything(x, incoming, causal, isa=isa).items():
        assert_same_bits(moved[name], permuted(name, result), what=name)


@isas
def test_permuted_queries_permute_the_rows_of_read(isa):
    case = replace(PLAIN, batch=1, rows=50, state=1)
    x, incoming = make(case), cotangents(case)
    order = np.random.default_rng(0).permutation(50)
    still = everything(x, incoming, causal=False, isa=isa)
    x["query"], incoming["grad_out"] = x["query"][:, order], incoming["grad_out"][:, order]
    moved = everything(x, incoming, causal=False, isa=isa)
    for name in ("out", "query"):
        assert_same_bits(moved[name], still[name][:, order], what=name)


@isas
@forms
def test_neither_padding_behind_inputs_nor_their_place_in_memory_matters(causal, isa):
    """NaN directly behind and before every array: nothing may read it into a result."""
    case = replace(PLAIN, batch=2, rows=45, dim=3, value_dim=5, features=13, state=2)
    x, incoming = make(case), cotangents(case)
    once = everything(x, incoming, causal, isa=isa)
    for shift in (1, 3):

        def inside_nan(array, shift=shift):
            if array.dtype == np.int64:
                return array
            room = np.full(array.size + 64, np.nan, array.dtype)
            place = room[32 + shift : 32 + shift + array.size].reshape(array.shape)
            place[...] = array
            return place

        moved = everything(
            {name: inside_nan(a) for name, a in x.items()},
            {name: inside_nan(a) for name, a in incoming.items()},
            causal,
            isa=isa,
        )
        assert_all_same(moved, once, f"moved by {shift}")


@isas
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("features", [10, 300])
def test_one_token_is_the_row_of_a_longer_call_but_for_rounding(isa, features, dtype):
    """The exception that is documented: a causal call of one row has a kernel of its own. From two
    rows on, and in packed sequences of one row, the bits are those of the longer call."""
    case = replace(PLAIN, batch=1, rows=60, state=1, masked="", bias="111", features=features)
    x = make(case, dtype)
    rows = ("query", "key", "value")
    whole = forward(x, True, isa=isa)["out"]
    for count in (1, 2, 3):
        part = {name: a[:, :count] if name in rows else a for name, a in x.items()}
        out = forward(part, True, isa=isa)["out"]
        packed = {**part, "offsets": np.array([0, count])}
        packed = forward(packed, True, isa=isa, packed=True)["out"]
        assert_same_bits(packed, whole[:, :count], what=f"{count} packed rows")
        if count > 1:
            assert_same_bits(out, whole[:, :count], what=f"{count} rows")
            continue
        # bfloat16: one unit in the last place
        bound = {"float32": 2e-6, "bfloat16": 2**-7, "float64": 1e-14}[dtype]
        assert_close(out, whole[:, :1], relative=bound, what="one row")


@isas
def test_one_token_alone_has_the_bits_it_has_among_others(isa):
    case = replace(PLAIN, rows=1, masked="")
    x = make(case)
    wanted = forward(x, True, isa=isa)
    for threads in (2, 8):
        assert_all_same(forward(x, True, isa=isa, threads=threads), wanted, f"{threads} threads")
    per_row = ("query", "key", "value", "key_bias", "initial_log_mass", "initial_mean")
    for b in (0, 4):
        alone = {name: a[b : b + 1] if name in per_row else a for name, a in x.items()}
        for name, result in forward(alone, True, isa=isa).items():
            assert_same_bits(result, wanted[name][b : b + 1], what=f"{name}, row {b}")
