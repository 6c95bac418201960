"""The CUDA kernels under emulation, with calls as those of `kit.core`."""

from __future__ import annotations

import contextlib

import numpy as np
import performer_emulated as emulated
import pytest

from kit.core import Case, signature_names

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


@contextlib.contextmanager
def counting():
    """The emulator's counters, filled at the end of the block."""
    emulated.reset_counters()
    counters: dict[str, int] = {}
    yield counters
    counters.update(emulated.counters())


# What only the GPU's kernels can get wrong: their tile, chunk and segment sizes.
CASES = {
    "narrow, 256 features": Case(
        batch=1, rows=130, heads=1, groups=1, dim=64, value_dim=64, features=256
    ),
    "narrow, 128 features, entry std 3": Case(
        batch=1,
        rows=100,
        heads=1,
        groups=1,
        dim=64,
        value_dim=64,
        features=128,
        bias="11S",
        masked="holes",
        std=3.0,
    ),
    "wide, two groups of features": Case(
        batch=1, rows=70, heads=1, groups=1, dim=128, value_dim=128, features=200
    ),
    "keys wider than values": Case(
        batch=1, rows=70, heads=2, groups=1, dim=80, value_dim=24, features=80, bias="11S"
    ),
    "values wider than keys, rows that are not aligned": Case(
        rows=40, heads=2, groups=2, dim=20, value_dim=67, features=33, bias="BGS", masked="holes"
    ),
    "520 features": Case(
        batch=1, rows=40, heads=1, groups=1, dim=16, value_dim=16, features=520, state=1
    ),
    "two segments, the first one ends in masked keys": Case(
        batch=2, rows=1100, heads=2, groups=1, dim=16, value_dim=16, bias="B1S", masked="left"
    ),
    "packed, segments of some sequences": Case(
        batch=1,
        rows=2200,
        heads=1,
        groups=1,
        dim=16,
        value_dim=8,
        offsets=(0, 3, 1100, 1100, 2200),
        state=4,
        bias="11S",
    ),
}
