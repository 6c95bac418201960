"""Uses the package for a long time, and fails where memory grows or a bit changes.

    python tests/building/soak.py --seconds 90 [--plot FILE]

Each round trains, redraws, streams, generates, saves and loads, and calls attention from several
threads at once. All but the training has the bits of the first round. Memory (what is resident)
may not be larger in the last quarter of the time than in the second by more than GROWTH.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import performer

GROWTH = 0.01  # of the memory
THREADS = 4
VOCABULARY = 32


def main() -> int:
    """Runs rounds until the time is over; returns nonzero where something changed or grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--plot", metavar="FILE", help="draws memory over time")
    arguments = parser.parse_args()
    start, times, sizes = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        expected = soak.results()
        while time.monotonic() - start < arguments.seconds:
            soak.train()
            changed = [
                name
                for name, result in soak.results().items()
                if not np.array_equal(result, expected[name], equal_nan=True)
            ]
            if changed:
                print(f"soak: round {len(times) + 1} changed {', '.join(changed)}")
                return 1
            times.append(time.monotonic() - start)
            sizes.append(resident())
    grown = growth(times, sizes)
    print(
        f"soak: {len(times)} rounds in {times[-1]:.0f} s, {sizes[-1]:.0f} MiB resident, "
        f"{100 * grown:+.2f} % from the second to the last quarter (at most {100 * GROWTH:.0f} %)"
    )
    if arguments.plot:
        plot(times, sizes, arguments.plot)
    return int(grown > GROWTH)


class Soak:
    """What a round does."""

    def __init__(self, folder: Path):
        self.folder = folder
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, VOCABULARY, (2, 300))
        self.inputs = [random.normal(size=(2, 700, 4, 16)).astype("float32") for _ in range(3)]
        self.projection = performer.orthogonal_projection(32, 16, seed=1)
        self.random = random
        self.fixed, self.trained = _model(), _model(redraw_interval=3, dropout=0.1)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.trained.compile("adam", loss)
        self.checkpoint = tf.train.Checkpoint(model=self.trained)
        self.manager = tf.train.CheckpointManager(
            self.checkpoint, str(folder / "checkpoints"), max_to_keep=2
        )
        self.step = tf.function(
            lambda token, state: self.fixed(token, initial_state=state, return_state=True)
        )
        self.attend = tf.function(self._attend)

    def train(self):
        """Some steps, on sequences of a length that changes; then a checkpoint and a redraw."""
        length = int(self.random.integers(20, 300))
        for _ in range(4):
            self.trained.train_on_batch(self.tokens[:, :length], self.tokens[:, 1 : length + 1])
        for layer in performer.callbacks.linear_layers(self.trained):
            layer.redraw()
        self.manager.save()
        self.checkpoint.restore(self.manager.latest_checkpoint).expect_partial()

    def results(self) -> dict:
        """What has the same bits in every round, by name."""
        out, gradient = self.attend(*self.inputs)
        found = {"attention": out.numpy(), "gradient": gradient.numpy()}
        found["streamed"] = self._stream()
        for i, options in enumerate(({}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 0})):
            prompt = self.tokens[:, :50]
            found[f"text {i}"] = performer.generate(self.fixed, prompt, 20, seed=i, **options)
        path = self.folder / "model.keras"
        self.fixed.save(path)
        loaded = keras.models.load_model(path)
        found["loaded"] = loaded(self.tokens[:, :40]).numpy()
        found["whole"] = self.fixed(self.tokens[:, :40]).numpy()
        found["threads"] = self._threads()
        return found

    def _attend(self, query, key, value):
        with tf.GradientTape() as tape:
            tape.watch(key)
            out = performer.favor_attention(query, key, value, self.projection, causal=True)
        return out, tape.gradient(out, key)

    def _stream(self):
        state, parts = self.fixed.get_initial_state(2), []
        for i in range(30):
            part, state = self.step(tf.constant(self.tokens[:, i : i + 1]), state)
            parts.append(part.numpy())
        return np.concatenate(parts, 1)

    def _threads(self):
        """The results of attention that several threads call at once, on other lengths each."""
        found: list = [None] * THREADS

        def work(i):
            cut = [x[:, : 100 * (i + 1)] for x in self.inputs]
            found[i] = np.sum(performer.favor_attention(*cut, self.projection), axis=(0, 2, 3))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return np.concatenate(found)


def _model(**options):
    keras.utils.set_random_seed(1)
    decoder = performer.PerformerDecoder(
        32,
        2,
        supports=16,
        dropout=options.pop("dropout", 0),
        rotary_embedding=performer.RotaryEmbedding(),
        attention_options=options,
        seed=1,
    )
    model = performer.StreamingSequential(
        [keras.layers.Embedding(VOCABULARY, 16), decoder, keras.layers.Dense(VOCABULARY)]
    )
    model(tf.zeros([1, 1], tf.int32))
    return model


def resident() -> float:
    """MiB of memory that is resident, without what the C library keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(times, sizes) -> float:
    """The share by which memory is larger in the last quarter of the time than in the second."""
    times, sizes = np.array(times), np.array(sizes)
    quarter = np.minimum(4 * times / times[-1], 3.99).astype(int)
    before, after = (np.median(sizes[quarter == i]) for i in (1, 3))
    return float(after / before - 1)


def plot(times, sizes, path):
    """Draws memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(np.array(times) / 60, sizes, linewidth=0.8)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, 1.1 * max(sizes)))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
