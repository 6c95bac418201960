"""Serving: a model that streams, exported, and run without this package.

`performer.export` writes what a server reads: once with the compiled operators, which need their
library in the server's process, and once in operations that every TensorFlow has. The server here
is a fresh Python that never imports `performer`; any program that loads SavedModels does the same.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

import performer

SERVER = """
import sys
import numpy as np
import tensorflow as tf

folder, tokens, result, *libraries = sys.argv[1:]
for library in libraries:
    tf.load_op_library(library)
model = tf.saved_model.load(folder)
start, step = model.signatures["start"], model.signatures["step"]
state, outputs = start(batch_size=tf.constant(1)), []
for token in np.load(tokens)[0]:  # one at a time, as they come
    state = step(inputs=tf.constant([[token]]), **state)
    outputs.append(state.pop("outputs"))
assert "performer" not in sys.modules
np.save(result, tf.concat(outputs, 1))
"""


def serve(folder, tokens, *libraries):
    """What a server makes of tokens that come one by one."""
    with tempfile.TemporaryDirectory() as exchange:
        given, result = Path(exchange) / "tokens.npy", Path(exchange) / "logits.npy"
        np.save(given, tokens)
        arguments = map(str, (folder, given, result, *libraries))
        subprocess.run([sys.executable, "-c", SERVER, *arguments], check=True, cwd=exchange)
        return np.load(result)


def main():
    """Returns the largest differences between both served streams and the model's full pass."""
    keras.utils.set_random_seed(0)
    block = performer.PerformerDecoder(intermediate_dim=64, num_heads=4, supports=32)
    model = performer.StreamingSequential(
        [keras.layers.Embedding(256, 32), block, keras.layers.Dense(256)]
    )
    tokens = np.random.default_rng(0).integers(0, 256, (1, 50), "int32")
    whole = model(tokens)
    with tempfile.TemporaryDirectory() as folder:
        portable = performer.export(model, Path(folder) / "portable" / "1", stream=True)
        fused = performer.export(model, Path(folder) / "fused" / "1", portable=False, stream=True)
        library = performer.library.status().path
        streams = serve(portable, tokens), serve(fused, tokens, library)
    differences = [float(np.abs(stream - whole).max()) for stream in streams]
    print("served token by token, the largest differences from the full pass:")
    for name, difference in zip(("portable", "fused"), differences, strict=True):
        print(f"  {name}: {difference:.1e}")
    return differences


if __name__ == "__main__":
    main()
