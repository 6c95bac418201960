"""Models whose calls continue the sequence of an earlier call, with a state of constant size."""

import inspect

import keras


@keras.saving.register_keras_serializable(package="performer")
class StreamingSequential(keras.Model):
    """A stack of layers, as `keras.Sequential`, whose states are passed on from call to call.

    A layer has a state if it has `get_initial_state(batch_size)` and its call takes `initial_state`
    and `return_state`: `PerformerDecoder`, `TokenAndPositionEmbedding`, this class itself, layers
    of your own. Every other layer must treat each position by itself (`Embedding`, `Dense`,
    normalizations, `Dropout`; no convolution along the sequence). Otherwise calls on the parts of
    a sequence would not give what one call on the whole sequence gives.

    Args:
        stack: List of layers.
        **kwargs: Arguments of `keras.Model`, such as `name`.

    Call arguments:
        inputs: What the first layer takes, usually integers `(B, L)`.
        initial_state: What `get_initial_state` or an earlier call returned: this call continues its
            sequence.
        return_state: Boolean, whether to return the state after the call, too.
        training: Python boolean.

    Returns:
        What the last layer returns; with `return_state` a pair of it and the state, which is the
        list of the layers' states.

    Raises:
        ValueError: An argument that a layer refuses; an `initial_state` with another number of
            states.

    Example:

    >>> import keras
    >>> import tensorflow as tf
    >>> from performer import PerformerDecoder, StreamingSequential, TokenAndPositionEmbedding
    >>> model = StreamingSequential(
    ...     [
    ...         TokenAndPositionEmbedding(256, sequence_length=100, embedding_dim=16),
    ...         PerformerDecoder(intermediate_dim=32, num_heads=2, supports=16),
    ...         keras.layers.Dense(256),
    ...     ]
    ... )
    >>> tokens = tf.constant([[3, 1, 4, 1, 5]])
    >>> whole = model(tokens)
    >>> first, state = model(tokens[:, :3], return_state=True)
    >>> second = model(tokens[:, 3:], initial_state=state)
    >>> bool(tf.reduce_max(abs(tf.concat([first, second], 1) - whole)) < 1e-5)
    True
    """

    def __init__(self, stack, **kwargs):
        super().__init__(**kwargs)
        self.autocast = False  # would round states
        if not isinstance(stack, list | tuple) or not all(map(callable, stack)):
            raise ValueError(f"`stack` must be a list of layers. Received: stack={stack!r}")
        self.stack = list(stack)
        self._streams = [_has_state(layer) for layer in self.stack]

    def get_initial_state(self, batch_size):
        """The state before the first position.

        Args:
            batch_size: B, an integer or an integer scalar.

        Returns:
            List of the states of those layers that have one.

        Raises:
            ValueError: a layer is not built: call the model first.
        """
        return [
            layer.get_initial_state(batch_size)
            for layer, streams in zip(self.stack, self._streams, strict=True)
            if streams
        ]

    def call(self, inputs, initial_state=None, return_state=False, training=None):
        """Calls the layers in turn; see the class."""
        count = sum(self._streams)
        if initial_state is not None:
            listed = isinstance(initial_state, (list, tuple))
            if not listed or len(initial_state) != count:
                what = f"a list of {len(initial_state)}" if listed else repr(initial_state)
                raise ValueError(
                    f"`initial_state` must be a list of {count} states, one for each layer that "
                    f"has one. Received: {what}"
                )
        before = iter([None] * count if initial_state is None else initial_state)
        after = []
        x = inputs
        for layer, streams in zip(self.stack, self._streams, strict=True):
            options = {"training": training} if _takes(layer, "training") else {}
            if streams:
                options["initial_state"] = next(before)
            if streams and return_state:
                x, state = layer(x, return_state=True, **options)
                after.append(state)
            else:
                x = layer(x, **options)
        return (x, after) if return_state else x

    def get_config(self):
        """Every argument of the constructor."""
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.stack]
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "stack": layers,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The model of a configuration."""
        stack = [
            keras.saving.deserialize_keras_object(layer, custom_objects=custom_objects)
            for layer in config["stack"]
        ]
        return cls(**{**config, "stack": stack})


def _has_state(layer):
    return hasattr(layer, "get_initial_state") and _takes(layer, "return_state")


def _takes(layer, argument):
    return argument in inspect.signature(layer.call).parameters
