"""The byte-level language model of the demo."""

import keras
import tensorflow as tf
from keras import layers

from performer import PerformerDecoder, StreamingSequential
from performer.features.feature_maps import FeatureMap

WIDTH, HEADS, BLOCKS, SUPPORTS, WINDOW = 128, 8, 1, 128, 64
KINDS = {
    "near_far": "linear attention with a window",
    "linear": "linear attention",
    "window": "the window alone",
    "none": "no attention",
    "exact": "exact attention",
}
# The arguments that tell the kinds of attention apart. Beside a window the norm of the queries is
# left out, so that far keys are heard from the start. The window is alone where what is far has a
# weight of 0 in float32.
ATTENTION: dict[str, dict] = {
    "near_far": {
        "supports": SUPPORTS,
        "exact_window": WINDOW,
        "far_bias": "learned",
        "feature_map": FeatureMap(query_norm=False),
    },
    "linear": {"supports": SUPPORTS},
    "window": {"supports": 1, "exact_window": WINDOW, "far_bias": -1e4},
    "exact": {"attention_method": "quadratic"},
}


@keras.saving.register_keras_serializable(package="performer.demo")
class ByteEmbedding(layers.Layer):
    """Bytes `[B, L]` to `[B, L, width]`: the sum of embeddings of a byte and of the one before.

    The byte before the first is the state, 0 at the start.
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.this = layers.Embedding(256, width)
        self.previous = layers.Embedding(256, width)

    def build(self, shape):
        """Builds both tables."""
        self.this.build(shape)
        self.previous.build(shape)

    def get_initial_state(self, batch_size):
        """Returns the byte before the first of each row."""
        return tf.zeros([batch_size, 1], tf.int32)

    def call(self, text, initial_state=None, return_state=False):
        """Returns the embeddings and, with `return_state`, the last byte."""
        text = tf.cast(text, tf.int32)
        before = tf.zeros_like(text[:, :1]) if initial_state is None else initial_state
        joined = tf.concat([before, text], 1)
        embedded = self.this(text) + self.previous(joined[:, :-1])
        return (embedded, joined[:, -1, tf.newaxis]) if return_state else embedded

    def get_config(self):
        """Returns the configuration."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="performer.demo")
class FeedForward(layers.Layer):
    """What is left of a block without attention."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization()
        self.expand = layers.Dense(4 * WIDTH, activation="gelu")
        self.contract = layers.Dense(WIDTH)

    def build(self, shape):
        """Builds the layers for inputs `[B, L, WIDTH]`."""
        self.norm.build(shape)
        self.expand.build(shape)
        self.contract.build((*shape[:-1], 4 * WIDTH))

    def call(self, x):
        """Returns `[B, L, WIDTH]`."""
        return x + self.contract(self.expand(self.norm(x)))


def block(kind):
    """Returns one block of the model; `kind` as in `KINDS`.

    Keys are one position late: a query then finds the places that followed what it has just read,
    and reads there what came next. Query and key kernels begin equal (the seed is the same) and
    large, so that equal representations attend to each other from the first step.
    """
    if kind == "none":
        return FeedForward()
    widest = (12 / WIDTH) ** 0.5  # twice Glorot's bound
    start = keras.initializers.RandomUniform(-widest, widest, seed=1)
    arguments = dict(ATTENTION[kind])
    feature_map = arguments.pop("feature_map", "softmax")
    return PerformerDecoder(
        4 * WIDTH,
        HEADS,
        activation="gelu",
        layer_norm_epsilon=1e-3,
        normalize_first=True,
        attention_options={"kernel_initializer": start, "feature_map": feature_map},
        delay_keys=True,
        seed=1,
        **arguments,
    )


def build(kind):
    """Returns the model, bytes `[B, L]` to logits `[B, L, 256]`; `kind` as in `KINDS`."""
    keras.utils.set_random_seed(0)
    blocks = [block(kind) for _ in range(BLOCKS)]
    head = [layers.LayerNormalization(), layers.Dense(256)]
    model = StreamingSequential([ByteEmbedding(WIDTH), *blocks, *head])
    model(tf.zeros([1, 1], tf.int32))
    return model
