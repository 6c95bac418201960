"""Time of one attention layer against the length of the sequence, by kinds of attention."""

import time

import numpy as np
import tensorflow as tf

from performer import Performer
from performer.demo.model import ATTENTION, HEADS, WIDTH

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MOST_EXACT = 4096  # memory of exact attention grows with the square


def measure():
    """Returns lists of milliseconds (minimum of 2) at `LENGTHS`, by kinds of attention."""
    times: dict[str, list[float]] = {kind: [] for kind in ("near_far", "linear", "exact")}
    random = np.random.default_rng(0)
    layers = {kind: Performer(HEADS, WIDTH // HEADS, **ATTENTION[kind]) for kind in times}
    calls = {kind: tf.function(_causal(layer)) for kind, layer in layers.items()}
    for length in LENGTHS:
        x = tf.constant(random.normal(size=(1, length, WIDTH)), tf.float32)
        for kind in times:
            if kind != "exact" or length <= MOST_EXACT:
                # One trace for each length is meant, and not to be warned of.
                times[kind].append(1e3 * _best(calls[kind].get_concrete_function(x), x))
    return times


def _causal(layer):
    return lambda x: layer(x, x, use_causal_mask=True)


def _best(call, x):
    call(x)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
