"""One step of streaming: a row of queries, a state of constant size in and out."""

from __future__ import annotations

import time

import numpy as np
import tensorflow as tf

from performer import ops

_STEPS = 1000


def measure(
    features: int, dim: int, exact_window: int | None = None, heads: int = 8, rounds: int = 5
) -> dict:
    """Microseconds of one decode step, and of an identity of the same signature beside it.

    Both are called from Python, step by step (the median call), and run inside a `tf.while_loop` of
    1000 steps (the mean step of the fastest loop).

    Args:
        features, dim, heads: M, D = E, H; B = 1, float32.
        exact_window: as in `favor_attention`.
        rounds: how often the two take turns.

    Returns:
        A record: features, dim, heads, exact_window, call and loop (step, identity and overhead,
        their difference), state_bytes.
    """
    projection = tf.random.stateless_normal([features, dim], [0, 1])
    rows = [tf.random.stateless_normal([1, 1, heads, dim], [0, seed]) for seed in (2, 3, 4)]
    near = {} if exact_window is None else {"exact_window": exact_window, "key_dim": dim}
    state = ops.empty_state(1, heads, features, dim, **near)

    def step(query, key, value, projection, state):
        return ops.favor_attention(
            query,
            key,
            value,
            projection,
            causal=True,
            exact_window=exact_window,
            initial_state=state,
            return_state=True,
        )

    def identity(query, key, value, projection, state):
        return tf.identity(value), tf.nest.map_structure(tf.identity, state)

    def called(body):
        function = tf.function(body, autograph=False)

        def run():
            new, times = state, []
            for _ in range(_STEPS):
                start = time.perf_counter()
                out, new = function(*rows, projection, new)
                out.numpy()
                times.append(time.perf_counter() - start)
            return 1e6 * float(np.median(times))

        return run

    def looped(body):
        @tf.function(autograph=False)
        def loop():
            def next_step(i, _, state):
                return i + 1, *body(*rows, projection, state)

            start = (0, rows[2], state)
            return tf.while_loop(lambda i, *_: i < _STEPS, next_step, start, parallel_iterations=1)

        def run():
            start = time.perf_counter()
            loop()[1].numpy()
            return 1e6 * (time.perf_counter() - start) / _STEPS

        return run

    record: dict = {"features": features, "dim": dim, "heads": heads, "exact_window": exact_window}
    record["state_bytes"] = sum(x.numpy().nbytes for x in tf.nest.flatten(state))
    for name, kind in (("call", called), ("loop", looped)):
        runs = {"step": kind(step), "identity": kind(identity)}
        times: dict[str, list[float]] = {which: [run()] for which, run in runs.items()}
        for which in list(runs) * rounds:  # the first run above compiles
            times[which].append(runs[which]())
        best = {which: min(values[1:]) for which, values in times.items()}
        record[name] = {**best, "overhead": best["step"] - best["identity"]}
    return record
