"""The PTX that nvcc made of the kernels, interpreted: against the reference, with the bounds of
every backend, and beside the emulator of the sources. Host code is that of the library."""

import re
from functools import partial
from itertools import product

import numpy as np
import performer_ptx
import pytest

from support import cases, emulated_calls, near_far
from support.causality import check_nan_in_key, check_past
from support.compare import assert_same_bits
from support.core_calls import backward
from support.inputs import Case, cotangents, forms, make
from support.promises import check_gradients, check_results
from support.ptx_calls import SPLIT, changed, kernels, name_of, run
from support.steep_keys import KINDS, check_steep_keys

DTYPES = ["float32", "bfloat16", "float16"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
GPU_CASES = {**cases.TILES, **cases.split_cases(SPLIT)}
# Kernels of half differ from those of bfloat16 in what these reach.
HALF = [
    "narrow, 128 features, entry std 3",
    "wide, two blocks of features",
    "of 256, two blocks of features",
]


def all_cases(causal):
    return {**cases.cases(causal), **GPU_CASES}


def case_dtypes(name):
    """bfloat16 in every case; float32 where it has code of its own."""
    taken = cases.gpu_dtypes(GPU_CASES[name]) if name in GPU_CASES else DTYPES
    own_code = [
        *(["float32"] if name in GPU_CASES or name in cases.NARROW else []),
        "bfloat16",
        *(["float16"] if name in HALF else []),
    ]
    return [dtype for dtype in own_code if dtype in taken]


def parameters(leave_out=()):
    return cases.parameters(all_cases, case_dtypes, leave_out)


@pytest.mark.parametrize(("causal", "name", "dtype"), parameters())
def test_results_are_those_of_the_reference(causal, name, dtype):
    check_results(run, all_cases(causal)[name], causal, dtype)


GRADIENTS = {
    "bfloat16": [
        "two causal chunks and 31 rows, entry std 3",
        "packed, with empty sequences",
        "packed, one state for all, relu",
        "relu without epsilon",
        "two splits, the first one ends in masked keys",
        *cases.TILES,
    ],
    "float32": [*HALF, "keys wider than values", "520 features"],
    "float16": HALF,
}


@pytest.mark.parametrize(
    ("causal", "name", "dtype"), [p for p in parameters() if p[1] in GRADIENTS[p[2]]]
)
def test_gradients_are_those_of_the_reference(causal, name, dtype):
    check_gradients(run, all_cases(causal)[name], causal, dtype)


NEAR_FAR = ["blocks of 64, entry std 2", "wide, 200 features", "of 256, 80 features"]


@pytest.mark.parametrize(
    ("causal", "name", "dtype"),
    [p for p in near_far.gpu_parameters(SPLIT) if p[2] == "bfloat16" or p[1] in NEAR_FAR],
)
def test_near_and_far_results_are_those_of_the_reference(causal, name, dtype):
    near_far.check_results(run, name, causal, dtype, SPLIT)


@forms
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, t) for n in NEAR_FAR for t in near_far.gpu_dtypes(n, SPLIT)]
)
def test_near_and_far_gradients_are_those_of_the_reference(causal, name, dtype):
    near_far.check_gradients(run, name, causal, dtype, SPLIT)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, "bfloat16") for kind in KINDS] + [("bias rises now and then", "float32")],
)
def test_keys_of_which_each_outweighs_all_before_it(kind, dtype):
    check_steep_keys(run, kind, dtype)


CAUSAL = Case(batch=1, rows=135, heads=2, groups=2, features=40, bias="1GS")


@dtypes
def test_what_comes_at_t_and_after_changes_no_earlier_bit(dtype):
    check_past(run, make(CAUSAL, dtype), dtype, product((70,), ("noise", "NaN", "inf", "growing")))


@dtypes
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_nan_in_a_key_shows_from_its_row_on_in_its_group(dtype, name):
    check_nan_in_key(run, CAUSAL, dtype, name)


@forms
@both_dtypes
def test_results_are_the_same_bits_in_every_order(causal, dtype):
    case = cases.TILES["narrow, 128 features, entry std 3"]
    x, incoming = make(case, dtype), cotangents(case, dtype)
    results = [
        backward(x, incoming, causal, partial(run, order=order, seed=seed), **case.options)
        for order, seed in [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]
    ]
    for other in results[1:]:
        for name, grad in results[0].items():
            assert_same_bits(other[name], grad, what=name)


@forms
@both_dtypes
def test_blocks_of_a_gpu_with_less_shared_memory(causal, dtype):
    small = partial(run, shared_bytes=emulated_calls.emulated.small_shared_bytes)
    check_gradients(small, cases.TILES["narrow, 256 features"], causal, dtype)


@forms
@both_dtypes
def test_the_tensor_cores_of_an_a100(causal, dtype):
    case = cases.TILES["narrow, 128 features, entry std 3"]
    check_results(partial(run, tensor_cores="A100"), case, causal, dtype)


