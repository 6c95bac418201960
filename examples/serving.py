"""Serves an exported model where TensorFlow is installed and this package is not.

A SavedModel holds the attention operators by name. Whoever loads it needs the one file in which
they are compiled, loaded before; here a second process does, with `tf.load_op_library`.

    python examples/serving.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What a server runs: TensorFlow, two paths, and nothing else.
SERVER = """
import sys
import numpy as np
import tensorflow as tf

library, model, data, output = sys.argv[1:]
tf.load_op_library(library)
loaded = tf.saved_model.load(model)
np.save(output, loaded.serve(np.load(data)))
print("performer" in sys.modules)
"""


def main():
    """Exports a classifier, serves it in a process without the package, compares."""
    import keras
    import numpy as np

    import performer

    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(1000, 32)(tokens)
    x = x + performer.Performer(num_heads=4, key_dim=8, supports=64, seed=1)(x, x)
    scores = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(tokens, scores)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.export(folder / "model", verbose=False)
        shutil.copy(performer.library.status().path, folder / "attention.so")
        data = np.random.default_rng(0).integers(0, 1000, [2, 500]).astype("int32")
        np.save(folder / "data.npy", data)
        paths = [folder / name for name in ("attention.so", "model", "data.npy", "scores.npy")]
        # -I: no PYTHONPATH, no current directory.
        command = [sys.executable, "-I", "-c", SERVER, *map(str, paths)]
        served = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        print("package imported by the server:", served.stdout.strip())
        same = np.array_equal(np.load(folder / "scores.npy"), model(data))
        print("served scores equal those of the model, bit for bit:", same)


if __name__ == "__main__":
    main()
