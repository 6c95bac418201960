"""One training of the demo, in a process of its own so that its time and memory are its own."""

import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from performer.demo import corpus, model

HELD_OUT = 32  # sequences, at most
STRETCH = 64  # positions whose mean loss is one point of the picture
BANDS = ((0, 256), (256, 1024), (1024, 2048), (2048, 1 << 62))  # of positions


class Budget(keras.callbacks.Callback):
    """Spends `steps` steps or `seconds` (0: no limit), whichever ends first.

    The learning rate warms up over the first fifth of the budget and falls as a cosine over the
    rest. The first step, which traces the graph, does not count against `seconds`. Keeps the loss
    and the time of every step.
    """

    HIGHEST, LOWEST, WARM_UP = 6e-3, 3e-4, 0.2

    def __init__(self, steps, seconds):
        super().__init__()
        self.steps, self.seconds, self.losses, self.times = steps, seconds, [], []

    def spent(self):
        """Returns the share of the budget that is spent, in [0, 1]."""
        share = len(self.times) / self.steps
        if self.seconds:
            share = max(share, sum(self.times[1:]) / self.seconds)
        return min(share, 1.0)

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the learning rate and starts the clock."""
        share = self.spent()
        cosine = (1 + np.cos(np.pi * (share - self.WARM_UP) / (1 - self.WARM_UP))) / 2
        rate = self.LOWEST + (self.HIGHEST - self.LOWEST) * min(share / self.WARM_UP, cosine)
        self.model.optimizer.learning_rate = rate
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Reads the clock and the loss of this batch alone."""
        self.times.append(time.perf_counter() - self.start)
        mean = float(logs["loss"]) / np.log(2)  # of all steps so far, in bits
        self.losses.append(mean * (batch + 1) - sum(self.losses))
        if self.spent() >= 1:
            self.model.stop_training = True


class Progress(keras.callbacks.Callback):
    """Prints how far a training is, a line every few seconds, and how far it came at its end."""

    EVERY = 5  # seconds
    RECENT = 20  # steps whose mean loss is shown

    def __init__(self, budget):
        super().__init__()
        self.budget = budget

    def on_train_begin(self, logs=None):
        """Starts the clock."""
        self.start = self.printed = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        """Prints a line, if it is time for one."""
        if time.monotonic() - self.printed >= self.EVERY:
            most = "at most " if self.budget.seconds else ""
            self._print(f"step {len(self.budget.times)} of {most}{self.budget.steps}")

    def on_train_end(self, logs=None):
        """Prints the number of steps that were made."""
        self._print(f"{len(self.budget.times)} steps")

    def _print(self, steps):
        self.printed = time.monotonic()
        recent = np.mean(self.budget.losses[-self.RECENT :])
        seconds = self.printed - self.start
        print(f"  {steps}: {recent:.3f} bits per byte, {seconds:.0f} s", flush=True)


def train(kind, text, *, length, steps, seconds, save=None):
    """Trains the model of one kind and measures it.

    Args:
        kind: A key of `model.KINDS`.
        text: `uint8` array `[N]`.
        length: Length L of the sequences.
        steps: Number of steps, one sequence each.
        seconds: Wall time after which to stop before that; 0 for no limit.
        save: Path of a `.keras` file to write, or `None`. A file of that name stays as it is until
            the new one is complete.

    Returns:
        A dict: `losses` (bits per byte of every step), `times` (seconds of every step, 0 for the
        first, which traces the graph), `held_out` (bits per byte), `bands` (the same by position),
        `positions` (the same in stretches of `STRETCH` positions), `step_seconds` (median),
        `steps`, `peak_mib`.

    Raises:
        OSError: The file cannot be written.
    """
    network = model.build(kind)
    network.compile(
        keras.optimizers.Adam(beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rows, held_out = corpus.split(text, length)
    order = np.random.default_rng(0).permutation(np.arange(steps) % len(rows))
    batch = rows[order].astype(np.int32)
    watch = Budget(steps, seconds)
    network.fit(
        batch[:, :-1],
        batch[:, 1:],
        batch_size=1,
        shuffle=False,
        callbacks=[watch, Progress(watch)],
        verbose=0,  # the bar of Keras ends at the number of steps that were planned
    )
    bits = bits_by_position(network, _spread(held_out, HELD_OUT))
    if save:
        save_model(network, Path(save), held_out[:1, :-1].astype(np.int32))
    return {
        "losses": watch.losses,
        "times": [0.0, *watch.times[1:]],
        "held_out": float(bits.mean()),
        "bands": [float(bits[a:b].mean()) for a, b in BANDS if a < length],
        "positions": [
            float(bits[a : a + STRETCH].mean()) for a in range(0, length - STRETCH + 1, STRETCH)
        ],
        "step_seconds": float(np.median(watch.times[1:] or watch.times)),
        "steps": len(watch.times),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def save_model(network, path, probe):
    """Saves a model beside `path`, checks what it predicts for `probe`, and moves it there."""
    partial = path.with_name(f"{path.stem}.partial.keras")
    try:
        network.save(partial)
        restored = keras.models.load_model(partial)
        if not np.array_equal(network(probe), restored(probe)):
            raise RuntimeError("the model that was saved and reloaded predicts other values")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _spread(rows, most):
    """At most `most` of `rows`, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]


def bits_by_position(network, rows):
    """Returns the mean loss of every position, `[L]`, in bits."""

    @tf.function(autograph=False)
    def loss(row):
        return keras.losses.sparse_categorical_crossentropy(
            row[:, 1:], network(row[:, :-1]), from_logits=True
        )

    losses = [loss(row[tf.newaxis])[0] for row in tf.constant(rows, tf.int32)]
    return np.mean(losses, 0, np.float64) / np.log(2)


def main():
    """Trains in a process of its own, as `report` starts it.

    The only argument is JSON: the arguments of `train` but the text, its size `text_bytes`, and
    the descriptor `result` of a pipe. The text comes by standard input, the result of `train` goes
    to the pipe as JSON: {"error": message} where the model cannot be saved.
    """
    task = json.loads(sys.argv[1])
    text = np.frombuffer(sys.stdin.buffer.read(task.pop("text_bytes")), np.uint8)
    threading.Thread(target=wait_for_end, args=(0, lambda: os._exit(1)), daemon=True).start()
    with os.fdopen(task.pop("result"), "w") as result:
        try:
            answer = train(text=text, **task)
        except OSError as error:
            answer = {"error": f"{error.strerror or error}"}
        json.dump(answer, result)


def wait_for_end(descriptor, then):
    """Calls `then` when the process at the other end of a pipe has closed it, or is gone."""
    while os.read(descriptor, 1):
        pass
    then()


if __name__ == "__main__":
    main()
