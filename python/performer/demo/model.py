"""The byte-level language model of the demo."""

import keras
import tensorflow as tf
from keras import layers

from performer import Performer, PerformerDecoder, StreamingSequential
from performer.features.feature_maps import FeatureMap

WIDTH, HEADS, BLOCKS, SUPPORTS, WINDOW = 128, 8, 1, 128, 128
CONTEXT = 4  # bytes that the embedding of a position knows
ACTIVATION = "relu"
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
    """Bytes `[B, L]` to `[B, L, width]`: the sum of embeddings of a byte and of those before it.

    The bytes before the first are the state, 0 at the start.

    Attributes:
        tables: embeddings of the byte, of the one before it, and so on: `context` of them.
    """

    def __init__(self, width, context=CONTEXT, **kwargs):
        super().__init__(**kwargs)
        self.width, self.context = width, context
        self.tables = [layers.Embedding(256, width) for _ in range(context)]

    def build(self, shape):
        """Builds the tables."""
        for table in self.tables:
            table.build(shape)

    def get_initial_state(self, batch_size):
        """Returns the bytes before the first of each row."""
        return tf.zeros([batch_size, self.context - 1], tf.int32)

    def call(self, text, initial_state=None, return_state=False):
        """Returns the embeddings and, with `return_state`, the last bytes."""
        text = tf.cast(text, tf.int32)
        before = initial_state
        if before is None:
            before = tf.zeros([tf.shape(text)[0], self.context - 1], tf.int32)
        joined = tf.concat([before, text], 1)
        length = tf.shape(text)[1]
        ends = range(self.context - 1, -1, -1)
        embedded = sum(
            table(joined[:, end : end + length])
            for table, end in zip(self.tables, ends, strict=True)
        )
        return (embedded, joined[:, length:]) if return_state else embedded

    def get_config(self):
        """Returns the configuration."""
        return {**super().get_config(), "width": self.width, "context": self.context}


@keras.saving.register_keras_serializable(package="performer.demo")
class FeedForward(layers.Layer):
    """What is left of a block without attention."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.LayerNormalization()
        self.expand = layers.Dense(4 * WIDTH, activation=ACTIVATION)
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
    larger than usual, so that equal representations attend to each other from the first step.
    """
    if kind == "none":
        return FeedForward()
    widest = 1.5 * (3 / WIDTH) ** 0.5  # 1.5 times Glorot's bound
    start = keras.initializers.RandomUniform(-widest, widest, seed=1)
    arguments = dict(ATTENTION[kind])
    feature_map = arguments.pop("feature_map", "softmax")
    return PerformerDecoder(
        4 * WIDTH,
        HEADS,
        activation=ACTIVATION,
        layer_norm_epsilon=1e-3,
        normalize_first=True,
        attention_options={"kernel_initializer": start, "feature_map": feature_map},
        delay_keys=True,
        seed=1,
        **arguments,
    )


def build(kind):
    """Returns the model, bytes `[B, L]` to logits `[B, L, 256]`; `kind` as in `KINDS`.

    It copies from the first step on: what attention brings is what it read, because the output
    kernel begins as the inverse of the value kernel, and a byte that it brings is predicted,
    because the last layer begins as the embedding of the byte.
    """
    keras.utils.set_random_seed(0)
    embedding, head = ByteEmbedding(WIDTH), layers.Dense(256)
    blocks = [block(kind) for _ in range(BLOCKS)]
    model = StreamingSequential([embedding, *blocks, layers.LayerNormalization(), head])
    model(tf.zeros([1, 1], tf.int32))
    for layer in model._flatten_layers():
        if isinstance(layer, Performer):
            turn = keras.initializers.Orthogonal(seed=2)([WIDTH, WIDTH])
            layer.value_dense.kernel.assign(tf.reshape(turn, layer.value_dense.kernel.shape))
            back = tf.reshape(tf.transpose(turn), layer.output_dense.kernel.shape)
            layer.output_dense.kernel.assign(back)
    table = tf.transpose(embedding.tables[0].embeddings)
    head.kernel.assign(table / (tf.math.reduce_std(table) * WIDTH**0.5))
    return model
