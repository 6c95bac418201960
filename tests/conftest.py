"""`make test` runs several processes at once: each takes its share of the processors."""

import os

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    # Two threads at least: what threads can break, tests must be able to see.
    threads = max(len(os.sched_getaffinity(0)) // workers, 2)
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ.setdefault(name, str(threads))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # NumPy, in references only
        os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items):
    """Files that take long come first, so that no process is left alone with one at the end."""
    long = (
        *("test_xla", "test_examples", "test_library", "test_generation", "test_convert"),
        *("test_layer_xla", "test_blocks", "test_readme", "test_demo", "test_bad_input"),
    )
    place = {name: i for i, name in enumerate(long)}
    items.sort(key=lambda item: place.get(item.path.stem, len(long)))
