"""One training of the demo, in a process of its own so that its time and memory are its own."""

import json
import resource
import sys
import time
from pathlib import Path

import keras
import numpy as np

from performer.demo import corpus, model

HELD_OUT = 64  # sequences, at most
BANDS = ((0, 256), (256, 1024), (1024, 2048), (2048, 1 << 62))  # of positions


class Budget(keras.callbacks.Callback):
    """Spends `steps` steps or `seconds` (0: no limit), whichever ends first.

    The learning rate warms up over the first tenth of the budget and falls as a cosine over the
    rest. The first step, which traces the graph, does not count against `seconds`. Keeps the loss
    and the time of every step.
    """

    HIGHEST, LOWEST = 3e-3, 1.5e-4

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
        cosine = (1 + np.cos(np.pi * (share - 0.1) / 0.9)) / 2
        rate = self.LOWEST + (self.HIGHEST - self.LOWEST) * min(share / 0.1, cosine)
        self.model.optimizer.learning_rate = rate
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Reads the clock and the loss of this batch alone."""
        self.times.append(time.perf_counter() - self.start)
        mean = float(logs["loss"]) / np.log(2)  # of all steps so far, in bits
        self.losses.append(mean * (batch + 1) - sum(self.losses))
        if self.spent() >= 1:
            self.model.stop_training = True


def train(kind, text, *, length, steps, seconds, save=None):
    """Trains the model of one kind and measures it.

    Args:
        kind: "linear", "exact" or "none".
        text: `uint8` array `[N]`.
        length: Length L of the sequences.
        steps: Number of steps, one sequence each.
        seconds: Wall time after which to stop before that; 0 for no limit.
        save: Path of a `.keras` file to write, or `None`.

    Returns:
        A dict: `losses` (bits per byte of every step), `times` (seconds of every step, 0 for the
        first, which traces the graph), `held_out` (bits per byte), `bands`
        (the same by position), `step_seconds` (median), `steps`, `peak_mib`.
    """
    network = model.build(kind)
    network.compile(
        keras.optimizers.Adam(global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rows, held_out = corpus.split(text, length)
    order = np.random.default_rng(0).permutation(np.arange(steps) % len(rows))
    batch = rows[order].astype(np.int32)
    watch = Budget(steps, seconds)
    network.fit(batch[:, :-1], batch[:, 1:], batch_size=1, shuffle=False, callbacks=[watch])
    bits = bits_by_position(network, _spread(held_out, HELD_OUT))
    if save:
        network.save(save)
        restored = keras.models.load_model(save)
        probe = held_out[:1, :-1].astype(np.int32)
        if not np.array_equal(network(probe), restored(probe)):
            raise RuntimeError("the model that was saved and reloaded predicts other values")
    return {
        "losses": watch.losses,
        "times": [0.0, *watch.times[1:]],
        "held_out": float(bits.mean()),
        "bands": [float(bits[a:b].mean()) for a, b in BANDS if a < length],
        "step_seconds": float(np.median(watch.times[1:] or watch.times)),
        "steps": len(watch.times),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _spread(rows, most):
    """At most `most` of `rows`, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, most).astype(int))]


def bits_by_position(network, rows):
    """Returns the mean loss of every position, `[L]`, in bits."""
    total = np.zeros(rows.shape[1] - 1)
    for row in rows.astype(np.int32):
        loss = keras.losses.sparse_categorical_crossentropy(
            row[None, 1:], network(row[None, :-1]), from_logits=True
        )
        total += np.asarray(loss)[0] / np.log(2)
    return total / len(rows)


def main():
    """Reads the arguments of `train` as JSON from the command line, writes its result as JSON."""
    task = json.loads(sys.argv[1])
    text = np.load(task.pop("text"))
    result = Path(task.pop("result"))
    result.write_text(json.dumps(train(text=text, **task)))


if __name__ == "__main__":
    main()
