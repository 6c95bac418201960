"""A backbone of keras-hub, from a local folder with its weights, gets linear attention.

A small GPT-2 of random weights stands for a trained one. `pip install keras-hub`.
"""

import tempfile
from pathlib import Path

import keras
import numpy as np

from performer import convert


def save(folder, length, words):
    """Writes a preset, as those that can be downloaded are."""
    import keras_hub

    keras.utils.set_random_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 32, "intermediate_dim": 64}
    backbone = keras_hub.models.GPT2Backbone(words, **sizes, max_sequence_length=length)
    for weight in backbone.trainable_weights:
        if "query/kernel" in weight.path or "key/kernel" in weight.path:
            weight.assign(8 * weight)  # attends to some words more than to others
    backbone.save_to_preset(folder)


def main(length=256, words=100, steps=100):
    """Returns the relative error of the backbone's outputs, converted and distilled."""
    import keras_hub

    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "gpt2"))
        save(folder, length, words)
        exact = keras_hub.models.Backbone.from_preset(folder)
    tokens = np.random.default_rng(0).integers(0, words, [24, length])
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    linear = convert.replace_attention(
        exact, supports=32, feature_map="learned", exact_window=64, seed=1
    )
    report = convert.distill(linear, exact, inputs, steps=steps, verbose=0)
    print(report)
    return report.outputs["as it was"], report.outputs["layers"]


if __name__ == "__main__":
    main()
