"""Recall of pairs that were read before: what a window, features and both can do, and their state.

Multi-query associative recall (Arora et al., https://arxiv.org/abs/2312.04927): a sequence holds
pairs of a key and its value, and later asks for the values of its keys. Most pairs lie beyond the
window (of 64, so at most 128 positions back), the others within it. Chance is 1 in 128.
"""

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder

SYMBOLS, WIDTH, HEADS, WINDOW = 128, 128, 2, 64
FEATURES, EVERYTHING = {"supports": 64}, {"supports": 64, "exact_window": WINDOW}
MODELS = {
    "window alone": {"supports": 1, "exact_window": WINDOW, "far_bias": -1e4},
    "features alone": FEATURES,
    "features alone, state as both": {"supports": 64 + 2 * WINDOW * 2},
    "both": EVERYTHING,
    "exact": {"attention_method": "quadratic"},
}


def draw(rng, count, pairs):
    """Sequences `(count, L)`, and the values that their last `pairs` positions ask for."""
    keys = np.argsort(rng.random((count, SYMBOLS)), 1)[:, :pairs]
    values = SYMBOLS + rng.integers(0, SYMBOLS, keys.shape)
    order = np.argsort(rng.random(keys.shape), 1)
    asked, answers = (np.take_along_axis(x, order, 1) for x in (keys, values))
    told, far = np.stack([keys, values], 2).reshape(count, -1), 2 * (pairs - pairs // 5)
    blank = np.full((count, -far % WINDOW + 2 * WINDOW), 2 * SYMBOLS)  # from block to block
    text = np.concatenate([told[:, :far], blank, told[:, far:], asked], 1)
    return text.astype("int32"), answers.astype("int32"), order < pairs - pairs // 5


def build(**options):
    """A block whose keys are one position late: at a value stands the key that it belongs to."""
    keras.utils.set_random_seed(0)
    start = keras.initializers.RandomNormal(stddev=0.15, seed=1)  # equal keys attend to each other
    options = {"attention_options": {"kernel_initializer": start}, "seed": 1, **options}
    block = PerformerDecoder(WIDTH, HEADS, normalize_first=True, delay_keys=True, **options)
    embedding = keras.layers.Embedding(2 * SYMBOLS + 1, WIDTH, embeddings_initializer="normal")
    embedding.embeddings_initializer = keras.initializers.RandomNormal(stddev=1.0, seed=1)
    head = [keras.layers.LayerNormalization(), keras.layers.Dense(2 * SYMBOLS)]
    return keras.Sequential([embedding, block, *head]), block


def recall(options, pairs, steps, batch=16):
    """Trains; returns the shares of far and of near pairs that are recalled, and bytes of state."""
    model, block = build(**options)
    rng, rate = np.random.default_rng(1), keras.optimizers.schedules.CosineDecay(3e-3, steps)
    optimizer = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(text, answers):
        with tf.GradientTape() as tape:
            loss = loss_of(answers, model(text, training=True)[:, -pairs:])
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

    for _ in range(steps):
        step(*draw(rng, batch, pairs)[:2])
    text, answers, far = draw(np.random.default_rng(2), 4 * batch, pairs)
    right = np.argmax(model.predict(text, verbose=0)[:, -pairs:], -1) == answers
    size = 8 * WIDTH * text.shape[1]  # of exact attention: all keys and values
    if options.get("attention_method") != "quadratic":
        size = sum(x.numpy().nbytes for x in tf.nest.flatten(block.get_initial_state(1)))
    return right[far].mean(), right[~far].mean(), size


def main(pairs=64, steps=150, models=tuple(MODELS)):
    """Prints a table; returns its rows by model."""
    table = {name: recall(MODELS[name], pairs, steps) for name in models}
    print(f"{pairs} pairs, {steps} steps         far pairs  near pairs  bytes of state")
    for name, (far, near, size) in table.items():
        print(f"{name:32} {far:6.3f}      {near:6.3f}  {size:14,}")
    return table


if __name__ == "__main__":
    main()
