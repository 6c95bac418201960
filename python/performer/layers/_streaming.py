"""Streaming: what a `Performer` layer keeps of keys it has seen, and how it goes on from there."""

from typing import Any

import keras
import tensorflow as tf

from performer.checks import accumulator
from performer.counters import as_position
from performer.layers._arguments import Options
from performer.layers._attention import read_state, summarize_keys
from performer.layers._axes import resolve_axes
from performer.layers._masks import mask_of
from performer.layers._visibility import Visibility
from performer.layers.rotary_embedding import rotate
from performer.ops.state import AttentionState, empty_state


class HasState:
    """What a layer with a `RandomProjection` offers for streams: states, made and read."""

    # Of `Performer`.
    built: bool
    name: str
    compute_dtype: str
    _options: Options
    _attention_axes: Any
    _num_heads: int
    _value_dim: int
    _random_projection: Any
    _rotary_embedding: Any
    _query_dense: Any
    _key_dense: Any
    _value_dense: Any
    _output_dense: Any
    _converted: Any
    _gated: Any

    def get_initial_state(self, batch_size):
        """The state before the first key, for `initial_state` of a call.

        Args:
            batch_size: B, an integer or an integer scalar; for inputs with axes over which there
                is no attention, the list of B and their sizes.

        Returns:
            `performer.AttentionState`, empty, N the product of `batch_size`: float32 (float64
            under that policy), of the size of one key's features, whatever the length of a stream.

        Raises:
            ValueError: the layer is quadratic, or not built.

        Example:

        >>> import tensorflow as tf
        >>> from performer import Performer
        >>> layer, x = Performer(2, 4, supports=16), tf.random.normal([3, 10, 8])
        >>> whole = layer(x, x, use_causal_mask=True)
        >>> state, parts = layer.get_initial_state(3), []
        >>> for part in tf.split(x, 5, axis=1):
        ...     part, state = layer(
        ...         part, part, use_causal_mask=True, initial_state=state, return_state=True
        ...     )
        ...     parts.append(part)
        >>> bool(tf.reduce_max(abs(tf.concat(parts, 1) - whole)) < 1e-5)
        True
        """
        self._check_streams("get_initial_state")
        sizes = batch_size if isinstance(batch_size, list | tuple) else [batch_size]
        return empty_state(
            _product(sizes),
            self._options.num_key_value_heads or self._num_heads,
            self._random_projection.features,
            self._value_dim,
            accumulator(tf.as_dtype(self.compute_dtype)),
            draw=self._random_projection.draw.value,
        )

    def summarize(self, value, key=None, *, value_mask=None, key_mask=None, initial_state=None):
        """The state of keys and values alone, to be read many times: the encoder's, for example.

        Args:
            value, key, value_mask, key_mask: As in a call. `key` defaults to `value`.
            initial_state: State of keys that come before; default none.

        Returns:
            `performer.AttentionState` of all of them. `performer.merge` joins such states.

        Raises:
            ValueError: the layer is quadratic, or not built; states of different draws.

        Example:

        >>> import tensorflow as tf
        >>> from performer import Performer
        >>> layer = Performer(2, 4, supports=16)
        >>> query, value = tf.random.normal([3, 7, 8]), tf.random.normal([3, 1000, 8])
        >>> whole = layer(query, value)
        >>> state = layer.summarize(value)
        >>> steps = [layer.read(query[:, i : i + 1], state) for i in range(7)]
        >>> bool(tf.reduce_max(abs(tf.concat(steps, 1) - whole)) < 1e-5)
        True
        """
        self._check_streams("summarize")
        value = self._converted(value)
        key = value if key is None else self._converted(key)
        visibility = Visibility(
            value_mask=mask_of(value) if value_mask is None else value_mask,
            key_mask=mask_of(key) if key_mask is None else key_mask,
        )
        value, key = tf.identity(value), tf.identity(key)
        axes = resolve_axes(self._attention_axes, len(value.shape))
        state = self.get_initial_state(1) if initial_state is None else initial_state
        after = summarize_keys(
            self._rotated(self._key_dense(key), axes, position_of(state)),
            self._value_dense(value),
            self._random_projection.current_features(training=False),
            visibility,
            axes=axes,
            initial_state=state,
        )
        return advanced(after, state, key, axes)

    def read(self, query, state, *, query_mask=None, start_index=0):
        """The layer's output for queries that attend to all keys of a state, and to no other.

        Args:
            query, query_mask: As in a call.
            state: What `summarize`, or a call with `return_state`, returned.
            start_index: Position of the first query, for rotary positions.

        Returns:
            As a call.

        Raises:
            ValueError: the layer is quadratic, or not built; a state that does not fit, or of
                another draw of the projection.
            tf.errors.InvalidArgumentError: a draw that is known only when the graph runs differs.

        Example: see `summarize`.
        """
        self._check_streams("read")
        query = self._converted(query)
        visibility = Visibility(query_mask=mask_of(query) if query_mask is None else query_mask)
        query = tf.identity(query)
        axes = resolve_axes(self._attention_axes, len(query.shape))
        output = read_state(
            self._rotated(self._query_dense(query), axes, start_index),
            self._random_projection.current_features(training=False),
            visibility,
            state,
            axes=axes,
        )
        return self._output_dense(self._gated(output, query))

    def _rotated(self, x, axes, start, segment_ids=None):
        """A projected query or key, turned by the layer's rotary positions if it has them."""
        if self._rotary_embedding is None:
            return x
        return rotate(self._rotary_embedding, x, axes, start=start, segment_ids=segment_ids)

    def _check_streams(self, method):
        if not self._options.linear or not self.built:
            raise ValueError(
                f"`{method}` needs a built layer with attention_method='linear'. Received: "
                f"attention_method={self._options.attention_method!r}, built={self.built}"
            )

    def _state_spec(self, query_shape, axes):
        """The `AttentionState` of a symbolic call."""
        others = [size for axis, size in enumerate(query_shape[:-1]) if axis not in axes]
        batch = None if None in others else _product(others)
        heads = self._options.num_key_value_heads or self._num_heads
        sizes = (batch, heads, self._random_projection.features)
        dtype = accumulator(tf.as_dtype(self.compute_dtype)).name
        return AttentionState(
            keras.KerasTensor(sizes, dtype),
            keras.KerasTensor((*sizes, self._value_dim), dtype),
            keras.KerasTensor((), "int64"),
            keras.KerasTensor((), "int64"),
        )


