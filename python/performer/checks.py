"""Checks of arguments. Each message names the argument, the rule and the value that broke it.

What is not known before the graph runs (None in a shape) is left to the operators, which check it
again.
"""

from __future__ import annotations

import numbers

import numpy as np
import tensorflow as tf

FEATURE_MAPS = ("softmax", "relu", "elu")
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


def max_segments(most, segment_ids):
    """`most`, a positive int that goes with segment_ids, or None."""
    if most is None:
        return None
    most = size("max_segments", most)
    if segment_ids is None:
        raise ValueError(f"max_segments needs segment_ids, got max_segments={most} without them")
    return most


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


def attributes(feature_map, scale, feature_epsilon) -> dict:
    """The attributes shared by all operators."""
    if feature_map not in FEATURE_MAPS and not callable(feature_map):
        raise ValueError(
            f"feature_map must be one of {', '.join(FEATURE_MAPS)}, or a function of log-features, "
            f"got {feature_map!r}"
        )
    return {
        "feature_map": feature_map,
        "scale": 0.0 if scale is None else number("scale", scale, zero=False),
        "feature_epsilon": number("feature_epsilon", feature_epsilon, zero=True),
    }


def projection_side(projection, side: int, dtype: tf.DType) -> tuple[str, tf.Tensor]:
    """Name and tensor [1|G|H, M, D] of a side (0 query, 1 key) of a projection or a pair."""
    name = "projection"
    if isinstance(projection, tuple):
        if len(projection) != 2:
            raise ValueError(
                "projection must be one tensor, or a pair of them (query side, key side), "
                f"got a tuple of {len(projection)}"
            )
        name, projection = f"projection[{side}]", projection[side]
    elif isinstance(projection, list) and len(projection) == 2 and len(np.shape(projection[0])) > 1:
        raise ValueError(
            "projection must be a tuple for a pair (query side, key side), or one tensor "
            "[H, M, D] for two heads, got a list of 2"
        )
    projection = tensor(name, projection, ("MD", "HMD"), dtype)
    projection = projection if projection.shape.rank == 3 else projection[None]
    positive(name, 1, projection, "M")
    return name, projection


def keys(key, value, key_projection: tuple[str, tf.Tensor]) -> None:
    """key [B, S, G, D], value [B, S, G, E] and the key side of the projection must fit."""
    name, projection = key_projection
    supported("key", key)
    same_dtype("value", value, "key", key)
    for axis, letter in enumerate("BSG"):
        same("value", axis, value, "key", axis, key, letter)
    positive("key", 2, key, "G")
    positive("key", 3, key, "D")
    same(name, 2, projection, "key", 3, key, "D")
    one_of(name, 0, projection, {"1": 1, "G": key.shape[2]})


def queries(
    query, groups: int | None, query_projection: tuple[str, tf.Tensor], feature_bias
) -> None:
    """query [B, L, H, D], the query side of the projection and feature_bias must fit."""
    name, projection = query_projection
    supported("query", query)
    heads = query.shape[2]
    positive("query", 2, query, "H")
    positive("query", 3, query, "D")
    same(name, 2, projection, "query", 3, query, "D")
    if heads is not None and groups is not None and heads % groups:
        raise ValueError(
            f"query must have a multiple of the {groups} key/value heads on axis 2, "
            f"got {heads} heads in shape {query.shape}"
        )
    one_of(name, 0, projection, {"1": 1, "G": groups, "H": heads})
    one_of("feature_bias", 0, feature_bias, {"1": 1, "G": groups, "H": heads})
    same("feature_bias", 1, feature_bias, name, 1, projection, "M")


def queries_and_keys(query, key, value, query_side, key_side, feature_bias) -> None:
    """Queries and keys with their projections must fit by themselves and each other."""
    queries(query, key.shape[2], query_side, feature_bias)
    same_dtype("key", key, "query", query)
    same("key", 0, key, "query", 0, query, "B")
    same("key", 3, key, "query", 3, query, "D")
    keys(key, value, key_side)
    same(key_side[0], 1, key_side[1], query_side[0], 1, query_side[1], "M")


def pair_mask(name: str, mask, query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Bool [1|B, 1|H, L, S] for query [B, L, H, D] and key [B, S, G, D]."""
    mask = tensor(name, mask, ("BHLS",))
    if mask.dtype != tf.bool:
        raise TypeError(f"{name} must be bool (True: attend to the key), got {mask.dtype.name}")
    one_of(name, 0, mask, {"1": 1, "B": query.shape[0]})
    one_of(name, 1, mask, {"1": 1, "H": query.shape[2]})
    same(name, 2, mask, "query", 1, query, "L")
    same(name, 3, mask, "key", 1, key, "S")
    return mask


def key_bias(key, dtype: tf.DType, mask, bias) -> tf.Tensor:
    """Bias [1|B, 1|G, 1|S] of key_mask [B, S] and key_bias [1|B, 1|S] or [1|B, 1|G, 1|S]."""
    result = tf.zeros([1, 1, 1], dtype)
    if bias is not None:
        result = tensor("key_bias", bias, ("BS", "BGS"), dtype)
        result = result if result.shape.rank == 3 else result[:, None, :]
        for axis, letter, size in zip(
            (0, 1, 2), "BGS", (key.shape[0], key.shape[2], key.shape[1]), strict=True
        ):
            one_of("key_bias", axis, result, {"1": 1, letter: size})
    if mask is not None:
        mask = tensor("key_mask", mask, ("BS",))
        if mask.dtype != tf.bool:
            raise TypeError(
                f"key_mask must be bool (True: attend to the key), got {mask.dtype.name}"
            )
        same("key_mask", 0, mask, "key", 0, key, "B")
        same("key_mask", 1, mask, "key", 1, key, "S")
        result = tf.where(mask[:, None, :], result, tf.constant(float("-inf"), dtype))
    return result


def state(name: str, log_mass, mean, dtype: tf.DType) -> None:
    """A state must be log_mass [N, G, M] and mean [N, G, M, E], both of `dtype`."""
    for field, x, layout in (("log_mass", log_mass, "NGM"), ("mean", mean, "NGME")):
        if x.dtype != dtype:
            raise TypeError(f"{name}.{field} must be {dtype.name}, got {x.dtype.name}")
        if x.shape.rank is not None and x.shape.rank != len(layout):
            raise ValueError(
                f"{name}.{field} must have shape [{', '.join(layout)}], got shape {x.shape}"
            )
    for axis, letter in enumerate("NGM"):
        same(f"{name}.mean", axis, mean, f"{name}.log_mass", axis, log_mass, letter)


def feature_bias(bias, projection, dtype):
    """[1|G|H, M]; zeros where there is none."""
    if bias is None:
        return tf.zeros(
            [1, tf.shape(projection)[1] if projection.shape[1] is None else projection.shape[1]],
            dtype,
        )
    bias = tensor("feature_bias", bias, ("M", "HM"), dtype)
    return bias if bias.shape.rank == 2 else bias[None]
