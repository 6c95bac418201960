"""Checks of single arguments. Each message names the argument, the rule and the value.

A size that is not known before the graph runs (None in a shape) passes here. The operators check it
again when they run.
"""

from __future__ import annotations

import numbers

import numpy as np
import tensorflow as tf

FEATURE_MAPS = ("softmax", "relu", "elu")
WINDOW_UNIT, LARGEST_WINDOW = 64, 65536  # of exact_window: kernels work on blocks of 64 rows
_TYPES = (tf.float32, tf.bfloat16, tf.float16, tf.float64)


def accumulator(dtype: tf.DType) -> tf.DType:
    """Type of projections, biases, states and sums for inputs of `dtype`."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def tensor(name: str, x, layouts: tuple[str, ...], dtype: tf.DType | None = None) -> tf.Tensor:
    """x as a tensor of a rank of `layouts` ("BSGD": one letter an axis), cast to `dtype` if given.

    Raises:
        TypeError: not convertible, or `dtype` given and x not floating. ValueError: another rank.
    """
    try:
        x = tf.convert_to_tensor(x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must be convertible to a tensor: {error}") from error
    ranks = sorted({len(layout) for layout in layouts})
    if x.shape.rank is None and len(ranks) == 1:
        x = tf.ensure_shape(x, [None] * ranks[0])
    if x.shape.rank not in ranks:
        rule = " or ".join(f"[{', '.join(layout)}]" for layout in layouts)
        raise ValueError(
            f"{name} must have shape {rule} (rank {' or '.join(map(str, ranks))}), "
            f"got shape {x.shape}"
        )
    if dtype is not None:
        if not x.dtype.is_floating:
            raise TypeError(f"{name} must be floating, got {x.dtype.name}")
        x = tf.cast(x, dtype)
    return x


def size(name: str, value) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return int(value)


def exact_window(value) -> int:
    """A window of exact attention: a multiple of 64, up to 65536."""
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or int(value) % WINDOW_UNIT or not 0 < int(value) <= LARGEST_WINDOW:
        raise ValueError(
            f"exact_window must be None or a multiple of {WINDOW_UNIT} from {WINDOW_UNIT} to "
            f"{LARGEST_WINDOW}, got {value!r}"
        )
    return int(value)


def same(
    name: str,
    axis: int,
    x: tf.Tensor,
    other_name: str,
    other_axis: int,
    other: tf.Tensor,
    letter: str,
) -> None:
    """Axis `axis` of x must equal axis `other_axis` of other."""
    one, two = x.shape[axis], other.shape[other_axis]
    if one is not None and two is not None and one != two:
        raise ValueError(
            f"{name} must have the {letter} of {other_name} on axis {axis}, got {name} {x.shape} "
            f"with {letter} = {one} and {other_name} {other.shape} with {letter} = {two}"
        )


def one_of(name: str, axis: int, x: tf.Tensor, allowed: dict) -> None:
    """Axis `axis` of x must be one of the sizes `allowed` ({letter or "1": size or None})."""
    size = x.shape[axis]
    if size is None or None in allowed.values() or size in allowed.values():
        return
    rule = " or ".join(
        key if key == str(value) else f"{key} = {value}" for key, value in allowed.items()
    )
    raise ValueError(f"{name} must have {rule} on axis {axis}, got {size} in shape {x.shape}")


def positive(name: str, axis: int, x: tf.Tensor, letter: str) -> None:
    """Axis `axis` of x must not be empty."""
    if x.shape[axis] == 0:
        raise ValueError(
            f"{name} must have {letter} of at least 1 on axis {axis}, got shape {x.shape}"
        )


def same_dtype(name: str, x: tf.Tensor, other_name: str, other: tf.Tensor) -> None:
    """x must have the dtype of other."""
    if x.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name}, got {x.dtype.name} and {other.dtype.name}"
        )


def supported(name: str, x: tf.Tensor) -> None:
    """x must be of a type that the operators know."""
    if x.dtype not in _TYPES:
        raise TypeError(f"{name} must be {', '.join(t.name for t in _TYPES)}, got {x.dtype.name}")


def number(name: str, value, *, zero: bool) -> float:
    """A number that is finite and above 0, or 0 if `zero`, in float32, which operators take."""
    try:
        result = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a Python number, got {value!r}") from error
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(result)
    if not np.isfinite(single) or single < 0 or (single == 0 and not (zero and result == 0)):
        raise ValueError(
            f"{name} must be finite and {'not below' if zero else 'above'} 0 in float32, "
            f"got {value!r}"
        )
    return result
