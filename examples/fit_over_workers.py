"""`model.fit` over several workers: each has its share of every batch.

    python -m performer launch --workers 2 examples/fit_over_workers.py

A classifier learns whether the first and the last quarter of a row have the same mean colour. The
losses are those of one worker with the whole batch.
"""

import os

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerEncoder, TokenAndPositionEmbedding, parallel

LENGTH, TOKENS = 256, 16


def rows(count, seed):
    """Rows of tokens `(count, LENGTH)`, and whether they begin and end in the same half."""
    random = np.random.default_rng(seed)
    halves = random.integers(0, 2, (count, 4))
    tokens = random.integers(0, TOKENS // 2, (count, LENGTH))
    tokens += (TOKENS // 2) * np.repeat(halves, LENGTH // 4, axis=1)
    return tokens.astype("int32"), (halves[:, 0] == halves[:, 3]).astype("float32")


def build():
    """Returns the model: tokens `(B, L)` to the logit of "the same"."""
    return keras.Sequential(
        [
            keras.Input([LENGTH], dtype="int32"),
            TokenAndPositionEmbedding(TOKENS, LENGTH, 32),
            PerformerEncoder(64, 4, supports=32, seed=1),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1),
        ]
    )


def main(epochs=6, count=1024):
    """Trains; returns the loss of every epoch, the same on all workers."""
    keras.utils.set_random_seed(0)
    parallel.enable_fit()
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    else:
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    mesh = parallel.Mesh(strategy, sequence=1)
    with strategy.scope():
        model = build()
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(3e-3), loss, jit_compile=False)
    # Every worker reads all rows, and takes its share of each batch of 64.
    data = tf.data.Dataset.from_tensor_slices(rows(count, 0)).batch(64)
    history = model.fit(mesh.distribute(data), epochs=epochs, verbose=0)
    losses = history.history["loss"]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} now; 64 / {mesh.data} rows a step here")
    return losses


if __name__ == "__main__":
    main()
