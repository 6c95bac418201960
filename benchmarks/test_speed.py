"""Guards against slower kernels: Performer's time over that of a named baseline.

Baseline and kernel take turns in one process, so what slows the machine slows both. Each bound is
what a change must not exceed; it is far enough from what is usual that noise does not break it.
"""

import statistics
import time

import pytest

from performer.bench.cases import Case
from performer.bench.checking import LENGTH, check
from performer.bench.implementations import tensorflow_calls

ROUNDS = 9

# (case, baseline, most of baseline's time)
GUARDS = [
    (Case(causal=False, backward=False, length=4096), "stabilised", 0.70),
    (Case(causal=False, backward=True, length=4096), "stabilised", 0.80),
    (Case(causal=True, backward=False, length=4096), "stabilised", 0.45),
    (Case(causal=True, backward=True, length=4096), "stabilised", 0.60),
    (Case(causal=False, backward=False, length=4096, features=128), "stabilised", 0.75),
    (Case(causal=False, backward=False, length=4096, dim=128), "stabilised", 0.85),
    (Case(causal=False, backward=False, length=1024), "exact", 0.65),
    (Case(causal=True, backward=False, length=2048), "exact", 0.45),
    (Case(causal=True, backward=False, length=4096, window=64), "exact", 0.20),
    (Case(causal=True, backward=False, length=256, features=64, window=64), "exact", 1.0),
    (Case(causal=False, backward=False, length=256, features=64, window=64), "exact", 1.0),
]


@pytest.mark.parametrize(
    ("case", "baseline", "most"),
    GUARDS,
    ids=[
        f"{case.mode}, L={case.length} M={case.features} D={case.dim}, over {baseline}"
        for case, baseline, _ in GUARDS
    ],
)
def test_time_over_baseline(benchmark, case, baseline, most):
    tensors = tensorflow_calls.tensors(case.inputs())
    for impl in ("performer", baseline):
        short = case.at(LENGTH)
        results = tensorflow_calls.call(impl, short, tensorflow_calls.tensors(short.inputs()))()
        check(impl, short, tensorflow_calls.arrays(results))
    ours, theirs = (tensorflow_calls.call(impl, case, tensors) for impl in ("performer", baseline))
    ours()
    theirs()
    ratios = []

    def baseline_first():
        start = time.perf_counter()
        theirs()
        benchmark.baseline_seconds = time.perf_counter() - start

    def timed():
        start = time.perf_counter()
        ours()
        ratios.append((time.perf_counter() - start) / benchmark.baseline_seconds)

    benchmark.pedantic(timed, setup=baseline_first, rounds=ROUNDS)
    ratio = statistics.median(ratios)
    benchmark.extra_info["baseline"] = baseline
    benchmark.extra_info["ratio"] = ratio
    assert ratio <= most, f"{ratio:.2f} of the time of {baseline}, must be at most {most}"
