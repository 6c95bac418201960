"""A causal language model over bytes: trained on whole rows, then run as a stream.

Training reads rows of 512 bytes at once. Afterwards the same layers take text in parts of any
size, and generate byte by byte, with a state of constant size instead of a cache that grows.
"""

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, RotaryEmbedding, StreamingSequential, generate
from performer.demo import corpus

LENGTH, WIDTH = 512, 96


def build():
    """Returns the model: bytes `(B, L)` to logits `(B, L, 256)` of the next."""
    block = PerformerDecoder(
        intermediate_dim=4 * WIDTH,
        num_heads=6,
        supports=64,
        activation="gelu",
        normalize_first=True,
        rotary_embedding=RotaryEmbedding(),
        delay_keys=True,
    )
    embedding = keras.layers.Embedding(256, WIDTH)
    return StreamingSequential(
        [embedding, block, keras.layers.LayerNormalization(), keras.layers.Dense(256)]
    )


def main(steps=50):
    """Trains, streams and generates; returns bits per byte at the end of training."""
    keras.utils.set_random_seed(0)
    rows, held_out = corpus.split(corpus.load([], most=1_000_000), LENGTH)
    rows = np.random.default_rng(0).permutation(rows)[: 4 * steps].astype("int32")
    model = build()
    model.compile(
        keras.optimizers.Adam(5e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(rows[:, :-1], rows[:, 1:], batch_size=4, verbose=2)
    text = held_out[:4].astype("int32")
    bits = model.evaluate(text[:, :-1], text[:, 1:], verbose=0) / np.log(2)
    print(f"{bits:.2f} bits per byte on held-out text")

    # A stream: parts of any size, each going on where the last one ended.
    whole, state, parts = model(text), model.get_initial_state(len(text)), []
    for part in np.split(text, [1, 2, 300, 407], axis=1):
        logits, state = model(part, initial_state=state, return_state=True)
        parts.append(logits)
    difference = tf.reduce_max(abs(tf.concat(parts, 1) - whole))
    size = sum(x.numpy().nbytes for x in tf.nest.flatten(state)) // len(text)
    print(f"streamed in parts: the same within {difference:.1e}; state of {size} bytes a row")

    prompt = text[0, :200]
    new = generate(model, prompt, max_new_tokens=200, temperature=0.8, top_p=0.95, seed=1)
    print(bytes(prompt.tolist() + new.tolist()).decode("utf-8", "replace"))
    return bits, float(difference)


if __name__ == "__main__":
    main()
