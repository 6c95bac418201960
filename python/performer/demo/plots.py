"""The two pictures of the demo."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from performer.demo.scaling import LENGTHS


def losses(results, baselines, path):
    """Draws the training loss of every model against the step, with the baselines as lines."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, result in results.items():
        curve = np.asarray(result["losses"])
        width = min(15, len(curve))
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        axes.plot(np.arange(width, len(curve) + 1), smooth, label=f"{name} attention")
    for name, bits in baselines.items():
        axes.axhline(bits, color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(name, (1, bits), xycoords=("axes fraction", "data"), fontsize=8)
    axes.set(xlabel="step", ylabel="bits per byte (mean of 15 steps)", title="Training loss")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def times(measured, path):
    """Draws milliseconds against the length, both logarithmic."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, milliseconds in measured.items():
        axes.loglog(LENGTHS[: len(milliseconds)], milliseconds, "o-", label=f"{name} attention")
    axes.set(xlabel="length of the sequence", ylabel="milliseconds")
    axes.set_title("One causal layer, forward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
