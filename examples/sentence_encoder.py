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
from neighbours import compare
from performer import convert
from python_texts import docstrings, documentation

SOURCES = {"e5": e5, "minilm": minilm, "small_encoder": small_encoder}
KINDS = {
    "features, window and 32 keys": {"exact_window": 64, "exact_keys": 32},
    "features and window": {"exact_window": 64},
    "features only": {},
    "window only": {"exact_window": 64, "far_bias": -1e4},  # features of no weight
}


def main(source=None, length=512, texts=(32, 48), supports=64, kinds=KINDS, together=0, **options):
    """Fits to as many texts as the first number says, and measures by as many as the second.

    Returns {kind: {what was done: (cosine, recall)}}.
    """
    keras.utils.set_random_seed(0)
    there = [x for x in SOURCES if all(map(importlib.util.find_spec, SOURCES[x].PACKAGES))]
    source, words = SOURCES[source or there[0]], length * 2 // 3
    exact, tokens = source.encoder(length), source.tokenizer(length)
    sample, held_out = np.split(tokens(documentation(words)[0][: sum(texts)]), [texts[0]])
    original, table = exact.predict(held_out, 4, verbose=0), {}
    different = (np.sum(original @ original.T) - texts[1]) / (texts[1] * (texts[1] - 1))
    print(f"original: mean cosine of two different texts {different:.3f}")
    steps = {
        "converted": lambda model: None,
        "calibrated": lambda model: print(convert.calibrate(model, sample)),
        "distilled": lambda model: print(convert.distill(model, exact, sample, **options)),
    }
    if together:
        others = tokens(docstrings(words)[: 5 * together])
        last = {**options, "steps": 0, "end_to_end": together}
        steps["distilled by embeddings"] = lambda model: print(
            convert.distill(model, exact, others, **last)
        )
    for kind in kinds:
        sizes = {"supports": supports, "feature_map": "learned", "seed": 1, **KINDS[kind]}
        model, table[kind] = convert.replace_attention(exact, **sizes), {}
        for done in ["converted"] if kind == "window only" else steps:
            start = time.process_time()
            steps[done](model)
            seconds = time.process_time() - start
            found = compare(model.predict(held_out, 4, verbose=0), original)
            table[kind][done] = found
            print(f"{kind}, {done}, {seconds:.0f} s: cosine {found[0]:.3f}, recall {found[1]:.2f}")
    return table


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("source", nargs="?", choices=SOURCES)
    arguments.add_argument("supports", nargs="?", type=int, default=64)
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments.add_argument("--together", type=int, default=0)
    main(**vars(arguments.parse_args()))
