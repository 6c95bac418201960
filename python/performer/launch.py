"""Workers on one machine: a script in several processes, each of which knows the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

_SECONDS_TO_END = 60.0  # for the other workers, after one has failed


def add_arguments(parser):
    """Adds the arguments of the command `performer launch`."""
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="(default 2)")
    parser.add_argument("script", help="a Python script, which every worker runs")
    parser.add_argument("arguments", nargs="...", help="arguments of the script")


def main(arguments):
    """Runs the command; returns the exit status of the worker that failed first, or 0."""
    if arguments.workers < 1:
        print(f"performer: --workers must be at least 1; got {arguments.workers}", file=sys.stderr)
        return 2
    if not os.path.isfile(arguments.script):
        print(f"performer: there is no script {arguments.script}", file=sys.stderr)
        return 2
    return run([sys.executable, arguments.script, *arguments.arguments], arguments.workers)


def cluster(workers: int) -> list[dict[str, str]]:
    """What each worker of a cluster on this machine has in its environment: `TF_CONFIG`.

    Free ports are chosen; they are free until a worker takes them, or another program does.

    Args:
        workers: number of workers, at least 1. A single one needs no cluster: its dict is empty.

    Raises:
        ValueError: `workers` is no integer of at least 1.

    Example:

    >>> from performer import launch
    >>> [sorted(environment) for environment in launch.cluster(2)]
    [['TF_CONFIG'], ['TF_CONFIG']]
    """
    # Not by `checks`, which needs TensorFlow.
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be an integer of at least 1, got {workers!r}")
    if workers == 1:
        return [{}]
    sockets = [socket.socket() for _ in range(workers)]
    for free in sockets:  # all at once, so that no two are the same
        free.bind(("localhost", 0))
    addresses = [f"localhost:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    return [
        {
            "TF_CONFIG": json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            )
        }
        for index in range(workers)
    ]


def run(command: list[str], workers: int) -> int:
    """Runs a command in every worker of a cluster on this machine, and waits for all.

    The first worker writes as it would alone; what the others write has their number before it.
    When one fails, the others have a minute to end; then they are killed, as they are when the
    caller is interrupted.

    Args:
        command: program and arguments, the same for all.
        workers: number of workers, at least 1.

    Returns:
        The exit status of the worker that failed first, or 0; 128 + n where signal n ended it.
    """
    processes, printers = [], []
    try:
        for index, environment in enumerate(cluster(workers)):
            own = index == 0
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=None if own else subprocess.PIPE,
                stderr=None if own else subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            processes.append(process)
            if not own:
                printer = threading.Thread(target=_print_lines, args=(index, process), daemon=True)
                printer.start()
                printers.append(printer)
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for printer in printers:
            printer.join(1)


def _print_lines(index, process):
    for line in process.stdout:
        print(f"[worker {index}] {line}", end="", flush=True)


def _wait(processes):
    """Waits for all; once one has failed, for a minute at most."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not failed:
            failed = next((code for code in codes if code), 0)
            deadline = time.monotonic() + _SECONDS_TO_END if failed else deadline
        if None not in codes or time.monotonic() > deadline:
            return 128 - failed if failed < 0 else failed
        time.sleep(0.05)
