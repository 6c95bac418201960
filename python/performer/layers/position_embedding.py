"""Learned embeddings of positions."""

import keras
import tensorflow as tf

from performer import parallel
from performer.layers._arguments import check_size, clone_initializer
from performer.layers._positions import integer_scalar, positions_of
from performer.shapes import dims


@keras.saving.register_keras_serializable(package="performer")
class PositionEmbedding(keras.layers.Layer):
    """A learned vector for every position.

    The arguments are those of `keras_hub.layers.PositionEmbedding`.

    Args:
        sequence_length: Number of positions.
        initializer: Initializer of the vectors. Defaults to `"glorot_uniform"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: `(B, L, dim)`, or `(B, ..., L, dim)`; only its shape matters.
        start_index: Integer, position of the first element of `inputs`. Defaults to 0.
        positions: Integers `(L,)` or `(B, L)`, the positions of all elements, in place of
            `start_index`.

    Returns:
        Tensor of the shape of `inputs`, the vectors of positions `start_index` to
        `start_index + L - 1`, which the caller adds to `inputs`.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: a position below 0 or beyond `sequence_length`.
            XLA drops this check: there the vectors of such positions are NaN.

    Example:

    >>> import tensorflow as tf
    >>> from performer.layers import PositionEmbedding
    >>> layer = PositionEmbedding(100)
    >>> layer(tf.zeros([2, 5, 16]), start_index=95).shape
    TensorShape([2, 5, 16])
    """

    def __init__(self, sequence_length, initializer="glorot_uniform", **kwargs):
        super().__init__(**kwargs)
        self.sequence_length = check_size("sequence_length", sequence_length)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, inputs_shape):
        """Creates the vectors."""
        self.position_embeddings = self.add_weight(
            name="embeddings",
            shape=(self.sequence_length, inputs_shape[-1]),
            initializer=self.initializer,
        )

    def call(self, inputs, start_index=0, positions=None):
        """The vectors of the positions of `inputs`; see the class."""
        if positions is None:
            found = self._vectors(self._following(start_index, inputs))
        else:
            positions = positions_of(inputs, positions, len(inputs.shape) - 2)
            found = self._vectors(positions)
            if len(positions.shape) == 2:
                between = [1] * (len(inputs.shape) - 3)
                found = tf.reshape(
                    found, tf.concat([tf.shape(found)[:1], between, tf.shape(found)[1:]], 0)
                )
        return tf.broadcast_to(found, tf.shape(inputs))

    def _following(self, start_index, inputs):
        """int64 `(L,)`: the positions from `start_index` on."""
        start_index = integer_scalar("start_index", start_index)
        mesh = parallel.current()
        if mesh is not None:  # `inputs` is a part of the sequence
            start_index += tf.cast(mesh.start(dims(inputs)[-2]), tf.int64)
        start, size = tf.get_static_value(start_index), inputs.shape[-2] or 0
        if start is not None and not 0 <= start <= self.sequence_length - size:
            raise ValueError(
                f"{self._rule()}. Received: start_index={start} and inputs of length {size}"
            )
        return tf.range(tf.shape(inputs, tf.int64)[-2]) + start_index

    def _rule(self):
        return (
            "positions from `start_index` on must be at least 0 and below sequence_length = "
            f"{self.sequence_length}"
        )

    def _vectors(self, positions):
        """The vectors of int64 `positions`, of any shape."""
        rule = self._rule()
        inside = (positions >= 0) & (positions < self.sequence_length)
        check = tf.debugging.Assert(tf.reduce_all(inside), [rule, positions], summarize=1)
        with tf.control_dependencies([] if check is None else [check]):
            table = tf.convert_to_tensor(self.position_embeddings)
            found = _rows(table, tf.where(inside, positions, tf.zeros_like(positions)))
            # XLA drops assertions: there NaN stands for the vector of a wrong position.
            return tf.where(inside[..., tf.newaxis], found, tf.cast(float("nan"), table.dtype))

    def compute_output_shape(self, input_shape, **kwargs):
        """The shape of the inputs."""
        return input_shape

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            "sequence_length": self.sequence_length,
            "initializer": keras.initializers.serialize(self.initializer),
        }


