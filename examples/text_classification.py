"""Text classification: which package of Python's standard library does a piece of code come from?

An encoder of linear attention over words, with a padding mask. Every second file is held out.
"""

import sysconfig
from pathlib import Path

import keras
import numpy as np

from performer import PerformerEncoder, TokenAndPositionEmbedding

PACKAGES = ("asyncio", "email", "encodings", "unittest")
WORDS, LENGTH = 2000, 128  # in the vocabulary, in a piece


def pieces(files):
    """Up to 100 pieces of 1000 characters, from all files in turn."""
    texts = [file.read_text("utf-8", "replace") for file in files]
    cut = [text[i : i + 1000] for i in range(0, 20000, 1000) for text in texts]
    return [piece for piece in cut if len(piece) > 100][:100]


def data():
    """Returns ((texts, labels) to train on, (texts, labels) held out)."""
    parts = ([], []), ([], [])
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).glob("*.py"))
        for (texts, labels), some in zip(parts, (files[::2], files[1::2]), strict=True):
            new = pieces(some)
            texts.extend(new)
            labels.extend([label] * len(new))
    return parts


def build():
    """Returns the model: words `(B, L)`, 0 for padding, to logits `(B, 4)`."""
    words = keras.Input((LENGTH,), dtype="int32")
    x = TokenAndPositionEmbedding(WORDS, LENGTH, 64, mask_zero=True)(words)  # the mask goes with x
    x = PerformerEncoder(128, num_heads=4, supports=64, normalize_first=True)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(words, keras.layers.Dense(len(PACKAGES))(x))


def main(epochs=5):
    """Trains, and returns the accuracy on files that were held out."""
    keras.utils.set_random_seed(0)
    (texts, labels), (other_texts, other_labels) = data()
    vectorize = keras.layers.TextVectorization(WORDS, output_sequence_length=LENGTH)
    vectorize.adapt(texts)
    model = build()
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(vectorize(texts), np.array(labels), batch_size=16, epochs=epochs, verbose=2)
    accuracy = model.evaluate(vectorize(other_texts), np.array(other_labels), verbose=0)[1]
    print(f"{len(other_texts)} pieces held out: {accuracy:.0%} right, 25% by chance")
    return accuracy


if __name__ == "__main__":
    main()
