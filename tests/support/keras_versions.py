"""What differs between the supported versions of Keras."""

import inspect

import keras

# Arguments of MultiHeadAttention that the oldest supported version does not have.
NEWER = {"use_gate", "sliding_window"}


def known(options):
    """Returns `options` without those that this version's MultiHeadAttention does not know."""
    parameters = inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters
    return {k: v for k, v in options.items() if k not in NEWER or k in parameters}
