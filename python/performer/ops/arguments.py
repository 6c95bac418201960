"""Preparation of a call: conversion, defaults and every check of its arguments, in one place.

The compiled operators check shapes again, for sizes that are known only when the graph runs.
Letters as in `favor_attention`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from performer import checks
from performer.ops.fingerprint import checked_side, fingerprint_of_sides
from performer.ops.state import (
    AttentionState,
    as_draw,
    checked_state,
    fit_projection,
    near_rows,
    stored_rows,
)
from performer.shapes import dims


class Prepared(NamedTuple):
    """The arguments of a call that have passed, under the names of the operators' inputs.

    Attributes:
        queries: query [B, L, H, D], query_projection [1|G|H, M, D], feature_bias [1|G|H, M]; empty
            in a call without queries.
        keys: key [B, S, G, D], value [B, S, G, E], key_projection [1|G, M, D], key_bias
            [1|B, 1|G, 1|S], and the attribute key_norm; empty in a call without keys.
        attributes: feature_map, scale and feature_epsilon.
        state: the state that the call reads or goes on from, or None.
        draw: int64 scalar, the common draw of projection and state; None in a call without state.
        segment_ids: integers [B, S], or None.
        max_segments: int or None.
        exact_window: int, or None for linear attention to all keys. With it `far_bias` is in
            feature_bias.
        exact_keys: int, or None.
        query_norm: whether the far part has the norm of the query; see `favor_attention`.
    """

    queries: dict[str, Any]
    keys: dict[str, Any]
    attributes: dict[str, Any]
    state: AttentionState | None
    draw: tf.Tensor | None
    segment_ids: tf.Tensor | None = None
    max_segments: int | None = None
    exact_window: int | None = None
    exact_keys: int | None = None
    query_norm: bool = True


def prepare(
    projection,
    *,
    query=None,
    key=None,
    value=None,
    causal=False,
    feature_bias=None,
    key_mask=None,
    key_bias=None,
    state=None,
    segment_ids=None,
    max_segments=None,
    draw=None,
    returns_state=False,
    feature_map="softmax",
    scale=None,
    key_norm=True,
    feature_epsilon=1e-3,
    exact_window=None,
    far_bias=None,
    exact_keys=None,
    query_norm=True,
) -> Prepared:
    """Prepares a call of `favor_attention`, `summarize` (without query) or `read` (without key).

    Args:
        state: the `initial_state` of a call with keys; what a call without keys reads.
        returns_state: whether the call returns a state.
        others: as `favor_attention`.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names argument, rule and
            value.
        tf.errors.InvalidArgumentError: draws that are known only when the graph runs differ.
    """
    attributes = _attributes(feature_map, scale, feature_epsilon)
    exact_window = _exact_window(exact_window, feature_map)
    exact_keys = _exact_keys(exact_keys, feature_map, causal, segment_ids, returns_state)
    if far_bias is not None and exact_window is None and exact_keys is None:
        raise ValueError(
            "far_bias needs exact_window or exact_keys: where every key is far it cancels. "
            "Got far_bias without both"
        )
    if query is not None:
        query = checks.tensor("query", query, ("BLHD",))
    if key is not None:
        key, value = checks.tensor("key", key, ("BSGD",)), checks.tensor("value", value, ("BSGE",))
    dtype = checks.accumulator((key if query is None else query).dtype)
    query_side: Any = None if query is None else _projection_side(projection, 0, dtype)
    key_side: Any = None if key is None else _projection_side(projection, 1, dtype)
    if key is None:
        state = checked_state("state", state, dtype, projection=query_side)
    if key is not None:
        checks.positive("key", 2, key, "G")
    else:
        checks.positive("state.log_mass", 1, state.log_mass, "G")
    queries, keys = {}, {}
    if query is not None:
        feature_bias = _feature_bias(feature_bias, query_side[1], dtype)
        groups = state.log_mass.shape[1] if key is None else key.shape[2]
        _check_queries(query, groups, query_side, feature_bias)
        if far_bias is not None:
            feature_bias = _with_far_bias(feature_bias, far_bias, query, dtype)
        queries = {"query": query, "query_projection": query_side[1], "feature_bias": feature_bias}
    if query is not None and key is not None:
        checks.same_dtype("key", key, "query", query)
        checks.same("key", 0, key, "query", 0, query, "B")
        checks.same("key", 3, key, "query", 3, query, "D")
    if key is not None:
        _check_keys(key, value, key_side)
    if query is not None and key is not None:
        checks.same(key_side[0], 1, key_side[1], query_side[0], 1, query_side[1], "M")
        if causal or exact_window is not None:
            when = "when causal" if causal else "with exact_window"
            checks.same("query", 1, query, "key", 1, key, f"length (L = S {when})")
    if key is not None:
        bias = _key_bias(key, dtype, key_mask, key_bias)
        keys = {"key": key, "value": value, "key_projection": key_side[1], "key_bias": bias}
        keys["key_norm"] = checks.flag("key_norm", key_norm)
    if draw is not None:
        draw = as_draw(draw)
    elif state is not None or returns_state:
        draw = _fingerprint(projection, dtype)
    if key is None:
        checks.same("state.log_mass", 0, state.log_mass, "query", 0, query, "B")
        if near_rows(state):
            raise ValueError(
                "state must have no near rows, which `read` cannot attend to exactly: give it to "
                "`favor_attention` as its initial_state. Got a state with "
                f"{state.near_key.shape[1]} of them"
            )
        draw = fit_projection(draw, state.draw, "projection and state")
    elif state is not None:
        state = checked_state("initial_state", state, dtype, key, value, key_side)
        if segment_ids is None:
            checks.one_of("initial_state.log_mass", 0, state.log_mass, {"1": 1, "B": key.shape[0]})
        draw = fit_projection(draw, state.draw, "projection and initial_state")
        if near_rows(state):
            _check_near_rows(state, exact_window, causal, segment_ids)
    max_segments = _max_segments(max_segments, segment_ids)
    if segment_ids is not None:
        segment_ids = _segment_ids(segment_ids, query, key, value)
    return Prepared(
        queries,
        keys,
        attributes,
        state,
        draw,
        segment_ids,
        max_segments,
        exact_window,
        exact_keys,
        checks.flag("query_norm", query_norm),
    )


def pair_mask(name: str, mask, query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Bool [1|B, 1|H, L, S] for query [B, L, H, D] and key [B, S, G, D]."""
    mask = checks.tensor(name, mask, ("BHLS",))
    if mask.dtype != tf.bool:
        raise TypeError(f"{name} must be bool (True: attend to the key), got {mask.dtype.name}")
    checks.one_of(name, 0, mask, {"1": 1, "B": query.shape[0]})
    checks.one_of(name, 1, mask, {"1": 1, "H": query.shape[2]})
    checks.same(name, 2, mask, "query", 1, query, "L")
    checks.same(name, 3, mask, "key", 1, key, "S")
    lengths = checks.same_when_run(name, 2, mask, "query", 1, query, "L")
    lengths += checks.same_when_run(name, 3, mask, "key", 1, key, "S")
    with tf.control_dependencies(lengths):
        return tf.identity(mask)


