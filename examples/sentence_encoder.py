"""A trained sentence encoder gets linear attention: converted, calibrated, distilled.

multilingual-e5-small or all-MiniLM-L6-v2, where their packages are there (e5.py and minilm.py say
how), else small_encoder.py; the name of one of these files chooses, and a number M. Texts are the
documentation of Python. What counts is how close embeddings stay to those of the original: the mean
cosine, and which share of each text's five nearest neighbours are the same. With `--together 60`
features of all layers are then trained by the embeddings of other texts, docstrings: 60 steps of 4.
Seconds are those of processors.
"""

import argparse
import importlib.util
import time

import keras
import numpy as np

import e5
import minilm
import small_encoder
from performer import convert

SOURCES = {"e5": e5, "minilm": minilm, "small_encoder": small_encoder}
KINDS = {
    "features, window and 32 keys": {"exact_window": 64, "exact_keys": 32},
    "features and window": {"exact_window": 64},
    "features only": {},
    "window only": {"exact_window": 64, "far_bias": -1e4},  # features of no weight
}


def neighbours(embeddings, count=5):
    """The nearest other rows of each row."""
    return np.argsort(2 * np.eye(len(embeddings)) - embeddings @ embeddings.T)[:, :count]


def compare(embeddings, original):
    """Mean cosine of two embeddings of the same texts, and the share of common neighbours."""
    pairs = zip(neighbours(embeddings), neighbours(original), strict=True)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in pairs])
    return float(np.mean(np.sum(embeddings * original, 1))), float(recall)


def main(
    source=None,
    length=512,
    fitted=32,
    held_out=48,
    supports=64,
    kinds=KINDS,
    together=0,
    **options,
):
    """Returns {kind: {what was done: (cosine, recall)}} of texts that were held out."""
    keras.utils.set_random_seed(0)
    there = [x for x in SOURCES if all(map(importlib.util.find_spec, SOURCES[x].PACKAGES))]
    source = SOURCES[source or there[0]]
    exact, tokens = source.encoder(length), source.tokenizer(length)
    texts, _ = small_encoder.pieces(length * 2 // 3)
    sample, texts = tokens(texts[:fitted]), tokens(texts[fitted : fitted + held_out])
    others = tokens(small_encoder.docstrings(length * 2 // 3)[: 5 * together]) if together else None
    original, table = exact.predict(texts, 4, verbose=0), {}
    different = (np.sum(original @ original.T) - len(texts)) / (len(texts) * (len(texts) - 1))
    print(f"original: mean cosine of two different texts {different:.3f}")

    def measure(kind, done, model, start):
        seconds = time.process_time() - start
        found = compare(model.predict(texts, 4, verbose=0), original)
        table.setdefault(kind, {})[done] = found
        print(f"{kind}, {done}, {seconds:.0f} s: cosine {found[0]:.3f}, recall {found[1]:.2f}")

    for kind in kinds:
        start = time.process_time()
        sizes = {"supports": supports, "feature_map": "learned", "seed": 1, **KINDS[kind]}
        linear = convert.replace_attention(exact, **sizes)
        measure(kind, "converted", linear, start)
        if kind != "window only":
            start = time.process_time()
            print(convert.calibrate(linear, sample))
            measure(kind, "calibrated", linear, start)
            start = time.process_time()
            print(convert.distill(linear, exact, sample, **options))
            measure(kind, "distilled", linear, start)
        if kind != "window only" and together:
            start = time.process_time()
            embedded = {**options, "steps": 0, "end_to_end": together}
            print(convert.distill(linear, exact, others, **embedded))
            measure(kind, "distilled by embeddings", linear, start)
    return table


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("source", nargs="?", choices=SOURCES)
    arguments.add_argument("supports", nargs="?", type=int, default=64)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments.add_argument("--together", type=int, default=0)
    main(**vars(arguments.parse_args()))
