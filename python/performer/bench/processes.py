"""Starts `worker` processes and reads what they measure."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from performer.bench.checking import WrongResult


class WorkerFailed(Exception):
    """A measuring process ended before its time; the message holds its last words."""


def records(task: dict, job_done: Callable[[], object] = lambda: None) -> Iterator[dict]:
    """Runs a task of `worker` in a process of its own and yields its records as they come.

    Args:
        task: see `worker`.
        job_done: called after each job.

    Raises:
        WrongResult: a check failed.
        WorkerFailed: the process died.
    """
    if task["deadline"] is not None and time.time() > task["deadline"]:
        return
    environment = {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
        "OMP_NUM_THREADS": str(task["threads"]),
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "performer.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died: its status says so below
                process.stdin.write(json.dumps(task))
                process.stdin.close()
            for line in process.stdout:
                record = json.loads(line)
                if record["kind"] == "wrong":
                    raise WrongResult(record["message"])
                if record["kind"] == "done":
                    job_done()
                else:
                    yield record
            if process.wait() != 0:
                errors.seek(0)
                last = "".join(errors.readlines()[-15:])
                raise WorkerFailed(f"measuring ended with status {process.returncode}:\n{last}")
        finally:
            process.kill()
            process.wait()
