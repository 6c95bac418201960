"""The CUDA kernels under emulation, with calls as those of `support.core_calls`."""

from __future__ import annotations

import contextlib

import numpy as np
import performer_emulated as emulated
import pytest

from support.core_calls import signature_names

DTYPES = ["float32", "bfloat16", "float16"]
SCHEDULES = [("forward", 1), ("reverse", 1), ("fair", 1), ("random", 1), ("random", 2)]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
needs_race_detector = pytest.mark.skipif(
    not emulated.detects_races, reason="this build has no race detector; another one has"
)


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """An operator on those of the arrays that are its inputs. Fails on a data race."""
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
