"""Who sees whom: the call arguments that say which keys a query attends to, and their rules."""

from __future__ import annotations

import dataclasses
from typing import Any

from performer.layers._axes import resolve_axes


@dataclasses.dataclass(frozen=True)
class Visibility:
    """The masks of one call; a field is an argument of `Performer.call`, None or False if unset.

    All of them must allow a pair of query and key. Everything but a general `attention_mask` acts
    on whole keys, whole queries or the order of the sequence, and stays linear.
    """

    query_mask: Any = None
    value_mask: Any = None
    key_mask: Any = None
    attention_mask: Any = None
    use_causal_mask: bool = False
    segment_ids: Any = None
    prefix_mask: Any = None

    def check(self, query_shape, value_shape, axes):
        """Refuses what no form of attention can answer, from static shapes alone.

        Args:
            query_shape, value_shape: shapes of the layer's inputs, channels included.
            axes: the layer's `attention_axes`.

        Raises:
            ValueError: see the conditions.
        """
        rank = len(value_shape)
        shapes = f"query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}"
        if len(query_shape) != rank:
            raise ValueError(f"`query` and `value` must have the same rank. Received: {shapes}")
        axes = resolve_axes(axes, rank)
        for axis in range(rank - 1):
            sizes = query_shape[axis], value_shape[axis]
            if None in sizes or sizes[0] == sizes[1]:
                continue
            if axis not in axes:
                raise ValueError(
                    f"`query` and `value` must agree on axis {axis}, over which there is no "
                    f"attention. Received: {shapes}"
                )
            for name in ("segment_ids", "prefix_mask"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` needs a query and a value of the same length. Received: {shapes}"
                    )
            if self.use_causal_mask and len(axes) > 1:
                raise ValueError(
                    "`use_causal_mask` over several axes needs a query and a value of the same "
                    f"sizes. Received: {shapes}"
                )
        if self.prefix_mask is not None and not self.use_causal_mask:
            raise ValueError(
                "`prefix_mask` lifts the causal mask for some keys, and needs it. "
                f"Received: use_causal_mask={self.use_causal_mask!r}"
            )
        if self.prefix_mask is not None and self.segment_ids is not None:
            raise ValueError(
                "`prefix_mask` must be None with `segment_ids`: a prefix that all sequences of a "
                "row see would join them. Received both"
            )

    def needs_scores(self, count, return_attention_scores=False):
        """Whether a call over `count` attention axes takes the dense form, with `[T, S]` scores."""
        return return_attention_scores or self.is_general(count)

    def is_general(self, count):
        """Whether `attention_mask` has more to say than one value for every key.

        Args:
            count: number of attention axes.

        Raises:
            ValueError: the mask has too few axes.
        """
        if self.attention_mask is None:
            return False
        shape = tuple(self.attention_mask.shape)
        if len(shape) < 2 * count:
            raise ValueError(
                "`attention_mask` must have shape (batch, <query axes>, <key axes>), batch and "
                f"heads optional, that is a rank of at least {2 * count}. "
                f"Received: attention_mask.shape={shape}"
            )
        return any(size != 1 for size in (*shape[1 : -2 * count], *shape[-2 * count : -count]))
