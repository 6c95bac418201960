"""Attention forward and backward over sequences in parts: workers of one core each, one machine.

    python benchmarks/sequence_parallel.py --length 131072 --workers 1 2 --rounds 3

Each round runs every number of workers once, in processes of their own, one core each. Printed are
the medians: seconds of a step, processor seconds of all workers together, peak memory of a worker
above what it had before the inputs, seconds of an exchange of the same size alone, and the bytes
that a worker gives to the collectives in a step.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from performer import launch

DIM = 64


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--weak", action="store_true", help="--length is that of each worker")
    parser.add_argument("--block", action="store_true", help="a PerformerEncoder or -Decoder block")
    parser.add_argument("--worker", type=int)
    return parser.parse_args()


def work(given, worker, workers):
    """One worker's part; prints its measurements."""
    import tensorflow as tf

    import performer
    from performer import ops, parallel

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if workers > 1 else None
    mesh = parallel.Mesh(strategy) if strategy else None
    length = given.length if given.weak else given.length // workers
    projection = performer.orthogonal_projection(given.features, DIM, seed=1)
    block, weights = None, []
    if given.block:
        kind = performer.PerformerDecoder if given.causal else performer.PerformerEncoder
        with strategy.scope() if strategy else tf.distribute.get_strategy().scope():
            block = kind(4 * given.heads * DIM, given.heads, supports=given.features, seed=1)
            block(tf.zeros([1, 8, given.heads * DIM]))
        weights = block.trainable_weights

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if block is not None:
                y = block(x[0])
            elif mesh is None:
                y = ops.favor_attention(*x, projection, causal=given.causal)
            else:
                y = parallel.favor_attention(*x, projection, mesh=mesh, causal=given.causal)
            loss = tf.reduce_mean(y * y)
        gradients = tape.gradient(loss, weights or x)
        return loss + sum(tf.reduce_sum(tf.convert_to_tensor(g)[..., :1]) for g in gradients)

    def exchange(x):
        from performer.parallel.collectives import gather, sum_of_own

        group = mesh.group()
        return sum_of_own(gather(x, group), group)

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tf.random.set_seed(worker)
    shape = [1, length, given.heads * DIM] if given.block else [1, length, given.heads, DIM]
    inputs = [tf.random.normal(shape) for _ in range(1 if given.block else 3)]
    state = tf.zeros([given.heads * given.features * (DIM + 1) + 4])
    if mesh is None:
        run, swap = tf.function(step), None
    else:
        run, swap = mesh.function(step), mesh.function(exchange)
    with parallel.sequence(mesh) if mesh else tf.name_scope("whole"):
        run(inputs)
    times, cpu, swaps = [], [], [0.0]
    for _ in range(given.steps):
        if swap is not None:
            swap(state)  # all begin together
            begin = time.perf_counter()
            swap(state)
            swaps.append(time.perf_counter() - begin)
        begin, busy = time.perf_counter(), time.process_time()
        float(run(inputs))
        times.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - busy)
    print(
        "RESULT",
        json.dumps(
            {
                "seconds": min(times),
                "cpu": min(cpu),
                "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024,
                "exchange": min(swaps[1:] or swaps),
                "bytes": 0 if mesh is None else 4 * int(state.shape[0]) * (1 + workers),
            }
        ),
    )


def measure(given, workers):
    """The measurements of a run: the slowest worker's, the sum of processor seconds."""
    processes = []
    for worker, added in enumerate(launch.cluster(workers)):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **added}
        command = [sys.executable, *sys.argv, "--worker", str(worker), "--workers", str(workers)]
        processes.append(
            subprocess.Popen(
                ["taskset", "-c", str(worker), *command],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    found = [json.loads(p.communicate()[0].rpartition("RESULT ")[2]) for p in processes]
    slowest = {key: max(x[key] for x in found) for key in found[0]}
    return {**slowest, "cpu": sum(x["cpu"] for x in found)}


def main():
    given = options()
    if given.worker is not None:
        work(given, given.worker, given.workers[0])
        return
    found = {workers: [] for workers in given.workers}
    for _ in range(given.rounds):
        for workers, rows in found.items():
            rows.append(measure(given, workers))
    for workers, rows in found.items():
        print(workers, "workers", {k: statistics.median(r[k] for r in rows) for k in rows[0]})
    fewest, first = given.workers[0], found[given.workers[0]]
    for workers in given.workers[1:]:
        more = workers / fewest  # times as much work, or as many processors for the same
        for key, factor in (
            ("seconds", 1 if given.weak else 1 / more),
            ("cpu", more if given.weak else 1),
        ):
            pairs = zip(first, found[workers], strict=True)
            ratio = statistics.median(factor * a[key] / b[key] for a, b in pairs)
            print(f"efficiency of {workers} workers, by {key}: {ratio:.3f}")


if __name__ == "__main__":
    main()
