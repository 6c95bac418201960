"""Time and memory against the length, both logarithmic: one panel for each mode."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from performer.bench.implementations.catalogue import IMPLEMENTATIONS
from performer.bench.report import results

_APART = 0.055  # distance of the labels, in heights of a panel


class Curve(NamedTuple):
    """How a curve is drawn."""

    label: str
    colour: str
    width: float = 1.2
    line: str = "-"


# The palette of Okabe and Ito, distinct for every kind of colour vision; XLA is dashed.
_COLOURS = {
    "performer": "#0072B2",
    "stabilised": "#E69F00",
    "textbook": "#009E73",
    "exact": "#D55E00",
    "torch_exact": "#CC79A7",
    "torch_performer": "#000000",
}
_CURVES = {
    name: Curve(
        impl.label,
        _COLOURS[name.removesuffix("_xla")],
        2.5 if name == "performer" else 1.2,
        "--" if impl.xla else "-",
    )
    for name, impl in IMPLEMENTATIONS.items()
}


def draw(run: dict, folder: Path) -> list[Path]:
    """Writes time.png and memory.png of the main setting (the first one measured).

    Args:
        run: see `results`.
        folder: where the files go.

    Returns:
        The paths of what was written: nothing that was not measured.
    """
    written = []
    for name, kind, value, unit in (
        ("time", "time", "minimum", "milliseconds"),
        ("memory", "memory", "mebibytes", "peak memory, MiB"),
    ):
        groups = results.groups(run, kind, value)
        if groups:
            setting = next(iter(groups))[1]
            panels = {mode: impls for (mode, other), impls in groups.items() if other == setting}
            path = folder / f"{name}.png"
            draw_panels(panels, _CURVES, unit, "M = {}, D = {}, {}".format(*setting), path)
            written.append(path)
    return written


def draw_panels(panels: dict, curves: dict[str, Curve], unit: str, title: str, path: Path) -> None:
    """Draws one panel for each mode, at most two beside each other.

    Args:
        panels: {mode: {implementation: {length: value}}}.
        curves: how each implementation is drawn.
        unit: of the values, for the vertical axis.
        title: of the figure.
        path: of the PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = math.ceil(len(panels) / 2), min(len(panels), 2)
    figure, grid = plt.subplots(rows, columns, figsize=(7.5 * columns, 4.5 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (mode, impls) in zip(grid.flat, panels.items(), strict=False):
        for impl, points in impls.items():
            lengths = sorted(points)
            axes.loglog(
                lengths,
                [points[n] for n in lengths],
                color=curves[impl].colour,
                linestyle=curves[impl].line,
                linewidth=curves[impl].width,
                marker="o",
                markersize=3,
            )
        every = sorted({n for points in impls.values() for n in points})
        axes.set_xticks(every, [f"{n:g}" if n < 1024 else f"{n / 1024:g}k" for n in every])
        axes.minorticks_off()
        _label(axes, impls, curves)
        axes.set(title=mode, xlabel="length of the sequence", ylabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axes, impls, curves):
    """Writes the label of each curve at the right, level with its end, moved apart where needed."""
    low, high = (math.log(y) for y in axes.get_ylim())
    right = math.log(axes.get_xlim()[1] / axes.get_xlim()[0])
    ends = sorted((math.log(points[max(points)]), impl) for impl, points in impls.items())
    heights = [(end - low) / (high - low) for end, _ in ends]
    levels = heights[:]
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + _APART)
    for i, ceiling in enumerate(reversed(range(len(levels)))):  # none above the panel
        levels[ceiling] = min(levels[ceiling], 1 - i * _APART)
    for (_, impl), height, level in zip(ends, heights, levels, strict=True):
        last = max(impls[impl])
        at = math.log(last / axes.get_xlim()[0]) / right
        axes.annotate(
            curves[impl].label,
            xy=(at, height),
            xytext=(1.02, level),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=curves[impl].colour,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#999999", "shrinkA": 0},
        )