def test_every_instruction_of_the_library_is_known():
    for name, text in kernels().items():
        performer_ptx.load(text)
        assert performer_ptx.coverage()[name][1] > 10


# ---- Beside the emulator of the sources, which has shorter splits

# In sequences of one split, without an initial state.
SHORT = [
    "less than a chunk, holes, a projection for each head",
    "a chunk and a row, relu, a projection for each group",
    "two causal chunks and 31 rows, entry std 3",
    "sizes that fill no vector, elu",
    "narrow, 128 features, entry std 3",
    "wide, two blocks of features",
    "three heads a group, 300 features",
]


@forms
@pytest.mark.parametrize("name", SHORT)
def test_results_are_the_bits_of_the_emulated_sources(causal, name):
    """Once each product is rounded, as nvcc does not where it makes x * y + z one fma. What is left
    is logf, which is another one: log_mass is off by its last bits."""
    case = all_cases(causal)[name]
    for dtype in case_dtypes(name):
        x = make(case, dtype)
        for op in ("Causal",) if causal else ("Summarize", "Read"):
            results = run(op, x, fused=False, **case.options)
            emulated = emulated_calls.run(op, x, **case.options)
            for output, array in emulated.items():
                if output == "log_mass":
                    np.testing.assert_array_max_ulp(results[output], array, 2)
                else:
                    assert_same_bits(results[output], array, what=f"{dtype} {op} {output}")
            x |= emulated


# ---- Faults in the PTX

CASE = cases.TILES["narrow, 128 features, entry std 3"]
SPLITS = cases.split_cases(SPLIT)["two splits, the first one ends in masked keys"]
# What is changed in the PTX of a kernel: the kernel, a pattern, what takes its place.
FAULTS = {
    "matrices are not transposed": ("ReadKernel", r"x4\.trans\.shared", "x4.shared"),
    "matrices are transposed": ("SummarizeKernel", r"m8n8\.x4\.shared", "m8n8.x4.trans.shared"),
    "operands are half": ("CausalKernel", r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32"),
    "a pair is swapped": (
        "CausalKernel",
        r"(cvt\.rn\.bf16x2\.f32\s+%r\d+), (%f\d+), (%f\d+)",
        r"\1, \3, \2",
    ),
    "lanes read the wrong one": ("ReadKernel", r"shfl\.sync\.bfly", "shfl.sync.idx"),
    "exponentials are left out": ("SplitStatesKernel", r"ex2\.approx\.ftz\.f32", "mov.f32"),
    "waits let one group more fly": (
        "SummarizeKernel",
        r"wait_group (\s*)(\d)",
        lambda m: f"wait_group {m[1]}{int(m[2]) + 1}",
    ),
    "nothing waits for copies": ("ReadKernel", r"cp\.async\.wait_group\s+\d;", ""),
    "what is not valid is copied": (
        "CausalKernel",
        r"(cp\.async\.cg.*), 16, %r\d+;",
        r"\1, 16, 16;",
    ),
    "no barriers": ("SummarizeKernel", r"bar\.sync\s+0;", ""),
    "a barrier in divergent code": (
        "SummarizeKernel",
        r"bar\.sync\s+0;",
        lambda m: f"@%p1 bra $L_none{m.start()};\nbar.sync 0;\n$L_none{m.start()}:",
    ),
    "a comparison the other way": ("MergeKernel", r"setp\.eq\.f32", "setp.ne.f32"),
    "a rounded operation": ("MergeKernel", r"div\.rn\.f32", "mul.rn.f32"),
    "the maximum is the minimum": ("ReadKernel", r"max\.f32", "min.f32"),
    "the first row with a NaN is the last": (
        "CausalKernel",
        r"atom\.shared\.min",
        "atom.shared.max",
    ),
    "a predicate is negated": ("PackKernel", r"@%p", "@!%p"),
    "a row further": ("ReadKernel", r"(st\.u32\s+\[%rd\d+)\]", r"\1+4096]"),
    "a parameter of another place": (
        "PackKernel",
        r"param_0\+(\d+)\]",
        lambda m: f"param_0+{int(m[1]) + 8}]",
    ),
}


def kernel_in_bfloat16(kernel):
    return name_of(kernel, "bfloat16", *([] if kernel == "MergeKernel" else [64]))


def checks(causal):
    """What must fail with a fault."""
    for case in (CASE, cases.SUB_CHUNKS, SPLITS):
        for order in ("forward", "reverse"):
            check_results(partial(run, order=order), case, causal, "bfloat16")
    if causal:
        check_nan_in_key(run, CAUSAL, "bfloat16", "value")


@forms
def test_without_a_fault_the_checks_for_faults_pass(causal):
    checks(causal)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_instruction_fails(fault):
    kernel, pattern, change = FAULTS[fault]
    name = kernel_in_bfloat16(kernel)
    text, count = re.subn(pattern, change, kernels()[name])
    assert count > 0
    with changed(name, text), pytest.raises((AssertionError, RuntimeError)):
        checks(causal=kernel in ("CausalKernel", "SplitStatesKernel", "MergeKernel"))
