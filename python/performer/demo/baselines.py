"""What simpler models need for the same text, in bits per byte."""

import bz2

import numpy as np


def markov(train, held_out, order):
    """Returns the cross-entropy of an order-`order` model (0, 1, 2) of bytes, fitted to `train`.

    Every context's counts are mixed with the next lower order's prediction (weight 1), so that
    nothing has probability 0.

    Args:
        train: `uint8` array `[N]`.
        held_out: `uint8` array `[K]`.
        order: Number of preceding bytes that the model sees.

    Returns:
        Bits per byte, over the bytes of `held_out` from the third on.

    Example:
        >>> import numpy as np
        >>> ab = np.tile(np.frombuffer(b"ab", np.uint8), 5000)
        >>> round(markov(ab, ab, 0), 1), round(markov(ab, ab, 1), 1)
        (1.0, 0.0)
    """
    probability = np.full(len(held_out) - 2, 1 / 256)
    for n in range(order + 1):
        counts = np.bincount(_grams(train, n + 1), minlength=256 ** (n + 1))
        context = counts.reshape(-1, 256).sum(1)
        seen = _grams(held_out, n + 1)[2 - n :]
        probability = (counts[seen] + probability) / (context[seen // 256] + 1)
    return float(-np.mean(np.log2(probability)))


def _grams(text, n):
    """The numbers whose base-256 digits are `n` bytes in a row."""
    grams = np.zeros(len(text) - n + 1, np.int64)
    for i in range(n):
        grams = grams * 256 + text[i : len(text) - n + 1 + i]
    return grams


def bz2_bits(text):
    """Returns the bits per byte of bz2 on `text`."""
    return 8 * len(bz2.compress(text.tobytes(), 9)) / len(text)
