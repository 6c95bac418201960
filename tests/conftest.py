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
