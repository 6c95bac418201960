"""Text for the demo: the Python standard library's sources, or files of one's own."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_DEFAULT_BYTES = 6_000_000
_HELD_OUT_SHARE = 0.05
_HELD_OUT_BYTES = 400_000
_PEEK = 1 << 16  # bytes of a file that are looked at to tell text from binary


class CorpusError(ValueError):
    """A text that the demo cannot use; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never seen in training.

    Attributes:
        train: uint8 [n].
        held_out: uint8 [m], from other files where there are several, else the end of the one.
        source: what the text is, for people.
    """

    train: np.ndarray
    held_out: np.ndarray
    source: str


def load(paths: Sequence[str | Path] | None, length: int) -> Corpus:
    """Reads the text.

    Args:
        paths: text files; None or empty for the sources of the Python standard library.
        length: bytes of one training sequence; each part must hold one and a byte more.

    Raises:
        CorpusError: a file is missing, a directory, unreadable, empty or binary, or all files
            together are too short.

    Example:

    >>> from performer.demo import corpus
    >>> corpus.load(["README.md", "no-such-file"], 64)
    Traceback (most recent call last):
    performer.demo.corpus.CorpusError: no-such-file: there is no such file
    """
    if paths:
        texts = [read_text(Path(path)) for path in paths]
        source = ", ".join(str(path) for path in paths)
    else:
        texts = list(_standard_library())
        source = "sources of the Python standard library"
    train, held_out = split(texts)
    for part, name in ((train, "training"), (held_out, "held-out")):
        if len(part) < length + 1:
            raise CorpusError(
                f"{source}: too short: {len(part):,} bytes of {name} text, and a sequence takes "
                f"{length + 1:,}. Give more text"
                + (" or a smaller --length." if length > 64 else ".")
            )
    return Corpus(train, held_out, source)


def read_text(path: Path) -> bytes:
    """Returns the bytes of a text file; raises `CorpusError` where it is none."""
    try:
        if path.is_dir():
            raise CorpusError(f"{path}: is a directory; name its files instead")
        if not path.exists():
            raise CorpusError(f"{path}: there is no such file")
        if not path.is_file():
            raise CorpusError(f"{path}: is not a regular file")
        text = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not text:
        raise CorpusError(f"{path}: is empty")
    if is_binary(text):
        raise CorpusError(f"{path}: is binary, not text")
    return text


def is_binary(text: bytes) -> bool:
    """Tells whether bytes are no text in any ASCII-based encoding, by their control bytes."""
    sample = np.frombuffer(text[:_PEEK], np.uint8)
    if (sample == 0).any():
        return True
    control = (sample < 32) & ~np.isin(sample, list(b"\t\n\v\f\r\b\x1b"))
    return bool(control.mean() > 0.02)


def split(texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Sets whole texts aside until they make up the held-out part; of a single text, its end."""
    texts = list(texts)
    total = sum(map(len, texts))
    wanted = min(_HELD_OUT_BYTES, int(total * _HELD_OUT_SHARE))
    held: list[bytes] = []
    while len(texts) > 1 and sum(map(len, held)) + len(texts[-1]) <= 2 * wanted:
        held.append(texts.pop())
        if sum(map(len, held)) >= wanted:
            break
    if sum(map(len, held)) < wanted // 2 or not held:
        whole = b"".join(texts + held)
        cut = len(whole) - min(_HELD_OUT_BYTES, max(int(len(whole) * _HELD_OUT_SHARE), 0))
        return _array(whole[:cut]), _array(whole[cut:])
    return _array(b"".join(texts)), _array(b"".join(held))


def windows(text: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Cuts a text into sequences and their next bytes: uint8 [count, length + 1], no overlap."""
    count = (len(text) - 1) // length
    count = count if limit is None else min(count, limit)
    starts = np.arange(count)[:, None] * length
    return text[starts + np.arange(length + 1)]


def random_windows(text: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    """Draws sequences anywhere in a text: uint8 [count, length + 1], a function of the seed."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length + 1)]


def _standard_library() -> Iterable[bytes]:
    """The modules in a fixed shuffled order, up to some megabytes, without tests and packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idle_test", "lib2to3"}
    files = [
        path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)
    ]
    if not files:
        raise CorpusError(f"{root}: holds no Python sources; name a text with --text")
    random.Random(1).shuffle(files)
    size = 0
    for path in files:
        try:
            text = read_text(path)
        except CorpusError:  # an empty __init__.py, or one not readable here
            continue
        if len(text) > _DEFAULT_BYTES // 10:
            continue
        yield text
        size += len(text)
        if size > _DEFAULT_BYTES:
            return


def _array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)
