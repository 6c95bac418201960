"""Serving: a model that streams, exported, and run without this package.

A SavedModel holds the step of a language model. What serves it needs TensorFlow and one library
of operators, no Python of ours: here a fresh Python that never imports `performer`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from performer import PerformerDecoder, StreamingSequential, loader

SERVER = """
import sys
import numpy as np
import tensorflow as tf

library, folder, tokens, result = sys.argv[1:]
tf.load_op_library(library)
model = tf.saved_model.load(folder)
state, outputs = model.start(), []
for token in np.load(tokens)[0]:  # one at a time, as they come
    logits, state = model.step(tf.constant([[token]]), state)
    outputs.append(logits)
assert "performer" not in sys.modules
np.save(result, tf.concat(outputs, 1))
"""


def export(model, folder):
    """Writes a SavedModel with `start() -> state` and `step(tokens, state) -> logits, state`."""
    module = tf.Module()
    module.model = model  # so that the weights are saved
    state = model.get_initial_state(1)
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), state)

    @tf.function(input_signature=[])
    def start():
        return model.get_initial_state(1)

    @tf.function(input_signature=[tf.TensorSpec([1, None], tf.int32), specs])
    def step(tokens, state):
        return model(tokens, initial_state=state, return_state=True, training=False)

    module.start, module.step = start, step
    tf.saved_model.save(module, folder)


def main():
    """Returns the largest difference between the served stream and the model's full pass."""
    keras.utils.set_random_seed(0)
    block = PerformerDecoder(intermediate_dim=64, num_heads=4, supports=32)
    model = StreamingSequential([keras.layers.Embedding(256, 32), block, keras.layers.Dense(256)])
    tokens = np.random.default_rng(0).integers(0, 256, (1, 50), "int32")
    whole = model(tokens)
    with tempfile.TemporaryDirectory() as folder:
        export(model, folder)
        given, result = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, tokens)
        arguments = [str(loader.status().path), folder, str(given), str(result)]
        subprocess.run([sys.executable, "-c", SERVER, *arguments], check=True, cwd=folder)
        difference = float(np.abs(np.load(result) - whole).max())
    print(f"served token by token: the same as the full pass within {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