def _attributes(feature_map, scale, feature_epsilon) -> dict:
    """The attributes shared by all operators."""
    named = isinstance(feature_map, str) and feature_map in checks.FEATURE_MAPS
    if not named and (isinstance(feature_map, type) or not callable(feature_map)):
        raise ValueError(
            f"feature_map must be one of {', '.join(checks.FEATURE_MAPS)}, or a function of "
            f"log-features, got {feature_map!r}"
        )
    return {
        "feature_map": feature_map,
        "scale": 0.0 if scale is None else checks.number("scale", scale, zero=False),
        "feature_epsilon": checks.number("feature_epsilon", feature_epsilon, zero=True),
    }


def _exact_window(window, feature_map) -> int | None:
    """`window`, which goes with the softmax map."""
    if window is None:
        return None
    window = checks.exact_window(window)
    _check_estimates("exact_window", feature_map)
    return window


def _exact_keys(count, feature_map, causal, segment_ids, return_state) -> int | None:
    """`count`, which goes with the softmax map where all queries see the same keys."""
    if count is None:
        return None
    count = checks.size("exact_keys", count)
    _check_estimates("exact_keys", feature_map)
    if causal or segment_ids is not None or return_state:
        raise ValueError(
            "exact_keys needs causal=False, no segment_ids and return_state=False: all queries of "
            "a batch row attend to the same keys, and no state can hold them. Got "
            f"causal={causal!r}, segment_ids {'given' if segment_ids is not None else 'None'}, "
            f"return_state={return_state!r}"
        )
    return count


