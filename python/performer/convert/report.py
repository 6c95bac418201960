"""What calibration, distillation and surveys find: as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from performer.layers._calibration import LayerReport


@dataclasses.dataclass(frozen=True)
class Trial:
    """Errors of a layer at one choice of sizes, after calibration; nothing was assigned.

    Attributes:
        layer: its name.
        supports, exact_window, exact_keys: the sizes, as arguments of `performer.Performer`.
        errors: float64 `[H]`, of every query head.
    """

    layer: str
    supports: int
    exact_window: int | None
    exact_keys: int | None
    errors: np.ndarray

    @property
    def sizes(self):
        """`(supports, exact_window, exact_keys)`."""
        return self.supports, self.exact_window, self.exact_keys

    @property
    def cost(self):
        """Rows that a query and its key are multiplied by: 2 M features, 3 W near keys, n keys."""
        return 2 * self.supports + 3 * (self.exact_window or 0) + (self.exact_keys or 0)


@dataclasses.dataclass(frozen=True)
class Report:
    """Errors of the heads of a model, printed as a table.

    An error is that of the outputs of a head on held-out sequences, relative to what attention adds
    to the mean of the values: 0 is exact, and at 1 one might as well not look.

    Attributes:
        layers: a `LayerReport` for each layer, in the order in which the model calls them: errors
            before and after. Empty after `survey`.
        outputs: distance of the model's outputs to the teacher's, relative to their spread, by what
            was done last: "as it was", "layers", "end to end", "lora". Of `distill` only.
        trials: what `survey` measured.

    Example:

    >>> import numpy as np
    >>> from performer.convert import Report, Trial
    >>> tried = [Trial("attention", 2**n, None, None, np.array([2, 2, 9]) / n) for n in range(5, 9)]
    >>> report = Report([], trials=tried)
    >>> report.recommend(0.3)["attention"].sizes
    (128, None, None)
    >>> report.misfits(0.3)
    [('attention', 2, 1.125)]
    """

    layers: list[LayerReport]
    outputs: dict[str, float] = dataclasses.field(default_factory=dict)
    trials: list[Trial] = dataclasses.field(default_factory=list)

    def recommend(self, error) -> dict[str, Trial]:
        """The cheapest sizes tried at which half of a layer's heads have at most this error.

        Cost is `Trial.cost`. Heads that stay above it are in `misfits` where no sizes help them.

        Args:
            error: the largest error wished for.

        Returns:
            A `Trial` by the name of the layer; layers for which no sizes do are missing.
        """
        best: dict[str, Trial] = {}
        for trial in sorted(self.trials, key=lambda trial: trial.cost):
            if np.median(trial.errors) <= error:
                best.setdefault(trial.layer, trial)
        return best

    def misfits(self, error) -> list[tuple[str, int, float]]:
        """Heads that have a larger error at all sizes tried, or without trials, after the fit.

        Args:
            error: the largest error wished for.

        Returns:
            Name of the layer, number of the query head, its least error.
        """
        least: dict[str, np.ndarray] = {}
        found = [(x.layer, x.errors) for x in self.trials] or [
            (x.layer, x.after) for x in self.layers
        ]
        for layer, errors in found:
            least[layer] = np.minimum(least.get(layer, np.inf), errors)
        return [
            (layer, head, float(e))
            for layer, errors in least.items()
            for head, e in enumerate(errors)
            if e > error
        ]

    def __str__(self):
        """A table: a line for each layer, for each choice of sizes, and for the outputs."""
        lines = [str(layer) for layer in self.layers]
        for sizes in dict.fromkeys(trial.sizes for trial in self.trials):
            errors = np.concatenate([x.errors for x in self.trials if x.sizes == sizes])
            lines.append(
                "supports={}, exact_window={}, exact_keys={}: ".format(*sizes)
                + f"error {errors.mean():.3f} (heads {errors.min():.2f} to {errors.max():.2f})"
            )
        lines += [f"outputs, {stage}: error {error:.3f}" for stage, error in self.outputs.items()]
        return "\n".join(lines)

    def save(self, path) -> None:
        """Writes all of it as JSON, which `load` reads."""
        trials = [{**vars(trial), "errors": trial.errors.tolist()} for trial in self.trials]
        layers = [layer.as_dict() for layer in self.layers]
        with open(path, "w") as file:
            json.dump({"layers": layers, "outputs": self.outputs, "trials": trials}, file, indent=1)

    @classmethod
    def load(cls, path) -> Report:
        """The report that `save` wrote."""
        with open(path) as file:
            saved = json.load(file)
        return cls(
            [LayerReport.from_dict(layer) for layer in saved["layers"]],
            saved["outputs"],
            [Trial(**{**x, "errors": np.array(x["errors"])}) for x in saved["trials"]],
        )

    def plot(self, path) -> None:
        """Draws it, with matplotlib: heat maps of layers and heads, and error against M.

        Args:
            path: of the picture, in a format that matplotlib writes.

        Raises:
            ImportError: matplotlib is missing, which `tensorflow-performer[demo]` installs.
        """
        from matplotlib.figure import Figure

        maps = [("before", "before"), ("after", "after")] if self.layers else []
        columns = len(maps) + bool(self.trials)
        figure = Figure(figsize=(4.5 * max(columns, 1), 4), layout="constrained")
        panels = list(figure.subplots(1, columns, squeeze=False)[0]) if columns else []
        for title, field in maps:
            panel, image = panels.pop(0), None
            heads = max(len(layer.after) for layer in self.layers)
            errors = np.full((len(self.layers), heads), np.nan)
            for row, layer in enumerate(self.layers):
                errors[row, : len(layer.after)] = getattr(layer, field)
            image = panel.imshow(errors, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            panel.set(title=f"error {title}", xlabel="head")
            panel.set_yticks(range(len(self.layers)), [layer.layer for layer in self.layers])
            figure.colorbar(image, ax=panel)
        if self.trials:
            panel = panels.pop(0)
            for window, keys in dict.fromkeys(trial.sizes[1:] for trial in self.trials):
                same = [trial for trial in self.trials if trial.sizes[1:] == (window, keys)]
                supports = sorted({trial.supports for trial in same})
                mean = [
                    np.mean(np.concatenate([x.errors for x in same if x.supports == m]))
                    for m in supports
                ]
                panel.plot(supports, mean, "o-", label=f"window {window}, exact keys {keys}")
            panel.set(xlabel="supports", ylabel="mean error of heads", title="error, calibrated")
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.legend(fontsize="small")
        figure.savefig(path)
