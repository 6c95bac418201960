"""Recall of pairs that were read before: what a window, features and both can do, and their state.

Multi-query associative recall (Arora et al., https://arxiv.org/abs/2312.04927): a sequence holds
pairs of a key and its value, and later asks for the values of its keys. Most pairs lie beyond the
window (of 64, so at most 128 positions back), the others within it. Chance is 1 in 128.
"""

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, feature_maps

SYMBOLS, WIDTH, HEADS, WINDOW, BATCH = 128, 128, 2, 64, 16
MODELS = {
    "window alone": {"supports": 1, "exact_window": WINDOW, "far_bias": -1e4},
    "features alone": {"supports": 64},
    "features alone, state as both": {"supports": 64 + 4 * WINDOW},
    "both": {"supports": 64, "exact_window": WINDOW},
    "both, 256 features": {"supports": 256, "exact_window": WINDOW},
    "exact": {"attention_method": "quadratic"},
}


def draw(rng, count, pairs):
    """Sequences, the values that their last `pairs` positions ask for, and which are far."""
    keys = np.argsort(rng.random((count, SYMBOLS)), 1)[:, :pairs]
    values, near = SYMBOLS + rng.integers(0, SYMBOLS, keys.shape), pairs // 5
    order = np.argsort(rng.random(keys.shape), 1)
    asked, answers = (np.take_along_axis(x, order, 1) for x in (keys, values))
    first, last = np.split(np.stack([keys, values], 2).reshape(count, -1), [2 * (pairs - near)], 1)
    blank = np.full((count, -first.shape[1] % WINDOW + 2 * WINDOW), 2 * SYMBOLS)
    text = np.concatenate([first, blank, last, asked], 1).astype("int32")
    return text, answers.astype("int32"), order < pairs - near


def recall(options, pairs, steps):
    """Trains a block; returns the shares of far and near pairs recalled, and bytes of state."""
    keras.utils.set_random_seed(0)
    wide = keras.initializers.RandomNormal(stddev=0.15, seed=1)  # equal keys attend to each other
    loud = feature_maps.FeatureMap(query_norm=False)  # far keys are heard from the first step on
    attention = {"kernel_initializer": wide, "feature_map": loud}
    block = PerformerDecoder(  # keys are one position late: at a value stands the key before it
        *(WIDTH, HEADS),
        normalize_first=True,
        delay_keys=True,
        attention_options=attention,
        **options,
    )
    symbols = keras.layers.Embedding(2 * SYMBOLS + 1, WIDTH, keras.initializers.RandomNormal(0, 1))
    text, answers, _ = draw(np.random.default_rng(1), BATCH * steps, pairs)
    asked = keras.layers.Cropping1D((text.shape[1] - pairs, 0))
    head = [keras.layers.LayerNormalization(), keras.layers.Dense(2 * SYMBOLS)]
    model = keras.Sequential([symbols, block, asked, *head])
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=3e-3, warmup_steps=9)
    optimizer = keras.optimizers.Adam(rate, global_clipnorm=1.0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    model.fit(text, answers, BATCH, verbose=0)
    text, answers, far = draw(np.random.default_rng(2), 4 * BATCH, pairs)
    right = np.argmax(model(text), -1) == answers
    size = 8 * WIDTH * text.shape[1]  # of exact attention: all keys and values
    if "attention_method" not in options:
        size = sum(x.numpy().nbytes for x in tf.nest.flatten(block.get_initial_state(1)))
    return right[far].mean(), right[~far].mean(), size


def main(pairs=64, steps=200, models=tuple(MODELS)):
    """Prints a table; returns its rows by model."""
    table = {name: recall(MODELS[name], pairs, steps) for name in models}
    print(f"{pairs} pairs, {steps} steps         far pairs  near pairs  bytes of state")
    for name, (far, near, size) in table.items():
        print(f"{name:32} {far:6.3f}      {near:6.3f}  {size:14,}")
    return table


if __name__ == "__main__":
    main()