def _check_estimates(name, feature_map) -> None:
    """Exact weights stand beside those of features that estimate them."""
    if feature_map != "softmax":
        raise ValueError(
            f"{name} needs feature_map='softmax', whose features estimate exp(scale query.key), "
            "the exact weight. The features of any other map are its kernel, exactly: there is "
            f"nothing to make exact. Got feature_map={feature_map!r}"
        )


def _with_far_bias(feature_bias, far_bias, query, dtype):
    """feature_bias [1|G|H, M] plus far_bias, a number or [1|H]: [1|G|H, M]."""
    far_bias = checks.tensor("far_bias", far_bias, ("", "H"), dtype)
    if far_bias.shape.rank == 0:
        return feature_bias + far_bias
    checks.one_of("far_bias", 0, far_bias, {"1": 1, "H": query.shape[2]})
    heads, given = dims(query)[2], dims(feature_bias)[0]
    return tf.repeat(feature_bias, heads // given, 0) + far_bias[:, None]


def _check_near_rows(state, window, causal, segment_ids) -> None:
    """A call may go on from a state with near rows where it knows what is near."""
    rows = state.near_key.shape[1]
    if window is None:
        raise ValueError(
            f"exact_window must be that of the call which returned initial_state, with {rows} near "
            "rows, got None"
        )
    if rows is not None and rows != stored_rows(window):
        raise ValueError(
            f"initial_state must have {stored_rows(window)} near rows (2 exact_window - 1) with "
            f"exact_window={window}, got {rows}"
        )
    if not causal or segment_ids is not None:
        raise ValueError(
            "initial_state must have no near rows without causal=True or with segment_ids: there "
            f"is no row that they come before. Got {rows} of them"
        )


def _projection_side(projection, side: int, dtype: tf.DType) -> tuple[str, tf.Tensor]:
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
    projection = checks.tensor(name, projection, ("MD", "HMD"), dtype)
    projection = projection if projection.shape.rank == 3 else projection[None]
    checks.positive(name, 1, projection, "M")
    return name, projection


def _fingerprint(projection, dtype: tf.DType) -> tf.Tensor:
    """The draw of a projection that has no explicit one: both sides, as they are used."""
    if not isinstance(projection, tuple):
        return fingerprint_of_sides(checked_side("projection", projection, dtype))
    numbers = (0, 0) if projection[0] is projection[1] else (0, 1)
    return fingerprint_of_sides(
        *(checked_side(f"projection[{side}]", projection[side], dtype) for side in numbers)
    )


def _feature_bias(bias, projection, dtype):
    """[1|G|H, M]; zeros where there is none."""
    if bias is None:
        return tf.zeros(
            [1, tf.shape(projection)[1] if projection.shape[1] is None else projection.shape[1]],
            dtype,
        )
    bias = checks.tensor("feature_bias", bias, ("M", "HM"), dtype)
    return bias if bias.shape.rank == 2 else bias[None]


def _key_bias(key, dtype: tf.DType, mask, bias) -> tf.Tensor:
    """Bias [1|B, 1|G, 1|S] of key_mask [B, S] and key_bias [1|B, 1|S] or [1|B, 1|G, 1|S]."""
    result = tf.zeros([1, 1, 1], dtype)
    if bias is not None:
        result = checks.tensor("key_bias", bias, ("BS", "BGS"), dtype)
        result = result if result.shape.rank == 3 else result[:, None, :]
        for axis, letter, size in zip(
            (0, 1, 2), "BGS", (key.shape[0], key.shape[2], key.shape[1]), strict=True
        ):
            checks.one_of("key_bias", axis, result, {"1": 1, letter: size})
    if mask is not None:
        mask = checks.tensor("key_mask", mask, ("BS",))
        if mask.dtype != tf.bool:
            raise TypeError(
                f"key_mask must be bool (True: attend to the key), got {mask.dtype.name}"
            )
        checks.same("key_mask", 0, mask, "key", 0, key, "B")
        checks.same("key_mask", 1, mask, "key", 1, key, "S")
        sizes = checks.same_when_run("key_mask", 0, mask, "key", 0, key, "B")
        sizes += checks.same_when_run("key_mask", 1, mask, "key", 1, key, "S")
        with tf.control_dependencies(sizes):
            mask = tf.identity(mask)
        result = tf.where(mask[:, None, :], result, tf.constant(float("-inf"), dtype))
    return result


def _check_queries(
    query, groups: int | None, query_projection: tuple[str, tf.Tensor], feature_bias
) -> None:
    """query [B, L, H, D], the query side of the projection and feature_bias must fit."""
    name, projection = query_projection
    checks.supported("query", query)
    heads = query.shape[2]
    checks.positive("query", 2, query, "H")
    checks.positive("query", 3, query, "D")
    checks.same(name, 2, projection, "query", 3, query, "D")
    if heads is not None and groups is not None and heads % groups:
        raise ValueError(
            f"query must have a multiple of the {groups} key/value heads on axis 2, "
            f"got {heads} heads in shape {query.shape}"
        )
    checks.one_of(name, 0, projection, {"1": 1, "G": groups, "H": heads})
    checks.one_of("feature_bias", 0, feature_bias, {"1": 1, "G": groups, "H": heads})
    checks.same("feature_bias", 1, feature_bias, name, 1, projection, "M")


def _check_keys(key, value, key_projection: tuple[str, tf.Tensor]) -> None:
    """key [B, S, G, D], value [B, S, G, E] and the key side of the projection must fit."""
    name, projection = key_projection
    checks.supported("key", key)
    checks.same_dtype("value", value, "key", key)
    for axis, letter in enumerate("BSG"):
        checks.same("value", axis, value, "key", axis, key, letter)
    checks.positive("key", 2, key, "G")
    checks.positive("key", 3, key, "D")
    checks.same(name, 2, projection, "key", 3, key, "D")
    checks.one_of(name, 0, projection, {"1": 1, "G": key.shape[2]})


def _max_segments(maximum, segment_ids):
    """`maximum`, a positive int that goes with segment_ids, or None."""
    if maximum is None:
        return None
    maximum = checks.size("max_segments", maximum)
    if segment_ids is None:
        raise ValueError(f"max_segments needs segment_ids, got max_segments={maximum} without them")
    return maximum


def _segment_ids(segment_ids, query, key, value):
    """Integers [B, S], for self-attention."""
    segment_ids = checks.tensor("segment_ids", segment_ids, ("BS",))
    if not segment_ids.dtype.is_integer:
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype.name}")
    checks.same("query", 1, query, "key", 1, key, "length (L = S with segment_ids)")
    checks.same("segment_ids", 0, segment_ids, "key", 0, key, "B")
    checks.same("segment_ids", 1, segment_ids, "key", 1, key, "S")
    # The operators take the rows of the batch one after another, and see their total number only.
    found = []
    for name, x in (("query", query), ("value", value), ("segment_ids", segment_ids)):
        for axis, letter in enumerate("BS"):
            found += checks.same_when_run(name, axis, x, "key", axis, key, letter)
    with tf.control_dependencies(found):
        return tf.identity(segment_ids)
