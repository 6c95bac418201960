"""What counting and compressing achieve on the held-out text, in bits per byte."""

from __future__ import annotations

import bz2

import numpy as np

_SMOOTHING = 0.01  # added to every count of a context that was seen


def order(train: np.ndarray, held_out: np.ndarray, context: int) -> float:
    """Cross-entropy of the held-out text under counts of the training text.

    A byte after `context` bytes has probability (n(context, byte) + 0.01 * 256 * p) / (n(context)
    + 0.01 * 256), where p is that of the context one byte shorter, down to 1 / 256: unseen contexts
    fall back to shorter ones.

    Args:
        train, held_out: uint8 [n], [m], m greater than `context`.
        context: 0 (unigram), 1 or 2.

    Returns:
        Bits per byte, over the held-out bytes that have a whole context.

    Raises:
        ValueError: `context` is not 0, 1 or 2, or the held-out text is no longer than it.

    Example:

    >>> import numpy as np
    >>> from performer.demo import baselines
    >>> text = np.frombuffer(b"ab" * 500, np.uint8)
    >>> round(baselines.order(text, text, 0), 2), round(baselines.order(text, text, 1), 2)
    (1.01, 0.0)
    """
    if context not in (0, 1, 2):
        raise ValueError(f"context must be 0, 1 or 2, got {context!r}")
    if len(held_out) <= context:
        raise ValueError(f"held_out must be longer than {context}, got {len(held_out)}")
    probability = np.full(len(held_out) - context, 1 / 256)
    strength = _SMOOTHING * 256
    for size in range(context + 1):
        ids, held_ids = _ids(train, size), _ids(held_out, size)[context - size :]
        counts = np.bincount(ids, minlength=256 ** (size + 1))
        of_context = counts.reshape(-1, 256).sum(1)
        probability = (counts[held_ids] + strength * probability) / (
            of_context[held_ids // 256] + strength
        )
    return float(-np.log2(probability).mean())


def compressed(text: np.ndarray) -> float:
    """Bits per byte of the text under bz2 at its best level."""
    return 8 * len(bz2.compress(text.tobytes(), 9)) / len(text)


def measure(train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """All of them, by name."""
    return {
        "unigram": order(train, held_out, 0),
        "order-1": order(train, held_out, 1),
        "order-2": order(train, held_out, 2),
        "bz2": compressed(held_out),
    }


def _ids(text: np.ndarray, context: int) -> np.ndarray:
    """Number of every run of `context` + 1 bytes, in base 256: int64 [n - context]."""
    ids = np.zeros(len(text) - context, np.int64)
    for start in range(context + 1):
        ids = ids * 256 + text[start : len(text) - context + start]
    return ids