def _rows(table, positions):
    """Rows of a table, with a dense gradient.

    That of `tf.gather` is a list of slices. Keras's optimizers square each of them on its own, so
    that with Adam several workers that have the same positions would not train as one does.
    """

    @tf.custom_gradient
    def gather(table):
        def gradient(upstream):
            return tf.math.unsorted_segment_sum(upstream, positions, table.shape[0])

        return tf.gather(table, positions), gradient

    return gather(table)


@keras.saving.register_keras_serializable(package="performer")
class TokenAndPositionEmbedding(keras.layers.Layer):
    """The sum of the learned vectors of a token and of its position.

    The arguments are those of `keras_hub.layers.TokenAndPositionEmbedding`.

    Args:
        vocabulary_size: Number of tokens.
        sequence_length: Number of positions.
        embedding_dim: Size of the vectors.
        embeddings_initializer: Initializer of both tables. Defaults to `"uniform"`.
        mask_zero: Whether token 0 is padding, which later layers mask. Defaults to `False`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Integers `(B, L)`.
        start_index: Integer, position of the first token. Defaults to 0.
        initial_state: What an earlier call returned: the position of the first token, in place of
            `start_index`.
        return_state: Boolean, whether to return the position after the last one, too.

    Returns:
        `(B, L, embedding_dim)`; with `return_state` a pair of it and the state, an int64 scalar.

    Raises:
        ValueError, tf.errors.InvalidArgumentError: As `PositionEmbedding`.

    Example:

    >>> import tensorflow as tf
    >>> from performer import TokenAndPositionEmbedding
    >>> layer = TokenAndPositionEmbedding(256, 100, 16)
    >>> first, state = layer(tf.constant([[7, 8, 9]]), return_state=True)
    >>> second, state = layer(tf.constant([[1]]), initial_state=state, return_state=True)
    >>> second.shape, int(state)
    (TensorShape([1, 1, 16]), 4)
    """

    def __init__(
        self,
        vocabulary_size,
        sequence_length,
        embedding_dim,
        embeddings_initializer="uniform",
        mask_zero=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocabulary_size = check_size("vocabulary_size", vocabulary_size)
        self.sequence_length = check_size("sequence_length", sequence_length)
        self.embedding_dim = check_size("embedding_dim", embedding_dim)
        self.embeddings_initializer = keras.initializers.get(embeddings_initializer)
        self.mask_zero = bool(mask_zero)
        self.supports_masking = self.mask_zero
        self.token_embedding = keras.layers.Embedding(
            self.vocabulary_size,
            self.embedding_dim,
            embeddings_initializer=clone_initializer(self.embeddings_initializer),
            mask_zero=self.mask_zero,
            dtype=self.dtype_policy,
            name="token_embedding",
        )
        self.position_embedding = PositionEmbedding(
            self.sequence_length,
            initializer=clone_initializer(self.embeddings_initializer),
            dtype=self.dtype_policy,
            name="position_embedding",
        )

    def build(self, input_shape):
        """Creates the vectors."""
        self.token_embedding.build(input_shape)
        self.position_embedding.build((*input_shape, self.embedding_dim))

    def get_initial_state(self, batch_size):
        """The state before the first token: position 0."""
        del batch_size
        return tf.zeros([], tf.int64)

    def call(self, inputs, start_index=0, initial_state=None, return_state=False):
        """The embeddings of `inputs`; see the class."""
        if initial_state is None:
            start = integer_scalar("start_index", start_index)
        else:
            start = integer_scalar("initial_state", initial_state)
        embedded = self.token_embedding(inputs)
        embedded += self.position_embedding(embedded, start_index=start)
        if not return_state:
            return embedded
        length, mesh = tf.shape(inputs, tf.int64)[1], parallel.current()
        return embedded, start + (length if mesh is None else mesh.total(length))

    def compute_mask(self, inputs, mask=None):
        """Which tokens are not padding, if `mask_zero`; None otherwise."""
        return self.token_embedding.compute_mask(inputs) if self.mask_zero else None

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "sequence_length": self.sequence_length,
            "embedding_dim": self.embedding_dim,
            "embeddings_initializer": keras.initializers.serialize(self.embeddings_initializer),
            "mask_zero": self.mask_zero,
        }
