"""Comparison that finds the cause: shape, NaN and inf positions, errors with the worst entry.

Every function raises AssertionError with one message that says what differs, where, and how much.
"""

from __future__ import annotations

import numpy as np


def _float64(x) -> np.ndarray:
    return np.asarray(x.numpy() if hasattr(x, "numpy") else x).astype(np.float64)


def _at(index, actual, expected) -> str:
    index = tuple(int(i) for i in index)
    return f"at {list(index)}: got {actual[index]:.9g}, expected {expected[index]:.9g}"


def _same_positions(what: str, kind: str, actual, expected, found, wanted) -> None:
    """The entries `found` must be the entries `wanted`."""
    wrong = np.argwhere(found != wanted)
    if len(wrong):
        raise AssertionError(
            f"{what}: {kind} in {found.sum()} entries, expected in {wanted.sum()}; "
            f"{len(wrong)} of {actual.size} differ, first {_at(wrong[0], actual, expected)}"
        )


def assert_close(actual, expected, *, what="result", worst=None, relative=None, rms=None) -> None:
    """Asserts that `actual` is `expected` within every bound that is given (at least one).

    Args:
        actual, expected: arrays or tensors of one shape; NaN and inf must be in the same places.
        what: name for the message.
        worst: largest absolute error of an entry.
        relative: largest error of an entry over the largest magnitude expected anywhere.
        rms: rms of the error over rms of the expected.
    """
    if worst is None and relative is None and rms is None:
        raise TypeError("assert_close needs a bound: worst, relative or rms")
    actual, expected = _float64(actual), _float64(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: got shape {actual.shape}, expected {expected.shape}")
    for kind, test in (("NaN", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        _same_positions(what, kind, actual, expected, test(actual), test(expected))
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.where(finite, np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0)), 0)
    size = np.abs(np.where(finite, expected, 0))
    tiny = np.finfo(np.float64).tiny
    measured = {
        "worst": (error.max(), worst),
        "relative": (error.max() / max(size.max(), tiny), relative),
        "rms": (np.sqrt(np.mean(error**2)) / max(np.sqrt(np.mean(size**2)), tiny), rms),
    }
    broken = [
        name
        for name, (value, bound) in measured.items()
        if bound is not None and not value <= bound
    ]
    if broken:
        index = np.unravel_index(np.argmax(error), error.shape)
        figures = ", ".join(
            f"{name} error {value:.3g}" + ("" if bound is None else f" (bound {bound:.3g})")
            for name, (value, bound) in measured.items()
        )
        raise AssertionError(f"{what}: {figures}; worst entry {_at(index, actual, expected)}")


def assert_same_bits(actual, expected, *, what="result") -> None:
    """Asserts that arrays are equal in every bit (NaN equals the same NaN, 0 is not -0)."""
    actual, expected = (
        np.asarray(x.numpy() if hasattr(x, "numpy") else x) for x in (actual, expected)
    )
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise AssertionError(
            f"{what}: got {actual.dtype} {actual.shape}, expected {expected.dtype} {expected.shape}"
        )
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    wrong = np.argwhere(
        np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
    )
    if len(wrong):
        raise AssertionError(
            f"{what}: {len(wrong)} of {actual.size} entries differ in their bits, "
            f"first {_at(wrong[0], actual.astype(np.float64), expected.astype(np.float64))}"
        )


def assert_finite(actual, *, what="result") -> None:
    """Asserts that there is no NaN and no infinity."""
    actual = _float64(actual)
    wrong = np.argwhere(~np.isfinite(actual))
    if len(wrong):
        raise AssertionError(
            f"{what}: {len(wrong)} of {actual.size} entries are not finite, "
            f"first {actual[tuple(wrong[0])]} at {[int(i) for i in wrong[0]]}"
        )
