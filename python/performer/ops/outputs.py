"""Results of attention over disjoint sets of keys, joined to that over all of them."""

from __future__ import annotations

import tensorflow as tf

from performer import checks
from performer.composition import logsumexp


@tf.autograph.experimental.do_not_convert
def merge_outputs(outputs, log_weights, name=None):
    """Joins attention over disjoint sets of keys: the attention over all of them.

    With w the log weights, out = sum_n exp(w_n) out_n / sum_n exp(w_n). Attention to several
    sources, or exact attention to a few keys beside features for all others, are compositions of
    `favor_attention(..., return_log_weight=True)` and this function.

    Args:
        outputs: list of at least one [B, L, H, E], of one type: results for the same queries.
        log_weights: list of as many [B, L, H], float32 (float64 for float64): the log of the total
            weight of each result's keys, -inf where there is none. What such a result holds there
            changes nothing.
        name: name scope.

    Returns:
        [B, L, H, E], of the type of the outputs; 0, with gradient 0, where no result has a key; and
        the log of the total weight [B, L, H].

    Raises:
        ValueError: none, or not as many of both; ranks or shapes that do not fit.
        TypeError: types that do not fit.

    Numerics: in float32 (float64), scaled by the largest weight: no overflow, rounding only.
    Differentiable to any order.

    Example:

    >>> import tensorflow as tf
    >>> from performer import ops, projections
    >>> x = tf.random.normal([2, 100, 4, 16])
    >>> w = projections.orthogonal_projection(64, 16, seed=1)
    >>> parts = [
    ...     ops.favor_attention(x, keys, keys, w, return_log_weight=True)
    ...     for keys in (x[:, :30], x[:, 30:])
    ... ]
    >>> joined, log_weight = ops.merge_outputs(*zip(*parts))
    >>> bool(tf.reduce_max(abs(joined - ops.favor_attention(x, x, x, w))) < 1e-4)
    True
    """
    for name, given in (("outputs", outputs), ("log_weights", log_weights)):
        if not isinstance(given, list | tuple):
            raise TypeError(
                f"{name} must be a list or tuple of tensors, got {type(given).__name__}"
            )
    if not outputs or len(outputs) != len(log_weights):
        raise ValueError(
            "outputs and log_weights must be lists of the same length of at least 1, got "
            f"{len(outputs)} and {len(log_weights)}"
        )
    with tf.name_scope(name or "merge_outputs"):
        outputs = [checks.tensor(f"outputs[{i}]", x, ("BLHE",)) for i, x in enumerate(outputs)]
        log_weights = [
            checks.tensor(f"log_weights[{i}]", x, ("BLH",)) for i, x in enumerate(log_weights)
        ]
        dtype = outputs[0].dtype
        for i, (out, weight) in enumerate(zip(outputs, log_weights, strict=True)):
            checks.supported(f"outputs[{i}]", out)
            checks.same_dtype(f"outputs[{i}]", out, "outputs[0]", outputs[0])
            if weight.dtype != checks.accumulator(dtype):
                raise TypeError(
                    f"log_weights[{i}] must be {checks.accumulator(dtype).name} for outputs of "
                    f"{dtype.name}, got {weight.dtype.name}"
                )
            for axis, letter in enumerate("BLH"):
                checks.same(f"log_weights[{i}]", axis, weight, f"outputs[{i}]", axis, out, letter)
            for axis, letter in enumerate("BLHE"):
                checks.same(f"outputs[{i}]", axis, out, "outputs[0]", axis, outputs[0], letter)
        joined = [_part(*x) for x in zip(outputs, log_weights, strict=True)]
        weight, out = joined[0]
        for part in joined[1:]:
            weight, out = logsumexp.merge(weight, out, *part)
        return tf.cast(out, dtype), weight


def _part(out, log_weight):
    """A log weight, and the output in its type: 0 where there is no weight."""
    nothing = tf.equal(log_weight, logsumexp.NONE)[..., None]
    out = tf.cast(out, log_weight.dtype)
    return log_weight, tf.where(nothing, tf.zeros([], out.dtype), out)
