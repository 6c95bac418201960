"""The memory that one call needs at its peak, measured in a process that does nothing else (Linux).

Frameworks keep what is freed for later, so a process can be asked once only. It is a fork of one
that has imported everything and started nothing, which takes next to no time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def available() -> float:
    """Bytes that a process could still use."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024.0


def peak(prepare: Callable[[], Callable]) -> float | None:
    """MiB by which the resident memory of a process rises during a call, its results included.

    Args:
        prepare: returns the call, a function without arguments. It runs in the process of the call,
            before the measurement. It may compile, but must not run the call itself.

    Returns:
        MiB, or None where the process died.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # Blocks from 64 KiB on go back to the system when freed, not to the next call.
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
            os.write(write, str(_rise(prepare())).encode())
        except Exception as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return float(answer) if answer else None


def _rise(call):
    status = Path("/proc/self/status")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _kibibytes(status, "VmRSS")
    results = call()
    top = _kibibytes(status, "VmHWM")
    del results
    return (top - before) / 1024


def _kibibytes(file, field):
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {field}")
