"""Kills processes in the middle of saving: what was saved before still loads.

    python tests/building/kills.py [--kills 10]

Each way of saving that the documentation recommends is tried. A process saves again and again, its
weights all equal to the number of the save, and is killed (SIGKILL) at a random moment. Another one
loads what is there: weights that are not all equal, or of a number that is too small, fail.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import performer
from performer.demo import train

WIDTH = 512  # so that saving takes longer than everything else


def main() -> int:
    """Tries every way; this process itself runs nothing in TensorFlow, as it is forked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    kills = parser.parse_args().kills
    random.seed(0)
    failed = 0
    for way in (CheckpointManager, SavedFile):
        within = 0
        for _ in range(kills):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                kill_while_saving(way, folder)
                saved = count(folder / "saved")
                within += count(folder / "begun") > saved
                failed += run(check, way, folder, saved) != 0
        print(f"kills: {way.__name__}: {kills} kills, {within} of them in the middle of saving")
    print(f"kills: {failed} failed")
    return int(failed > 0)


def kill_while_saving(way, folder):
    """Starts a process that saves, and kills it after its second save."""
    (folder / "begun").touch()
    (folder / "saved").touch()
    child = os.fork()
    if child == 0:
        work(save_for_ever, way, folder)
    deadline = time.monotonic() + 120
    while count(folder / "saved") < 2:
        if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > deadline:
            raise RuntimeError("the process that saves has ended by itself, or hangs")
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def run(function, *arguments) -> int:
    """Calls a function in a process of its own; returns its exit status."""
    child = os.fork()
    if child == 0:
        work(function, *arguments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def work(function, *arguments):
    """What a forked process does."""
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def save_for_ever(way, folder):
    """Saves weights that are 1, 2, ...; notes in two files which save was begun and ended."""
    saver = way(folder)
    for number in range(1, 1_000_000):
        saver.model.set_weights([np.full_like(w, number) for w in saver.model.get_weights()])
        note(folder / "begun")
        saver.save()
        note(folder / "saved")


def note(path):
    """Counts one more in a file, at once or not at all: the count is its size."""
    with path.open("ab") as file:
        file.write(b".")


def count(path):
    """What `note` has counted."""
    return path.stat().st_size


def check(way, folder, saved):
    """Raises unless what loads is one of the two last saves, and whole."""
    loader = way(folder)
    numbers = {float(x) for w in loader.load().get_weights() for x in (np.min(w), np.max(w))}
    if numbers not in ({saved}, {saved + 1}):
        raise AssertionError(f"weights hold {sorted(numbers)}; {saved} saves were complete")


def build():
    """A model whose weights are all float32."""
    inputs = keras.Input((8, WIDTH))
    block = performer.PerformerEncoder(4 * WIDTH, 8, attention_method="quadratic")
    return keras.Model(inputs, block(inputs))


class CheckpointManager:
    """`tf.train.CheckpointManager`."""

    def __init__(self, folder):
        self.model = build()
        self.checkpoint = tf.train.Checkpoint(model=self.model)
        self.manager = tf.train.CheckpointManager(self.checkpoint, str(folder / "all"), 2)

    def save(self):
        """Saves the weights."""
        self.manager.save()

    def load(self):
        """The model with the weights that were saved."""
        self.checkpoint.read(self.manager.latest_checkpoint).expect_partial()
        return self.model


class SavedFile:
    """A `.keras` file that is moved to its place when it is complete, as the demo does."""

    def __init__(self, folder):
        self.model, self.path = build(), folder / "model.keras"

    def save(self):
        """Saves the model."""
        train.save_model(self.model, self.path, np.zeros((1, 8, WIDTH), "float32"))

    def load(self):
        """The model that was saved."""
        return keras.models.load_model(self.path)


if __name__ == "__main__":
    sys.exit(main())
