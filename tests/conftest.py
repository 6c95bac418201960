"""The same random numbers in every run; and a share of the processors for each of its processes."""

import os
import sys
from pathlib import Path
from unittest import mock

import pytest

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Two threads at least: what threads can break, tests must be able to see.
    threads = max(len(os.sched_getaffinity(0)) // workers, 2)
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, str(threads))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # NumPy, in references only
        os.environ.setdefault(name, "1")


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """Fixtures of a file begin with the same random numbers."""
    if "keras" in sys.modules:  # as in all files that take random numbers of its or of TensorFlow
        sys.modules["keras"].utils.set_random_seed(1)


@pytest.fixture(autouse=True)
def seeded(seeded_module):
    """So does every test, whatever ran before it.

    TensorFlow's own generator is left as it is. To seed it, TensorFlow forgets the kernels of all
    operations that run eagerly, and to make them again would take a quarter of the time of tests of
    layers. Tests take random numbers of NumPy and of Keras, which has seeds of its own.
    """
    if "keras" in sys.modules:
        with mock.patch.object(sys.modules["tensorflow"].random, "set_seed"):
            sys.modules["keras"].utils.set_random_seed(1)


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left alone with one at the end."""
    long = (
        *("xla/test_operators", "docs/test_examples", "test_saved_model", "building/test_loader"),
        *("convert/test_keras_hub", "parallel/test_workers", "test_bad_values"),
        *("parallel/test_sequences", "convert/test_distillation", "test_demo", "test_generation"),
        *("ops/test_argument_table", "ops/test_gradients", "layers/test_drop_in"),
        *("convert/test_replacement", "xla/test_layers", "layers/test_blocks", "docs/test_pages"),
        "ops/test_bad_input",
    )
    place = {name: i for i, name in enumerate(long)}
    root = Path(__file__).parent

    def order(item):
        return place.get(item.path.relative_to(root).with_suffix("").as_posix(), len(long))

    items.sort(key=order)
