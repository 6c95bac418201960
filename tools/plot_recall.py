"""Draws the table that examples/recall.py prints, which this reads from standard input.

python examples/recall.py | tee table.txt | python tools/plot_recall.py docs/recall.png
"""

import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(path):
    """Share of far pairs recalled against bytes of state, a line for each kind of model."""
    rows = re.findall(r"^(\D+?)(?:, \d+)? +([\d.]+) +[\d.]+ +([\d,]+)$", sys.stdin.read(), re.M)
    _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind in dict.fromkeys(name for name, *_ in rows):
        points = sorted((int(x.replace(",", "")), float(y)) for name, y, x in rows if name == kind)
        axes.plot(*zip(*points, strict=True), "o-", label=kind)
    axes.set(xscale="log", xlabel="bytes of state", ylabel="share of far pairs recalled")
    axes.legend()
    plt.savefig(path, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
