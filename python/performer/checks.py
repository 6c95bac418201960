"""Checks of single arguments. Each message names the argument, the rule and the value.

A size that is not known before the graph runs (None in a shape) passes here. The operators check it
again when they run.
"""

from __future__ import annotations

import functools
import numbers

import numpy as np
import tensorflow as tf

FEATURE_MAPS = ("softmax", "relu", "elu")
WINDOW_UNIT, LARGEST_WINDOW = 64, 65536  # of exact_window: kernels work on blocks of 64 rows
_TYPES = (tf.float32, tf.bfloat16, tf.float16, tf.float64)


def accumulator(dtype: tf.DType) -> tf.DType:
    """Type of projections, biases, states and sums for inputs of `dtype`."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def tensor(
    name: str, x, layouts: tuple[str, ...] | None = None, dtype: tf.DType | None = None
) -> tf.Tensor:
    """x as a tensor of a rank of `layouts` ("BSGD": one letter an axis), cast to `dtype` if given.

    Raises:
        TypeError: not convertible, or `dtype` given and x not floating. ValueError: another rank.
    """
    try:
        x = tf.convert_to_tensor(x)
    except Exception as error:  # TensorFlow and NumPy raise a dozen kinds
        kind = ValueError if isinstance(error, ValueError | OverflowError) else TypeError
        raise kind(f"{name} must be convertible to a tensor, got {_short(x)}: {error}") from error
    if layouts is None:
        return x
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
    """An integer of at least 1, of 31 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {_short(value)}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {_short(value)}")
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


def flag(name: str, value) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_short(value)}")
    return bool(value)


def size_tensor(name: str, value, least: int) -> None:
    """An integer, or an integer scalar tensor, of at least `least` where it is known."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        known = int(value)
    else:
        x = tensor(name, value)
        if not x.dtype.is_integer or x.shape.rank not in (0, None):
            raise TypeError(f"{name} must be an integer or an integer scalar, got {_short(value)}")
        known = tf.get_static_value(x)
    if known is not None and known < least:
        raise ValueError(f"{name} must be at least {least}, got {known}")
    if known is not None and known >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {_short(known)}")


def dtype(name: str, value, allowed: tuple[tf.DType, ...]) -> tf.DType:
    """One of the types `allowed`."""
    rule = f"{name} must be {' or '.join(x.name for x in allowed)}"
    try:
        value = tf.as_dtype(value)
    except Exception as error:
        raise TypeError(f"{rule}, got {_short(value)}") from error
    if value not in allowed:
        raise ValueError(f"{rule}, got {value.name}")
    return value


def when_run(fits: tf.Tensor, message: str, *values) -> list:
    """The check, for `tf.control_dependencies`, that the bool scalar `fits` is True.

    It takes less time than `tf.debugging.Assert`, which branches first. XLA leaves it out.
    """
    return [tf.raw_ops.Assert(condition=fits, data=[message, *values], summarize=1)]


def same_when_run(
    name: str,
    axis: int,
    x: tf.Tensor,
    other_name: str,
    other_axis: int,
    other: tf.Tensor,
    letter: str,
) -> list:
    """`same` for sizes that only a running graph knows: what must run before the tensors are used.

    Needed where a size of 1, or a reshape, would hide that sizes differ: elsewhere the operators
    refuse.
    """
    if None not in (x.shape[axis], other.shape[other_axis]):
        return []
    one, two = tf.shape(x)[axis], tf.shape(other)[other_axis]
    message = f"{name} must have the {letter} of {other_name} on axis {axis}, got"
    return _equal_when_run(message, one, tf.equal(one, two), two)


def one_of_when_run(name: str, axis: int, x: tf.Tensor, allowed: dict) -> list:
    """`one_of`, likewise. The sizes `allowed` are integers or int32 scalars."""
    if x.shape[axis] is not None and all(isinstance(size, int) for size in allowed.values()):
        return []
    given = tf.shape(x)[axis]
    fits = functools.reduce(tf.logical_or, (tf.equal(given, size) for size in allowed.values()))
    message = f"{name} must have {' or '.join(allowed)} on axis {axis}, got"
    return _equal_when_run(message, given, fits, tf.where(fits, given, given + 1))


def _equal_when_run(message, size, fits, expected):
    with tf.control_dependencies(when_run(fits, message, size, expected)):
        # XLA leaves out assertions, but joins no matrices of different heights.
        return [tf.concat([tf.zeros([size, 0], tf.bool), tf.zeros([expected, 0], tf.bool)], 1).op]


def _short(value) -> str:
    """`repr` of a value, of which a message shows the beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


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
    rule = f"{name} must be finite and {'not below' if zero else 'above'} 0 in float32"
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        result = float(value)
    except OverflowError as error:  # an integer of more than 1024 bits
        raise ValueError(f"{rule}, got {_short(value)}") from error
    except Exception as error:
        raise TypeError(f"{name} must be a Python number, got {_short(value)}") from error
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(result)
    if not np.isfinite(single) or single < 0 or (single == 0 and not (zero and result == 0)):
        raise ValueError(f"{rule}, got {value!r}")
    return result
