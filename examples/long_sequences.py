"""Training on long sequences of which every worker has a part.

    python -m performer launch --workers 2 examples/long_sequences.py

Two workers read one row of 8192 bytes together, 4096 each. A layer exchanges one state of constant
size, and every byte is predicted from all before it, those of the other workers included.
"""

import os

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, RotaryEmbedding, parallel
from performer.demo import corpus

LENGTH, WIDTH = 8192, 64


def strategy_of_this_process():
    """The workers that TF_CONFIG names, or this process alone."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.MirroredStrategy(["CPU:0"])


def build():
    """Returns the model: bytes `(B, L)` to logits `(B, L, 256)` of the next."""
    block = PerformerDecoder(
        4 * WIDTH, 4, supports=64, normalize_first=True, rotary_embedding=RotaryEmbedding(), seed=1
    )
    layers = [keras.layers.Embedding(256, WIDTH), block, keras.layers.LayerNormalization()]
    return keras.Sequential([*layers, keras.layers.Dense(256)])


def main(steps=20, length=LENGTH):
    """Trains; returns the loss of every step, in bits per byte, the same on all workers."""
    keras.utils.set_random_seed(0)
    strategy = strategy_of_this_process()
    mesh = parallel.Mesh(strategy, timeout=300)
    with strategy.scope():
        model = build()
        model.build([None, length])
        optimizer = keras.optimizers.Adam(5e-3)
        optimizer.build(model.trainable_variables)

    def step(text, following):
        text, following = mesh.shard((text, following))
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                following, model(text), from_logits=True
            )
            share = tf.reduce_mean(losses) / mesh.sequence  # the workers' shares add up
        gradients = tape.gradient(share, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return tf.distribute.get_replica_context().all_reduce("SUM", share)

    rows, _ = corpus.split(corpus.load([], most=10_000_000), length)
    rows = np.random.default_rng(0).permutation(rows)[:steps].astype("int32")
    bits = []
    with parallel.sequence(mesh):
        run = tf.function(lambda *batch: strategy.run(step, batch), autograph=False)
        for row in rows:
            loss = run(tf.constant(row[None, :-1]), tf.constant(row[None, 1:]))
            bits.append(float(loss) / np.log(2))
    own = length // mesh.sequence
    print(f"{bits[0]:.3f} bits per byte at first, {bits[-1]:.3f} now; {own} of {length} bytes here")
    return bits


if __name__ == "__main__":
    main()
