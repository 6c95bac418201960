"""Times of calls that take turns, beside the matrix-product rate of the same moments."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

PRODUCT_SIZE, PRODUCTS = 2048, 20
PRODUCT_OPERATIONS = 2.0 * PRODUCT_SIZE**3
_SHORTEST = 0.01  # seconds: shorter calls are repeated to that, and the mean is taken


Name = TypeVar("Name")


class Times(NamedTuple):
    """Milliseconds of one call: the minimum and the median of the rounds."""

    minimum: float
    median: float


def take_turns(
    calls: dict[Name, Callable], rounds: int, product: Callable[[], object] | None = None
) -> tuple[dict[Name, Times], float]:
    """Times calls in alternation, so that a drift of the machine's clock meets all of them.

    Args:
        calls: functions without arguments, by name. Each must have run before: compiling is not
            measured.
        rounds: how often each takes its turn; every second round runs backwards.
        product: multiplies two float32 matrices of 2048 x 2048; runs 20 times, between the rounds.

    Returns:
        Times by name, and the rate of the fastest product in GFLOP/s (0 without one).
    """
    repeats = {name: math.ceil(_SHORTEST / _seconds(call)) for name, call in calls.items()}
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    products: list[float] = []
    if product:
        product()
    gc.disable()
    try:
        for turn in range(rounds):
            if product:
                products += [_seconds(product) for _ in range(math.ceil(PRODUCTS / rounds))]
            for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                samples[name].append(_seconds(calls[name], repeats[name]))
    finally:
        gc.enable()
    times = {
        name: Times(1e3 * min(seconds), 1e3 * statistics.median(seconds))
        for name, seconds in samples.items()
    }
    return times, PRODUCT_OPERATIONS / min(products) / 1e9 if products else 0.0


def _seconds(call, repeats=1):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
