"""The byte-level language model of the demo."""

import keras
from keras import layers

import performer

WIDTH, HEADS, BLOCKS, SUPPORTS = 128, 8, 1, 128
KINDS = {"linear": "linear attention", "none": "no attention", "exact": "exact attention"}


def delay(x):
    """`[B, L, ...]` moved one position later; zeros come first."""
    return keras.ops.pad(x[:, :-1], [[0, 0], [1, 0]] + [[0, 0]] * (len(x.shape) - 2))


@keras.saving.register_keras_serializable(package="performer.demo")
class ByteEmbedding(layers.Layer):
    """Bytes `[B, L]` to `[B, L, width]`: the sum of embeddings of a byte and of the one before."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.this = layers.Embedding(256, width)
        self.previous = layers.Embedding(256, width)

    def build(self, shape):
        """Builds both tables."""
        self.this.build(shape)
        self.previous.build(shape)

    def call(self, text):
        """Returns the embeddings; the byte before the first counts as 0."""
        return self.embed(text, delay(text))

    def embed(self, text, before):
        """Returns the embeddings of bytes and of the bytes before them."""
        return self.this(text) + self.previous(before)

    def get_config(self):
        """Returns the configuration."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="performer.demo")
class Block(layers.Layer):
    """One block of a Transformer, whose keys are one position late.

    The key of a position is the representation of the position before it. A query then finds
    the places that followed what it has just read, and reads there what came next.

    Args:
        kind: "linear", "exact", or "none" for a block without attention.
    """

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.attention = attention(kind)
        self.norm = layers.LayerNormalization()
        self.norm_of_dense = layers.LayerNormalization()
        self.expand = layers.Dense(4 * WIDTH, activation="gelu")
        self.contract = layers.Dense(WIDTH)

    def build(self, shape):
        """Builds the layers for inputs `[B, L, WIDTH]`."""
        if self.attention is not None:
            self.norm.build(shape)
            self.attention.build(shape, shape)
        self.norm_of_dense.build(shape)
        self.expand.build(shape)
        self.contract.build((*shape[:-1], 4 * WIDTH))

    def call(self, x):
        """Returns `[B, L, WIDTH]`."""
        if self.attention is not None:
            y = self.norm(x)
            x = x + self.attention(y, y, delay(y), use_causal_mask=True)
        return self.dense(x)

    def dense(self, x):
        """Returns what follows attention."""
        return x + self.contract(self.expand(self.norm_of_dense(x)))

    def get_config(self):
        """Returns the configuration."""
        return {**super().get_config(), "kind": self.kind}


def attention(kind):
    """Returns a causal attention layer: "linear", "exact", or None for "none".

    Query and key kernels begin equal (the seed is the same) and large, so that equal
    representations attend to each other from the first step.
    """
    if kind == "none":
        return None
    widest = (12 / WIDTH) ** 0.5  # twice Glorot's bound
    start = keras.initializers.RandomUniform(-widest, widest, seed=1)
    method, supports = ("linear", SUPPORTS) if kind == "linear" else ("quadratic", None)
    return performer.Performer(
        HEADS,
        WIDTH // HEADS,
        attention_method=method,
        supports=supports,
        kernel_initializer=start,
        seed=1,
    )


def build(kind):
    """Returns the model, bytes `[B, L]` to logits `[B, L, 256]`; `kind` as in `KINDS`."""
    keras.utils.set_random_seed(0)
    text = keras.Input((None,), dtype="int32")
    x = ByteEmbedding(WIDTH)(text)
    for _ in range(BLOCKS):
        x = Block(kind)(x)
    return keras.Model(text, layers.Dense(256)(layers.LayerNormalization()(x)))
