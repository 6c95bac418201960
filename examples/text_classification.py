"""Text classification: which package of Python's standard library does a piece of code come from?

An encoder of linear attention over bytes, with a padding mask. The last files of every package
are held out.
"""

import sysconfig
from pathlib import Path

import keras
import numpy as np

from performer import PerformerEncoder, TokenAndPositionEmbedding

PACKAGES = ("asyncio", "email", "encodings", "unittest")
LENGTH = 512  # bytes of a piece; 0 is padding


def pieces(files):
    """Integers `(N, LENGTH)`: the files, cut into pieces, the last of each padded with 0."""
    rows = []
    for file in files:
        text = np.frombuffer(file.read_bytes().replace(b"\0", b""), np.uint8)
        for start in range(0, len(text) - LENGTH // 4, LENGTH):
            rows.append(np.resize(np.append(text[start : start + LENGTH], [0] * LENGTH), LENGTH))
    return np.array(rows[:80], "int32")  # as many of each package


def data():
    """Returns ((x, y) to train on, (x, y) held out)."""
    parts = [], []
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py"))
        for part, some in zip(parts, (files[::2], files[1::2]), strict=True):
            x = pieces(some)
            part.append((x, np.full(len(x), label)))
    return [[np.concatenate(x) for x in zip(*part, strict=True)] for part in parts]


def build():
    """Returns the model: bytes `(B, L)` to logits `(B, 4)`."""
    text = keras.Input((LENGTH,), dtype="int32")
    x = TokenAndPositionEmbedding(256, LENGTH, 64, mask_zero=True)(text)  # the mask goes with x
    x = PerformerEncoder(128, num_heads=4, supports=64, normalize_first=True)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(text, keras.layers.Dense(len(PACKAGES))(x))


def main(epochs=8):
    """Trains, and returns the accuracy on files that were held out."""
    keras.utils.set_random_seed(0)
    train, held_out = data()
    model = build()
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*train, batch_size=32, epochs=epochs, verbose=2)
    accuracy = model.evaluate(*held_out, verbose=0)[1]
    print(
        f"{len(held_out[0])} pieces held out: {accuracy:.0%} right, {1 / len(PACKAGES):.0%} by chance"
    )
    return accuracy


if __name__ == "__main__":
    main()
