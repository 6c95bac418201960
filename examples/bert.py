"""BERT as a Keras model that makes embeddings of texts, for the weights of minilm.py and e5.py."""

import keras
import numpy as np
from keras import layers

from performer import TokenAndPositionEmbedding

WIDTH, HEADS = 384, 12


def build(length, words, blocks, padding):
    """An encoder of random weights: words int32 `[B, length]` to embeddings `[B, 384]` of norm 1.

    Args:
        length: of texts, padding included.
        words: how many words there are.
        blocks: how many layers.
        padding: number of the word that stands behind the end of a text.
    """

    def norm(x):
        return layers.LayerNormalization(epsilon=1e-12)(x)

    tokens = keras.Input((length,), dtype="int32")
    exists = tokens != padding
    x = norm(TokenAndPositionEmbedding(words, 512, WIDTH)(tokens))
    for number in range(blocks):
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{number}")
        x = norm(x + attention(x, x, attention_mask=exists[:, None]))
        x = norm(x + layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(x)))
    x = layers.GlobalAveragePooling1D()(x, mask=exists)
    return keras.Model(tokens, layers.UnitNormalization()(x))


def with_weights(model, weights):
    """The model with weights that are given in its order, in any shape of as many numbers."""
    pairs = zip(weights, model.weights, strict=True)
    model.set_weights([np.reshape(x, w.shape) for x, w in pairs])
    return model


def cosines(encoder, tokenizer):
    """The cosines of a sentence to a similar one and to another."""
    texts = "A cat sits on the mat.", "The kitten is sitting on a rug.", "Stocks fell on Monday."
    one, similar, other = encoder(32)(tokenizer(32)(texts)).numpy()
    print(f"cosines: {one @ similar:.2f} of two cats, {one @ other:.2f} of a cat and stocks")
    return one @ similar, one @ other


def main():
    """Returns the norm of the embedding of a text, and how padding changes the embedding."""
    text = np.arange(1, 9)[None]
    model = build(12, words=100, blocks=2, padding=0)
    one = model(np.pad(text, [(0, 0), (0, 4)]))
    alone = with_weights(build(8, 100, 2, 0), model.get_weights())(text)
    norm, difference = np.linalg.norm(one), np.abs(one - alone).max()
    print(f"norm {norm:.3f}, changed by padding by {difference:.1e}")
    return norm, difference


if __name__ == "__main__":
    main()
