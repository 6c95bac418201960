"""Recall of pairs that were read before: what a window, features and both can do, and their state.

Multi-query associative recall (Arora et al., https://arxiv.org/abs/2312.04927): a sequence holds
pairs of a key and its value, and later asks for the values of its keys. Most pairs lie beyond the
window (of 64, so at most 128 positions back), a quarter as many within it. Chance is 1 in 128.
"""

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, feature_maps

SYMBOLS, WIDTH, HEADS, WINDOW, BATCH = 128, 128, 2, 64, 16
EXACT, ALONE = {"attention_method": "quadratic"}, {"exact_window": WINDOW, "far_bias": -1e4}
MODELS = {"exact": EXACT, "window alone": {"supports": 1, **ALONE}}
for m in (16, 64, 256):  # near rows take as many bytes as about 4 WINDOW features
    MODELS |= {f"features alone, {n}": {"supports": n} for n in (m, m + 4 * WINDOW)}
    MODELS[f"both, {m}"] = {"supports": m, "exact_window": WINDOW}


def draw(rng, count, pairs):
    """Sequences, the values that their last positions ask for, and which are far."""
    keys = np.argsort(rng.random((count, SYMBOLS)), 1)[:, : pairs + pairs // 4]
    values = SYMBOLS + rng.integers(0, SYMBOLS, keys.shape)
    order = np.argsort(rng.random(keys.shape), 1)
    asked, answers = (np.take_along_axis(x, order, 1) for x in (keys, values))
    told = np.stack([keys, values], 2).reshape(count, -1)
    blank = np.full((count, -2 * pairs % WINDOW + 2 * WINDOW), 2 * SYMBOLS)
    text = np.concatenate([told[:, : 2 * pairs], blank, told[:, 2 * pairs :], asked], 1)
    return text.astype("int32"), answers.astype("int32"), order < pairs


def recall(options, pairs, steps):
    """Trains a block; returns the shares of far and near pairs recalled, and bytes of state."""
    keras.utils.set_random_seed(0)
    alike = keras.initializers.RandomNormal(stddev=0.1, seed=1)  # equal keys attend to each other
    loud = feature_maps.FeatureMap(query_norm=False)  # far keys are heard from the first step on
    more = {"attention_options": {"kernel_initializer": alike, "feature_map": loud}, **options}
    # Keys are one position late: at a value stands the key before it.
    block = PerformerDecoder(WIDTH, HEADS, normalize_first=True, delay_keys=True, **more)
    symbols = keras.layers.Embedding(2 * SYMBOLS + 1, WIDTH, keras.initializers.RandomNormal(0, 1))
    text, answers, _ = draw(np.random.default_rng(1), BATCH * steps, pairs)
    asked = keras.layers.Cropping1D((text.shape[1] - answers.shape[1], 0))
    norm, head = keras.layers.LayerNormalization(), keras.layers.Dense(2 * SYMBOLS)
    model = keras.Sequential([symbols, block, asked, norm, head])
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=3e-3, warmup_steps=9)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), loss, jit_compile=False)
    model.fit(text, answers, BATCH, verbose=0)
    text, answers, far = draw(np.random.default_rng(2), 4 * BATCH, pairs)
    right = np.argmax(model.predict(text, BATCH, verbose=0), -1) == answers
    state = [np.zeros([2, WIDTH, text.shape[1]], "float32")]  # exact attention: keys and values
    state = state if options == EXACT else tf.nest.flatten(block.get_initial_state(1))
    return right[far].mean(), right[~far].mean(), sum(np.asarray(x).nbytes for x in state)


def main(pairs=64, steps=60, models=tuple(MODELS)):
    """Prints a table; returns its rows by model."""
    print(f"{pairs} pairs, {steps} steps    far    near  bytes of state")
    table = {}
    for name in models:
        table[name] = recall(MODELS[name], pairs, steps)
        print("{:20} {:6.3f}  {:6.3f}  {:14,}".format(name, *table[name]), flush=True)
    return table


if __name__ == "__main__":
    main()
