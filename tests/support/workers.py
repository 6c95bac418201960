"""Workers of a cluster on one machine. Run with a name of a program here, it is one of them."""

import json
import os
import signal
import subprocess
import sys
import tempfile

from performer import launch


def start(program, count, *args, timeout=150):
    """Runs a program in `count` processes: their exit codes and outputs."""
    processes, outputs = [], []
    for index, added in enumerate(launch.cluster(count)):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **added}
        outputs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - closed below
        command = [sys.executable, __file__, program, str(index), str(count), *map(str, args)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=outputs[-1], stderr=subprocess.STDOUT)
        )
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = []
    for output in outputs:
        output.seek(0)
        texts.append(output.read())
        output.close()
    return codes, texts


def results(texts):
    """What each process reported."""
    return [json.loads(text.rpartition("RESULT ")[2].splitlines()[0]) for text in texts]


def _strategy(count):
    import tensorflow as tf

    if count > 1:
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.MirroredStrategy(["CPU:0"])


def _task():
    """Rows of tokens, and a number to predict for each."""
    import numpy as np

    x = np.random.default_rng(0).integers(0, 20, (16, 64))
    return x, (x.mean(1, keepdims=True) - 10).astype("float32")


def _model(causal=False):
    import keras

    import performer

    keras.utils.set_random_seed(1)
    kind = performer.PerformerDecoder if causal else performer.PerformerEncoder
    return keras.Sequential(
        [
            keras.Input([None], dtype="int32"),
            performer.TokenAndPositionEmbedding(20, 64, 16),
            kind(32, 2, supports=16, seed=1),
            keras.layers.Dense(1),
        ]
    )


def fit(index, count):
    """Data parallel `fit`; with a mesh of one row the same, sequence parallel."""
    import keras
    import numpy as np
    import tensorflow as tf

    from performer import parallel

    parallel.enable_fit()
    strategy = _strategy(count)
    report = {}
    for name, sequence in (("data", 1), ("sequence", count)):
        with strategy.scope():
            model = _model(causal=True)
            model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], jit_compile=False)
        x, _ = _task()
        y = (x[..., None] - 10).astype("float32")
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        if count == 1:
            history = model.fit(data, epochs=2, verbose=0)
        else:
            mesh = parallel.Mesh(strategy, sequence=sequence)
            with parallel.sequence(mesh):
                history = model.fit(mesh.distribute(data), epochs=2, verbose=0)
        weights = [w for w in model.get_weights() if w.dtype == np.float32]
        report[name] = {
            "loss": history.history["loss"],
            "mae": history.history["mae"],
            "weights": [float(np.abs(w).sum()) for w in weights],
        }
    return report


def steps(index, count, folder, first, last, killed_at=-1):
    """Sequence parallel steps of a loop, with a checkpoint after each; one worker may be killed."""
    import keras
    import tensorflow as tf

    from performer import parallel

    strategy = _strategy(count)
    mesh = parallel.Mesh(strategy)
    with strategy.scope():
        model = _model(causal=True)
        optimizer = keras.optimizers.Adam(0.01)
        optimizer.build(model.trainable_variables)
    x, _ = _task()
    x = tf.constant(x)

    def step(x):
        part = mesh.shard(x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(part)[..., 0] - tf.cast(part, tf.float32) / 10) ** 2)
            share = loss / count
        gradients = tape.gradient(share, model.trainable_variables)
        # The optimizer sums gradients over the replicas.
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return tf.distribute.get_replica_context().all_reduce("MEAN", loss)

    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    path = os.path.join(folder, f"worker{index}")
    losses = []
    with parallel.sequence(mesh):
        run = tf.function(lambda x: strategy.run(step, (x,)), autograph=False)
        if int(first):
            checkpoint.read(f"{path}-{int(first) - 1}").assert_consumed()
        for number in range(int(first), int(last)):
            if number == int(killed_at) and index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            losses.append(float(run(x)).hex())
            checkpoint.write(f"{path}-{number}")
    return losses


if __name__ == "__main__":
    name, index, count, *rest = sys.argv[1:]
    print("RESULT", json.dumps({"fit": fit, "steps": steps}[name](int(index), int(count), *rest)))