def with_tensors(state):
    """A nested structure of tensors, arrays and numbers, with tensors only."""
    return tf.nest.map_structure(
        lambda x: x if isinstance(x, keras.KerasTensor) else tf.convert_to_tensor(x), state
    )


def position_of(state):
    """Where a call with `initial_state=state` begins, an int64 scalar or 0; TypeError if wrong."""
    if state is None:
        return 0
    if not isinstance(state, AttentionState):
        raise TypeError(f"`initial_state` must be an AttentionState, got {type(state).__name__}")
    return as_position(state.position)


def advanced(state, before, sequence, axes):
    """`state`, its position that of `before` and the length of what was called with since.

    Args:
        state: `AttentionState` after a call.
        before: the one before it; None: there was none.
        sequence: the call's keys, of which the sizes of `axes` count.
        axes: attention axes, as `resolve_axes` returns them.
    """
    sizes = tf.shape(sequence, tf.int64)
    length = _product([sizes[axis] for axis in axes])
    return state._replace(position=position_of(before) + length)


def check_call(visibility, shapes, axes, scores):
    """Refuses what has no state: dense form, packed sequences, causal calls of two lengths.

    Args:
        visibility: the call's `Visibility`.
        shapes: shapes of query and value.
        axes: attention axes, as `resolve_axes` returns them.
        scores: whether the call takes the dense form.

    Raises:
        ValueError: one of them, in a call with `initial_state` or `return_state`.
    """
    what = None
    if scores:
        what = "scores (`return_attention_scores`, a general `attention_mask`), which see no state"
    elif visibility.segment_ids is not None:
        what = "`segment_ids`, whose sequences have a state each"
    elif visibility.use_causal_mask:
        lengths = [[shape[axis] for axis in axes] for shape in shapes]
        if lengths[0] != lengths[1] and None not in lengths[0] + lengths[1]:
            what = f"`use_causal_mask` for {lengths[0]} queries and {lengths[1]} keys"
    if what:
        raise ValueError(f"`initial_state` and `return_state` do not go with {what}.")


def _product(sizes):
    result = sizes[0]
    for size in sizes[1:]:
        result = result * size
    return result
