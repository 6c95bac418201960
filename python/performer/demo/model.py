"""The byte-level language model of the demo."""

import keras
from keras import layers

import performer

WIDTH, HEADS, BLOCKS, SUPPORTS = 128, 4, 2, 64


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
        before = keras.ops.pad(text[:, :-1], [[0, 0], [1, 0]])
        return self.this(text) + self.previous(before)

    def get_config(self):
        """Returns the configuration."""
        return {**super().get_config(), "width": self.width}


def attention(kind):
    """Returns a causal attention layer: "linear", "exact", or None for "none"."""
    if kind == "none":
        return None
    options = {} if kind == "exact" else {"supports": SUPPORTS, "seed": 1}
    method = "quadratic" if kind == "exact" else "linear"
    return performer.Performer(HEADS, WIDTH // HEADS, attention_method=method, **options)


def build(kind):
    """Returns the model, bytes `[B, L]` to logits `[B, L, 256]`, without attention if "none"."""
    keras.utils.set_random_seed(0)
    text = keras.Input((None,), dtype="int32")
    x = ByteEmbedding(WIDTH)(text)
    for _ in range(BLOCKS):
        mixer = attention(kind)
        if mixer is not None:
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, mixer(y, y, use_causal_mask=True)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * WIDTH, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(WIDTH)(y)])
    return keras.Model(text, layers.Dense(256)(layers.LayerNormalization()(x)))
