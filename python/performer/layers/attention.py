"""Linear attention on projected inputs: checks, axes, masks and dropped keys around the op."""

import keras
import tensorflow as tf

from performer.layers import masks
from performer.layers.axes import dimensions, fold, resolve_axes, unfold
from performer.ops import favor_attention


def check_call(
    query_shape,
    value_shape,
    axes,
    *,
    attention_mask=None,
    return_attention_scores=False,
    use_causal_mask=False,
):
    """Refuses a call that linear attention cannot answer, from static shapes alone.

    Args:
        query_shape, value_shape: shapes of the layer's inputs, channels included.
        axes: the layer's `attention_axes`.
        attention_mask: tensor or None.
        return_attention_scores, use_causal_mask: as in the layer's call.

    Raises:
        ValueError: see the conditions.
    """
    rank = len(value_shape)
    if len(query_shape) != rank:
        raise ValueError(
            "`query` and `value` must have the same rank. "
            f"Received: query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}"
        )
    axes = resolve_axes(axes, rank)
    if return_attention_scores:
        raise ValueError(
            "`return_attention_scores` must be False with attention_method='linear', which never "
            "forms the scores of query and key. Use attention_method='quadratic'. "
            f"Received: return_attention_scores={return_attention_scores}"
        )
    for axis in range(rank - 1):
        sizes = query_shape[axis], value_shape[axis]
        if None in sizes or sizes[0] == sizes[1]:
            continue
        if axis not in axes:
            raise ValueError(
                f"`query` and `value` must agree on axis {axis}, over which there is no attention. "
                f"Received: query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}"
            )
        if use_causal_mask:
            raise ValueError(
                "`use_causal_mask` needs a query and a value of the same length. "
                f"Received: query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}"
            )
    if attention_mask is not None:
        masks.check_attention_mask(tuple(attention_mask.shape), axes)


def attend(
    query,
    key,
    value,
    projection,
    *,
    axes,
    query_mask=None,
    value_mask=None,
    key_mask=None,
    attention_mask=None,
    use_causal_mask=False,
    dropout=None,
    draw=0,
    feature_map="softmax",
):
    """FAVOR+ over `axes` of projected inputs.

    Args:
        query: `[B, q1, ..., qn, H, D]`; `key` `[B, s1, ..., sn, H, D]` and `value`
            `[B, s1, ..., sn, H, E]` likewise; not multiplied by any scale.
        projection: float32 `[M, D]`.
        axes: attention axes, as `resolve_axes` returns them.
        query_mask, value_mask, key_mask, attention_mask, use_causal_mask: as in the layer's call.
        dropout: a pair of rate and `keras.random.SeedGenerator`; None drops nothing.
        draw: number of the projection's draw.
        feature_map: as in `favor_attention`.

    Returns:
        `[B, q1, ..., qn, H, E]` in the dtype of `query`; 0 where a query attends to no key.
    """
    named = {"value_mask": value_mask, "key_mask": key_mask}
    if attention_mask is not None:
        named["attention_mask"] = masks.keys_of_attention_mask(attention_mask, axes)
    keys = masks.combine(
        [masks.fold_mask(name, mask, key, axes) for name, mask in named.items() if mask is not None]
    )
    folded_query, folded_key = fold(query, axes), fold(key, axes)
    output = favor_attention(
        folded_query,
        folded_key,
        fold(value, axes),
        projection,
        causal=use_causal_mask,
        key_mask=keys,
        key_bias=None if dropout is None else _dropped_keys(folded_key, *dropout),
        draw=draw,
        feature_map=feature_map,
    )
    if query_mask is not None:
        exists = masks.fold_mask("query_mask", query_mask, query, axes)
        output = tf.where(exists[:, :, tf.newaxis, tf.newaxis], output, tf.zeros_like(output))
    return unfold(output, axes, like=query)


def _dropped_keys(key, rate, seed_generator):
    """Bias float32 `[B', H, S]`: -inf drops a key, with probability `rate`; 0 keeps it."""
    batch, length, heads, _ = dimensions(key)
    uniform = keras.random.uniform((batch, heads, length), dtype="float32", seed=seed_generator)
    return tf.where(uniform >= rate, 0.0, -float("inf"))
