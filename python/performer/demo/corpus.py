"""Text for the demo, as bytes."""

import stat
import sysconfig
from pathlib import Path

import numpy as np

LEAST = 200_000  # bytes: enough for a few windows to train on and some to hold out


class CorpusError(ValueError):
    """A text that the demo cannot use; the message names the file, the rule and the value."""


def load(files, most=8_000_000):
    """Returns the text of `files`, or of Python's standard library if there are none.

    Args:
        files: Paths of text files.
        most: Number of bytes after which reading stops.

    Returns:
        `uint8` array `[N]`.

    Raises:
        CorpusError: A path that is missing, a directory, a device or pipe (which may never end),
            unreadable, empty or binary; or fewer than `LEAST` bytes in all.

    Example:
        >>> load([]).dtype
        dtype('uint8')
    """
    paths = [Path(file) for file in files]
    if not paths:
        folder = Path(sysconfig.get_path("stdlib"))
        paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 0)
    parts, size = [], 0
    for path in paths:
        parts.append(_read(path, most - size))
        size += len(parts[-1])
        if size >= most:
            break
    text = b"".join(parts)[:most]
    if len(text) < LEAST:
        raise CorpusError(f"--text must hold at least {LEAST} bytes in all; got {len(text)}")
    return np.frombuffer(text, np.uint8)


def shown(path, most=160):
    """Returns a path as messages show it: without its middle where it is very long."""
    text = str(path)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def _read(path, most):
    """The first `most` bytes of a file."""
    name = shown(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise CorpusError(f"--text must name files; {name} is a directory")
        if not stat.S_ISREG(mode):
            raise CorpusError(f"--text must name files that end; {name} is a device or a pipe")
        with path.open("rb") as file:
            data = file.read(most)
    except FileNotFoundError as error:
        raise CorpusError(f"--text must name existing files; {name} does not exist") from error
    except OSError as error:
        raise CorpusError(f"--text must name readable files; {name}: {error.strerror}") from error
    if not data:
        raise CorpusError(f"--text must name files with text; {name} is empty")
    if b"\0" in data:
        raise CorpusError(f"--text must name text files; {name} is binary (it holds a zero byte)")
    return data


def split(text, length):
    """Returns (training, held-out) windows, `[n, length + 1]` each: the last tenth is held out."""
    windows = len(text) // (length + 1)
    if windows < 3:
        raise CorpusError(
            f"--text must hold at least 3 windows of {length + 1} bytes; got {len(text)} bytes"
        )
    rows = text[: windows * (length + 1)].reshape(windows, length + 1)
    held_out = max(1, windows // 10)
    return rows[:-held_out], rows[-held_out:]
