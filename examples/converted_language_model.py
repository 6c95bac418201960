"""A byte-level language model, trained with exact attention, gets linear attention.

Bits per byte of text held out, with features, with a window, with both. It is Python's source.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from performer import convert
from performer.demo import corpus
from performer.demo.model import ByteEmbedding

WIDTH, HEADS, BLOCKS = 128, 4, 2


def build(length):
    """The model: bytes `[B, length]` to logits `[B, length, 256]`.

    Keys are one position late: a query finds the places that followed what it has just read.
    """
    text = keras.Input((length,), dtype="int32")
    x = ByteEmbedding(WIDTH, context=2)(text)
    start = keras.initializers.RandomUniform(-0.3, 0.3, seed=1)
    for _ in range(BLOCKS):
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, kernel_initializer=start)
        y = layers.LayerNormalization()(x)
        x = x + attention(y, layers.ZeroPadding1D((1, 0))(y)[:, :-1], use_causal_mask=True)
        hidden = layers.Dense(4 * WIDTH, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(hidden)
    return keras.Model(text, layers.Dense(256)(layers.LayerNormalization()(x)))


def divergence(teacher, student):
    """Mean Kullback-Leibler divergence of the next byte's distributions."""
    p = tf.nn.log_softmax(teacher)
    return tf.reduce_mean(tf.reduce_sum(tf.exp(p) * (p - tf.nn.log_softmax(student)), -1))


def bits(model, windows):
    """Bits per byte, of all but the first tenth of each window."""
    logits = model.predict(windows[:, :-1], 4, verbose=0)
    cross = tf.nn.sparse_softmax_cross_entropy_with_logits(windows[:, 1:], logits)
    return float(tf.reduce_mean(cross[:, cross.shape[1] // 10 :])) / np.log(2)


def main(length=512, steps=400, supports=64, fitted=32, held_out=32, **options):
    """Returns the bits per byte by what was done; `options` are those of `distill`."""
    keras.utils.set_random_seed(0)
    train, test = (x.astype("int32") for x in corpus.split(corpus.load([], 4_000_000), length))
    test, model = test[:: max(1, len(test) // held_out)][:held_out], build(length)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rows = np.random.default_rng(0).permutation(len(train))
    some, sample = train[rows[: 8 * steps]], train[rows[-fitted:], :-1]
    model.fit(some[:, :-1], some[:, 1:], batch_size=8, verbose=2)
    table = {"exact": bits(model, test)}

    def converted(**window):
        options = {"supports": supports, "feature_map": "learned", "seed": 1}
        return convert.replace_attention(model, **options, **window)

    for window in ({}, {"exact_window": 64}):
        linear, kind = converted(**window), " with window" if window else ""
        table[f"converted{kind}"] = bits(linear, test)
        convert.calibrate(linear, sample)
        table[f"calibrated{kind}"] = bits(linear, test)
        print(convert.distill(linear, model, sample, loss=divergence, **options))
        table[f"distilled{kind}"] = bits(linear, test)
    table["window alone"] = bits(converted(exact_window=64, far_bias=-1e4), test)
    for name, value in table.items():
        print(f"{name}: {value:.3f} bits per byte, {value / table['exact']:.3f} of exact")
    return table


if __name__ == "__main__":
    main(end_to_end=100)
