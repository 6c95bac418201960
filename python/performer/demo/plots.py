"""The pictures of the demo."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from performer.demo.model import KINDS
from performer.demo.scaling import LENGTHS
from performer.demo.train import STRETCH


def losses(results, baselines, path):
    """Draws the training loss of every model against its time, with the baselines as lines."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, result in results.items():
        curve, seconds = np.asarray(result["losses"]), np.cumsum(result["times"])
        width = min(15, len(curve))
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        axes.plot(seconds[width - 1 :], smooth, label=f"{KINDS[kind]}, {len(curve)} steps")
    for name, bits in baselines.items():
        axes.axhline(bits, color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(name, (1.01, bits), xycoords=("axes fraction", "data"), va="center")
    axes.set(xlabel="seconds of training", ylabel="bits per byte (mean of 15 steps)")
    axes.set_title("Training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def positions(results, path):
    """Draws the held-out loss of every model against the position in the sequence."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, result in results.items():
        starts = STRETCH * np.arange(len(result["positions"]))
        axes.plot(starts + STRETCH / 2, result["positions"], label=KINDS[kind])
    axes.set(xlabel="position", ylabel=f"bits per byte (mean of {STRETCH} positions)")
    axes.set_title("Held-out text, after the same time of training")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def times(measured, path):
    """Draws milliseconds against the length, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for kind, milliseconds in measured.items():
        axes.loglog(LENGTHS[: len(milliseconds)], milliseconds, "o-", label=KINDS[kind])
    axes.set(xlabel="length of the sequence", ylabel="milliseconds")
    axes.set_title("One causal layer, forward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
