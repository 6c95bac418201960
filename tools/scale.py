"""The time of a training step of attention over sequences in parts, on paper.

    python tools/scale.py --plot docs/scale.png

The model: a step of one layer makes 16 products of L H M D / P multiplications and additions on
each of P workers. If causal, it makes those of the triangles of chunks, too, and 8 more with
several workers, as all but the last summarize their keys first. Once forward and once backward each
receives the states of all others, H M (E + 1) numbers of each, in the P - 1 messages of a ring.
Ring attention, for comparison, passes keys and values round: 2 L H D numbers forward and twice as
many backward, and its work grows with the square of L.
"""

import argparse

FLOAT = 4  # bytes
CHUNK = 64  # rows of a causal chunk, half of whose pairs are formed


def state_bytes(heads, features, dim):
    """Bytes of the state of one part: log_mass and mean of all heads."""
    return FLOAT * heads * features * (dim + 1)


def step_seconds(
    length, heads, features, dim, workers, *, rate, bandwidth, latency, causal=True
) -> tuple[float, float]:
    """Seconds of computing and of exchanging in a step of one layer, forward and backward.

    Args:
        length: L, of the whole sequence.
        heads, features, dim: H, M, D (= E).
        workers: P.
        rate: multiplications and additions a worker does in a second.
        bandwidth: bytes that a worker receives in a second.
        latency: seconds of a message.
        causal: causal attention, of which several workers summarize their keys first.
    """
    part = 2 * (length / workers) * heads * features * dim
    # Products of L M D for each row: forward 2 of the key side and 2 of the query side; backward
    # they are made again, and each has two gradients.
    products = 4.0 + 4 + 8
    if causal:
        # Weights of pairs from features, and their sums of values; backward 2.5 times as much.
        products += 3.5 * CHUNK / 2 * (features + dim) / (features * dim)
    if causal and workers > 1:
        products += 2 + 2 + 4  # of the key side, once more
    computing = products * part / rate
    received = 2 * (workers - 1) * state_bytes(heads, features, dim)
    exchanging = received / bandwidth + 2 * (workers - 1) * latency
    return computing, exchanging


def ring_seconds(length, heads, dim, workers, *, rate, bandwidth, latency):
    """The same of exact causal attention by a ring of keys and values."""
    computing = 2 * 7 * length**2 * heads * dim / 2 / workers / rate
    received = 6 * (workers - 1) / workers * length * heads * dim * FLOAT
    return computing, received / bandwidth + 2 * (workers - 1) * latency


def plot(path, given):
    """Draws the efficiency of up to 1024 workers for lengths up to 16M tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    counts = [2**i for i in range(11)]
    machine = {name: getattr(given, name) for name in ("rate", "bandwidth", "latency")}
    for length in (2**17, 2**20, 2**22, 2**24):
        one = sum(step_seconds(length, *sizes(given), 1, **machine))
        times = [sum(step_seconds(length, *sizes(given), n, **machine)) for n in counts]
        name = f"{length // 1024}k tokens" if length < 2**20 else f"{length // 2**20}M tokens"
        left.plot(counts, [one / n / t for n, t in zip(counts, times, strict=True)], label=name)
        right.plot(counts, times, label=name)
    left.set(xscale="log", xlabel="workers", ylabel="efficiency", ylim=(0, 1.05))
    right.set(xscale="log", yscale="log", xlabel="workers", ylabel="seconds of a step, one layer")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def sizes(given):
    """H, M, D."""
    return given.heads, given.features, given.dim


def main():
    """Prints the table, and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2**20)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 8, 64, 1024])
    parser.add_argument("--rate", type=float, default=100e12, help="1/s")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes/s")
    parser.add_argument("--latency", type=float, default=10e-6, help="s")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--plot", help="file of a plot")
    given = parser.parse_args()
    machine = {name: getattr(given, name) for name in ("rate", "bandwidth", "latency")}
    print("workers   compute s   exchange s   ring: compute s   exchange s")
    for workers in given.workers:
        ours = step_seconds(
            given.length, *sizes(given), workers, causal=not given.bidirectional, **machine
        )
        ring = ring_seconds(given.length, given.heads, given.dim, workers, **machine)
        print(f"{workers:7d} {ours[0]:11.3g} {ours[1]:12.3g} {ring[0]:17.3g} {ring[1]:12.3g}")
    if given.plot:
        plot(given.plot, given)


if __name__ == "__main__":
    main()
