"""The memory that one call needs at its peak (Linux)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

# For processes that measure: blocks from 64 KiB on go back to the system as soon as they are freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def available() -> float:
    """Bytes that a process could still use."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable") * 1024.0


def peak(call: Callable[[], object]) -> float:
    """MiB by which the resident memory of this process rises during a call, its results included.

    The call must have run before, so that compiling does not count, and other threads must rest.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _kibibytes(Path("/proc/self/status"), "VmRSS")
    results = call()
    top = _kibibytes(Path("/proc/self/status"), "VmHWM")
    del results
    return (top - before) / 1024


def _kibibytes(file, field):
    for line in file.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {field}")
