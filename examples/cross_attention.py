"""Cross attention: a decoder continues a text and looks up what an encoder read before it.

The encoder's output is summarized once, into a state whose size does not depend on its length.
Every step of generation reads that state; nothing of the encoder is kept besides.
"""

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, PerformerEncoder, TokenAndPositionEmbedding
from performer.demo import corpus

CONTEXT, LENGTH, WIDTH = 384, 128, 64


def build():
    """Returns the layers: embedding, encoder, decoder, logits; and the model made of them."""
    embed = TokenAndPositionEmbedding(256, CONTEXT, WIDTH)
    options = {"intermediate_dim": 4 * WIDTH, "num_heads": 4, "supports": 64}
    encoder = PerformerEncoder(**options, normalize_first=True)
    decoder = PerformerDecoder(**options, normalize_first=True, delay_keys=True)
    logits = keras.layers.Dense(256)
    context, text = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    model = keras.Model([context, text], logits(decoder(embed(text), encoder(embed(context)))))
    return embed, encoder, decoder, logits, model


def main(steps=30):
    """Trains, then decodes from the encoder's state; returns losses and the largest difference."""
    keras.utils.set_random_seed(0)
    rows, held_out = corpus.split(corpus.load([], most=1_000_000), CONTEXT + LENGTH)
    rows = np.random.default_rng(0).permutation(rows)[: 4 * steps].astype("int32")
    embed, encoder, decoder, logits, model = build()
    model.compile(
        keras.optimizers.Adam(4e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )

    def inputs(rows):  # (context, text), and the text one byte on
        return [rows[:, :CONTEXT], rows[:, CONTEXT:-1]], rows[:, CONTEXT + 1 :]

    before = model.evaluate(*inputs(held_out[:4].astype("int32")), verbose=0)
    model.fit(*inputs(rows), batch_size=4, verbose=2)
    after = model.evaluate(*inputs(held_out[:4].astype("int32")), verbose=0)
    print(f"loss on held-out text: {before:.2f} before training, {after:.2f} after")

    (context, text), _ = inputs(held_out[:1].astype("int32"))
    whole = model([context, text])
    state = decoder.get_initial_state(1, encoder(embed(context)))  # the context can go now
    position = embed.get_initial_state(1)

    @tf.function
    def step(token, position, state):
        x, position = embed(token, initial_state=position, return_state=True)
        x, state = decoder(x, initial_state=state, return_state=True)
        return logits(x), position, state

    outputs = []
    for i in range(text.shape[1]):
        output, position, state = step(text[:, i : i + 1], position, state)
        outputs.append(output)
    difference = float(tf.reduce_max(abs(tf.concat(outputs, 1) - whole)))
    print(f"{len(outputs)} steps that read the encoder's state: the same within {difference:.1e}")
    return before, after, difference


if __name__ == "__main__":
    main()
