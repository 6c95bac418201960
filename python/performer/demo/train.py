"""One training of the demo, in a process of its own so that its time and memory are its own."""

import json
import resource
import sys
import time
from pathlib import Path

import keras
import numpy as np

from performer.demo import corpus, model

BANDS = ((0, 256), (256, 1024), (1024, 2048), (2048, 1 << 62))  # of positions


class Stop(keras.callbacks.Callback):
    """Keeps the loss and time of every step; stops after `seconds` (0: never).

    The first step, which traces the graph, does not count against `seconds`.
    """

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.losses, self.times = seconds, [], []

    def on_train_batch_begin(self, batch, logs=None):
        """Starts the clock."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        """Reads the clock and the loss of this batch alone."""
        self.times.append(time.perf_counter() - self.start)
        mean = float(logs["loss"]) / np.log(2)  # of all steps so far, in bits
        self.losses.append(mean * (batch + 1) - sum(self.losses))
        if self.seconds and sum(self.times[1:]) > self.seconds:
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
        A dict: `losses` (bits per byte of every step), `held_out` (bits per byte), `bands`
        (the same by position), `step_seconds` (median), `steps`, `peak_mib`.
    """
    network = model.build(kind)
    rate = keras.optimizers.schedules.CosineDecay(
        1e-4, steps, warmup_target=3e-3, warmup_steps=max(1, steps // 10), alpha=0.05
    )
    network.compile(
        keras.optimizers.Adam(rate, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    rows, held_out = corpus.split(text, length)
    order = np.random.default_rng(0).permutation(np.arange(steps) % len(rows))
    batch = rows[order].astype(np.int32)
    watch = Stop(seconds)
    network.fit(batch[:, :-1], batch[:, 1:], batch_size=1, shuffle=False, callbacks=[watch])
    bits = bits_by_position(network, held_out[:8])
    if save:
        network.save(save)
        restored = keras.models.load_model(save)
        probe = held_out[:1, :-1].astype(np.int32)
        if not np.array_equal(network(probe), restored(probe)):
            raise RuntimeError("the model that was saved and reloaded predicts other values")
    return {
        "losses": watch.losses,
        "held_out": float(bits.mean()),
        "bands": [float(bits[a:b].mean()) for a, b in BANDS if a < length],
        "step_seconds": float(np.median(watch.times[1:] or watch.times)),
        "steps": len(watch.times),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


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
