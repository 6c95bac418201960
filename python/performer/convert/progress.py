"""Training in stages that goes on after an interruption as if there had been none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import keras
import numpy as np


class Progress:
    """Keeps in a folder what stages have done; without a folder, nothing.

    Args:
        folder: a path, made if missing, or None.
        settings: what the stages depend on, as JSON holds it.
        every: after how many steps of a stage its weights are written.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(self, folder, settings, every):
        self._folder = None if folder is None else Path(folder)
        self._every = every
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if file.exists():
            begun = json.loads(file.read_text())
            if begun != settings:
                changed = sorted(k for k in settings if begun.get(k) != settings[k])
                raise ValueError(
                    "`checkpoint` must be a folder of the same arguments and models, or a new one. "
                    f"Received: checkpoint={str(folder)!r}, begun with other {', '.join(changed)}"
                )
        else:
            file.write_text(json.dumps(settings))

    def result(self, stage, variables):
        """What `finish` was given for a stage, whose weights are assigned; None before it."""
        arrays = self._read(f"{stage}.npz")
        if arrays is None:
            return None
        for number, variable in enumerate(variables):
            variable.assign(arrays[str(number)])
        return json.loads(str(arrays["result"]))

    def finish(self, stage, variables, result):
        """Writes weights and result (as JSON holds it) of a finished stage."""
        self._write(f"{stage}.npz", variables, result=json.dumps(result))
        if self._folder is not None:
            (self._folder / "running.npz").unlink(missing_ok=True)

    def begin(self, stage, variables):
        """Assigns the weights with which an interrupted stage began, or writes them down."""
        begun = self._read("begun.npz")
        if begun is None or str(begun["stage"]) != stage:
            self._write("begun.npz", variables, stage=stage)
            return
        for number, variable in enumerate(variables):
            variable.assign(begun[str(number)])

    def train(self, stage, step, steps, variables, bar):
        """Calls `step(number)`, which returns a loss, for the steps that are left.

        Args:
            stage: name of the stage.
            step: a function of the number of the step.
            steps: how many there are.
            variables: all that steps change, optimizers included.
            bar: `keras.utils.Progbar`.
        """
        first, arrays = 0, self._running(stage)
        if arrays is not None:
            first = int(arrays["step"])
            for number, variable in enumerate(variables):
                variable.assign(arrays[str(number)])
        for number in range(first, steps):
            loss = step(number)
            bar.update(number + 1, [("loss", float(loss))])
            if (number + 1) % self._every == 0 and number + 1 < steps:
                self._write("running.npz", variables, stage=stage, step=number + 1)

    def _running(self, stage):
        arrays = self._read("running.npz")
        return arrays if arrays is not None and str(arrays["stage"]) == stage else None

    def _read(self, name):
        if self._folder is None or not (self._folder / name).exists():
            return None
        with np.load(self._folder / name) as file:
            return dict(file)

    def _write(self, name, variables, **more):
        if self._folder is None:
            return
        arrays = {str(n): keras.ops.convert_to_numpy(x) for n, x in enumerate(variables)}
        part = self._folder / f"{name}.part"
        with open(part, "wb") as file:
            np.savez(file, **arrays, **more)
        os.replace(part, self._folder / name)
