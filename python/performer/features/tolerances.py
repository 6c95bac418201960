"""The accuracy that is promised, in one table: documentation states it, tests assert it."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Bounds on the error to the float64 estimator on the same (rounded) inputs and projection.

    Attributes:
        rms: rms of the error over rms of the expected values.
        worst: largest absolute error of an entry (inputs of entry std up to 3, D up to 128), or
            None: no such promise.
        gradient_rms: as `rms`, for gradients.
        baseline_rms: rms error over that of the leanest plain TensorFlow composition, or None.
        baseline_worst: largest error over the largest of that composition, or None.
        finite_difference: relative bound of gradients against finite differences, or None where
            they mean nothing.
    """

    rms: float
    worst: float | None
    gradient_rms: float
    baseline_rms: float | None = None
    baseline_worst: float | None = None
    finite_difference: float | None = None


_TABLE = {
    # dtype: (bidirectional, causal)
    "float64": (Tolerance(1e-12, None, 1e-10, finite_difference=1e-6),) * 2,
    "float32": (Tolerance(6e-5, 6e-5, 6e-5, baseline_rms=2.0, baseline_worst=3.0),) * 2,
    "bfloat16": (Tolerance(4e-3, None, 8e-3),) * 2,
    "float16": (Tolerance(1e-3, None, 8e-3), Tolerance(4e-3, None, 8e-3)),
}


def tolerances(dtype, *, causal: bool = False) -> Tolerance:
    """The promise for a type.

    Args:
        dtype: "float64", "float32", "bfloat16", "float16" (or "half"), or a TensorFlow or NumPy
            type of that name.
        causal: the causal form.

    Raises:
        ValueError: a type without a promise.

    Example:

    >>> from performer.tolerances import tolerances
    >>> tolerances("float16", causal=True).rms
    0.004
    """
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    name = {"half": "float16"}.get(name, name)
    if name not in _TABLE:
        raise ValueError(f"dtype must be one of {', '.join(_TABLE)}, got {name}")
    return _TABLE[name][causal]
