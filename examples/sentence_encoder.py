"""A trained sentence encoder gets linear attention: converted, calibrated, distilled.

all-MiniLM-L6-v2 where its package is there (minilm.py says how), else small_encoder.py. Texts are
the documentation of Python. What counts is how close embeddings stay to those of the original: the
mean cosine, and which share of each text's five nearest neighbours are the same.
"""

import keras
import numpy as np

import minilm
import small_encoder
from performer import convert

KINDS = {
    "features and window": {"exact_window": 64},
    "features only": {},
    "window only": {"exact_window": 64, "far_bias": -1e4},  # features of no weight
}


def neighbours(embeddings, count=5):
    """The nearest other rows of each row."""
    cosines = embeddings @ embeddings.T - 2 * np.eye(len(embeddings))
    return np.argsort(-cosines, axis=1)[:, :count]


def compare(embeddings, original):
    """Mean cosine of two embeddings of the same texts, and the share of common neighbours."""
    pairs = zip(neighbours(embeddings), neighbours(original), strict=True)
    recall = np.mean([len(set(a) & set(b)) / 5 for a, b in pairs])
    return float(np.mean(np.sum(embeddings * original, 1))), float(recall)


def main(length=512, fitted=32, held_out=48, supports=64, small=False, kinds=KINDS, **options):
    """Returns {kind: {what was done: (cosine, recall)}} of texts that were held out."""
    keras.utils.set_random_seed(0)
    source = small_encoder if small or minilm.folder() is None else minilm
    exact, tokens = source.encoder(length), source.tokenizer(length)
    texts, _ = small_encoder.pieces(length * 2 // 3)
    sample, texts = tokens(texts[:fitted]), tokens(texts[fitted : fitted + held_out])
    original, table = exact.predict(texts, 4, verbose=0), {}

    def measure(kind, done, model):
        found = compare(model.predict(texts, 4, verbose=0), original)
        table.setdefault(kind, {})[done] = found
        print(f"{kind}, {done}: cosine {found[0]:.3f}, recall of neighbours {found[1]:.2f}")

    for kind in kinds:
        linear = convert.replace_attention(
            exact, supports=supports, feature_map="learned", seed=1, **KINDS[kind]
        )
        measure(kind, "converted", linear)
        if kind != "window only":
            print(convert.calibrate(linear, sample))
            measure(kind, "calibrated", linear)
            print(convert.distill(linear, exact, sample, **options))
            measure(kind, "distilled", linear)
    return table


if __name__ == "__main__":
    main()
