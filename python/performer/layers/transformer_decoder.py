"""The decoder block of a Transformer, with linear attention and a state of constant size."""

import keras
import tensorflow as tf

from performer import parallel
from performer.checks import accumulator
from performer.layers._block import Block
from performer.layers._masks import mask_of
from performer.layers.rotary_embedding import positions_in_runs
from performer.parallel.neighbours import row_before


@keras.saving.register_keras_serializable(package="performer")
class PerformerDecoder(Block):
    """Transformer decoder block with linear attention; stack several for a decoder.

    Arguments, calls, and names and shapes of weights are those of
    `keras_hub.layers.TransformerDecoder`, with additions for linear attention: a state of constant
    size takes the place of caches that grow with the sequence. A block that is first called with an
    encoder's output has a cross-attention layer; all its calls then need that output, or a state
    that holds it.

    Args:
        intermediate_dim, num_heads, dropout, activation, layer_norm_epsilon, kernel_initializer,
            bias_initializer, normalize_first, kernel_regularizer, bias_regularizer,
            attention_method, supports, exact_window, far_bias, attention_options, seed: As
            `performer.PerformerEncoder`.
        rotary_embedding: As `performer.Performer`, for self-attention.
        delay_keys: Boolean, whether the key of a position is computed from the position before it.
            A query then attends to the positions that followed earlier occurrences of its token:
            an induction head within one layer, for which a Transformer needs two (compare the
            smeared keys of Olsson et al., https://arxiv.org/abs/2209.11895). Positions of padding
            are skipped. Defaults to `False`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        decoder_sequence: `(B, T, channels)`.
        encoder_sequence: `(B, S, any)`, the encoder's output, for cross-attention.
        decoder_padding_mask, encoder_padding_mask: Boolean `(B, T)` and `(B, S)`, `True` where
            there is a token. Default to the masks that Keras attached.
        decoder_attention_mask, encoder_attention_mask: Boolean `(B, T, T)` and `(B, T, S)`, `True`
            where a position may attend to another: dense form, see `performer.Performer`; without
            state.
        use_causal_mask: Boolean, whether a position attends only to itself and to earlier ones.
            Defaults to `True`.
        training: Python boolean.
        segment_ids: Integers `(B, T)`: a row holds several sequences, which are runs of equal ids.
        initial_state: What `get_initial_state` or an earlier call returned: this call continues its
            sequence. Cross-attention reads the `encoder_sequence` that was given there.
        return_state: Boolean, whether to return the state after the call, too.

    Returns:
        `(B, T, channels)`; with `return_state` a pair of it and the state: a dict of
        `performer.AttentionState`s "self_attention" and (with an encoder) "cross_attention", and
        with `delay_keys` of "last" `(B, 1, channels)`: float32, or float64 under that policy. With
        `return_state` cross-attention drops no keys in training.

    Raises:
        ValueError, RuntimeError: As `performer.Performer`; cross-attention with neither
            `encoder_sequence` nor its state; masks of an encoder without `encoder_sequence`; a
            state of other entries; fewer channels than heads.
        TypeError: `initial_state` is no dict.

    Example:

    >>> import tensorflow as tf
    >>> from performer import PerformerDecoder
    >>> block, x = PerformerDecoder(intermediate_dim=64, num_heads=8), tf.random.normal([2, 10, 64])
    >>> whole = block(x)
    >>> state = block.get_initial_state(batch_size=2)
    >>> for i in range(10):
    ...     output, state = block(x[:, i : i + 1], initial_state=state, return_state=True)
    >>> bool(tf.reduce_max(abs(output[:, 0] - whole[:, 9])) < 1e-4)
    True
    """

    def __init__(self, *args, delay_keys=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.delay_keys = bool(delay_keys)

    def build(self, decoder_sequence_shape, encoder_sequence_shape=None):
        """Creates the sublayers, with cross-attention if there is an encoder."""
        shape = decoder_sequence_shape
        self._channels = shape[-1]
        self._make_attention(
            *("self_attention", shape, shape),
            rotary_embedding=self.rotary_embedding,
            **self._window(),
        )
        self._cross_attention_layer = None
        if encoder_sequence_shape is not None:
            self._make_attention("cross_attention", shape, encoder_sequence_shape)
        self._build_feedforward(shape)
        self._feedforward_layer_norm = self._norm("feedforward_layer_norm", shape)

    def get_initial_state(self, batch_size, encoder_sequence=None, encoder_padding_mask=None):
        """The state before the first position.

        Args:
            batch_size: B, an integer or an integer scalar.
            encoder_sequence: `(B, S, any)`, which cross-attention reads in every call. Without it
                the first call needs one.
            encoder_padding_mask: As in a call.

        Returns:
            The state, as a call returns it.

        Raises:
            ValueError: the block is not built, its attention is quadratic, or it has no
                cross-attention for an `encoder_sequence`.
        """
        if not self.built:
            raise ValueError("`get_initial_state` needs a built layer. Received: built=False")
        state = {"self_attention": self._self_attention_layer.get_initial_state(batch_size)}
        if self.delay_keys:
            state["last"] = tf.zeros([batch_size, 1, self._channels], self._state_dtype())
        if encoder_sequence is not None:
            self._check_cross_attention()
            state["cross_attention"] = self._cross_attention_layer.summarize(
                encoder_sequence, value_mask=encoder_padding_mask
            )
        return state

    def call(
        self,
        decoder_sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        encoder_padding_mask=None,
        encoder_attention_mask=None,
        use_causal_mask=True,
        training=None,
        segment_ids=None,
        initial_state=None,
        return_state=False,
    ):
        """Self-attention, cross-attention if there is an encoder, then the feed-forward."""
        if decoder_padding_mask is None:
            decoder_padding_mask = mask_of(decoder_sequence)
        before = self._entries(initial_state)
        after = {}

        def self_attention(y):
            key = None
            if self.delay_keys:
                last = before.get("last")
                if (mesh := parallel.current()) is not None:
                    given = (last, segment_ids, decoder_padding_mask)
                    last = _last_of_part_before(y, mesh, given, return_state)
                key, last = _delayed(y, last, segment_ids, decoder_padding_mask)
                after["last"] = tf.cast(last, self._state_dtype())
            result = self._self_attention_layer(
                y,
                y,
                key=key,
                value_mask=decoder_padding_mask,
                attention_mask=decoder_attention_mask,
                use_causal_mask=use_causal_mask,
                training=training,
                segment_ids=segment_ids,
                initial_state=before.get("self_attention"),
                return_state=return_state,
            )
            return result if return_state else (result, None)

        x, after["self_attention"] = self._residual(
            "self_attention", self_attention, self._cast(decoder_sequence), training
        )

        if self._cross_attention_layer is not None or encoder_sequence is not None:
            self._check_cross_attention()
            cross = self._cross_attention(
                encoder_sequence,
                encoder_padding_mask,
                encoder_attention_mask,
                before.get("cross_attention"),
                training,
                return_state,
            )
            x, after["cross_attention"] = self._residual("cross_attention", cross, x, training)
        x = self._feedforward(x, training)
        return (x, after) if return_state else x

    def _entries(self, state):
        """The entries of an `initial_state`; of None, there are none."""
        if state is None:
            return {}
        if not isinstance(state, dict):
            raise TypeError(
                "`initial_state` must be a dict, as `get_initial_state` or a call returns it. "
                f"Received: {type(state).__name__}"
            )
        needed = {"self_attention"} | ({"last"} if self.delay_keys else set())
        if set(state) - {"cross_attention"} != needed:
            raise ValueError(
                f"`initial_state` must have the entries {sorted(needed)}, and may have "
                f"'cross_attention'. Received: {sorted(state, key=str)}"
            )
        return state

    def _state_dtype(self):
        return accumulator(tf.as_dtype(self.compute_dtype))

    def _cross_attention(self, sequence, padding_mask, mask, state, training, return_state):
        """Cross-attention, as a function of its query that returns its output and its state."""
        layer = self._cross_attention_layer
        if sequence is None and (padding_mask is not None or mask is not None):
            raise ValueError(
                "`encoder_padding_mask` and `encoder_attention_mask` need `encoder_sequence`: the "
                "masks of a state were applied when it was made. Received: a mask without "
                "`encoder_sequence`"
            )
        if sequence is None and state is None:
            raise ValueError(
                "A decoder with cross-attention needs `encoder_sequence`, or the state of one in "
                "`initial_state` (`get_initial_state(batch_size, encoder_sequence)`). "
                "Received neither"
            )
        if sequence is None:
            return lambda y: (layer.read(y, state), state)
        if return_state:
            if mask is not None:
                raise ValueError(
                    "`return_state` cannot be combined with `encoder_attention_mask`, which "
                    "differs from query to query. Received both"
                )
            state = layer.summarize(sequence, value_mask=padding_mask)
            return lambda y: (layer.read(y, state), state)
        if padding_mask is None:
            padding_mask = mask_of(sequence)
        sequence = self._cast(sequence)
        return lambda y: (
            layer(y, sequence, value_mask=padding_mask, attention_mask=mask, training=training),
            None,
        )

    def _check_cross_attention(self):
        if self._cross_attention_layer is None:
            raise ValueError(
                "This decoder has no cross-attention: it was built without `encoder_sequence`. "
                "Received: `encoder_sequence`"
            )

    def get_config(self):
        """Every argument of the constructor."""
        return {**super().get_config(), "delay_keys": self.delay_keys}


def _last_of_part_before(x, mesh, given, return_state):
    """The last position of the part before, of a sequence in parts; see `_delayed`."""
    if return_state or any(x is not None for x in given):
        raise ValueError(
            "`delay_keys` goes without states, `segment_ids` and padding masks in the scope of "
            "`performer.parallel.sequence`, where each replica has a part of the sequence."
        )
    return row_before(x, mesh)


def _delayed(x, last, segment_ids, mask):
    """Delays a sequence by one position.

    Args:
        x: `(B, L, dim)`.
        last: the position before the first, `(B, 1, dim)`; None for zeros.
        segment_ids: integers `(B, L)`: zeros come before every run of equal ones; or None.
        mask: bool `(B, L)`, False for padding, which is skipped: the position before is the nearest
            earlier one that is no padding; or None.

    Returns:
        `(B, L, dim)`, for each position of `x` the one before it; and the last position of `x`,
        `(B, 1, dim)`, which is `last` of the next call.
    """
    if last is None:
        last = tf.zeros([tf.shape(x)[0], 1, x.shape[-1]], x.dtype)
    joined = tf.concat([tf.cast(last, x.dtype), x], 1)
    start = None
    if segment_ids is not None:
        start = tf.range(tf.shape(x)[1]) - tf.cast(
            positions_in_runs(tf.convert_to_tensor(segment_ids)), tf.int32
        )
    if mask is None:
        delayed, last = joined[:, :-1], joined[:, -1:]
        is_first = None if start is None else tf.equal(start, tf.range(tf.shape(x)[1]))
    else:
        # Index, for each place of `joined`, of the last place up to it that is no padding.
        exists = tf.pad(mask, [[0, 0], [1, 0]], constant_values=True)  # `last` is no padding
        places = tf.range(tf.shape(joined)[1])
        places = tf.sort(tf.where(exists, places, tf.size(places)), axis=1)  # padding at the end
        index = tf.gather(places, tf.cumsum(tf.cast(exists, tf.int32), axis=1) - 1, batch_dims=1)
        found = tf.gather(joined, index, axis=1, batch_dims=1)
        delayed, last = found[:, :-1], found[:, -1:]
        is_first = None if start is None else index[:, :-1] <= start
    if is_first is not None:
        delayed = tf.where(is_first[..., tf.newaxis], tf.zeros_like(delayed), delayed)
    return delayed, last
