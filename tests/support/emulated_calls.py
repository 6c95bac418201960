"""The CUDA kernels on the emulator: calls as those of `support.core_calls`, schedules and cases."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import performer_emulated as emulated
import pytest

from support import cases
from support.core_calls import signature_names
from support.inputs import Case

DTYPES = ["float32", "bfloat16", "float16"]
SCHEDULES = [("forward", 1), ("reverse", 1), ("fair", 1), ("random", 1), ("random", 2)]
SPLIT = emulated.split_rows  # shorter than on a GPU
MOST_ROWS = 2 * SPLIT + 70  # cross several splits
GPU_CASES = {**cases.TILES, **cases.split_cases(SPLIT)}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
needs_race_detector = pytest.mark.skipif(
    not emulated.detects_races, reason="this build has no race detector; another one has"
)


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """Runs an operator on those of the arrays that are its inputs. Fails on a data race."""
    if op.startswith("Read"):
        options.pop("key_norm", None)
    results = emulated.run(op, {name: x[name] for name in signature_names(op)}, **options)
    if not options.get("skip"):
        count, report = emulated.races()
        assert count == 0, f"{op}: {count} data races\n{report}"
    return results


def run_in_small_blocks(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """As `run`, on a GPU whose blocks have as little shared memory as those of sm_89."""
    return run(op, x, shared_bytes=emulated.small_shared_bytes, **options)


@contextlib.contextmanager
def counting():
    """The emulator's counters, filled at the end of the block."""
    emulated.reset_counters()
    counters: dict[str, int] = {}
    yield counters
    counters.update(emulated.counters())


def all_cases(causal: bool) -> dict[str, Case]:
    """The cases of every backend, with as many rows as cross several splits, and those of GPUs."""
    short = {
        name: case if case.offsets else replace(case, rows=min(case.rows, MOST_ROWS))
        for name, case in cases.cases(causal).items()
    }
    return {**short, **GPU_CASES}


def case_dtypes(name: str) -> list[str]:
    """Every type where it has code of its own, else one."""
    if name in GPU_CASES:
        return cases.gpu_dtypes(GPU_CASES[name])
    return DTYPES if name in cases.NARROW else ["bfloat16"]


def each_dtype(names: list[str]):
    """Parametrizes a test with (name, dtype): these cases, each in every type that it runs in."""
    chosen = [(name, dtype) for name in names for dtype in case_dtypes(name)]
    return pytest.mark.parametrize(("name", "dtype"), chosen)


def parameters(leave_out=()) -> list[tuple]:
    """(causal, name, dtype) of all cases."""
    return cases.parameters(all_cases, case_dtypes, leave_out)
