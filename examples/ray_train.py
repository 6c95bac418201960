"""The example of long sequences with Ray Train, which starts the workers.

    python examples/ray_train.py

Ray gives each worker a process, on one machine or on those of a cluster, and its `TF_CONFIG`.
Needs `pip install 'ray[train]'`.
"""

import json
import sys
import tempfile
from pathlib import Path

import ray
from ray import train
from ray.train.tensorflow import TensorflowTrainer

FOLDER = str(Path(__file__).parent)


def work(config):
    """What each worker does: the training of `long_sequences.py`."""
    sys.path.insert(0, FOLDER)
    import long_sequences

    bits = long_sequences.main(**config)
    first = train.get_context().get_world_rank() == 0
    with tempfile.TemporaryDirectory() as folder:  # Ray keeps what the first worker reports
        Path(folder, "losses.json").write_text(json.dumps(bits))
        kept = train.Checkpoint.from_directory(folder) if first else None
        train.report({"first": bits[0], "last": bits[-1]}, checkpoint=kept)


def main(workers=2, steps=20, length=8192):
    """Trains; returns the first and the last loss, in bits per byte."""
    ray.init(num_cpus=workers, include_dashboard=False)
    try:
        result = TensorflowTrainer(
            work,
            train_loop_config={"steps": steps, "length": length},
            scaling_config=train.ScalingConfig(num_workers=workers),
        ).fit()
    finally:
        ray.shutdown()
    print(result.metrics)
    return result.metrics["first"], result.metrics["last"]


if __name__ == "__main__":
    main()
