"""A small sentence encoder, trained here: which topic of Python's documentation is a text from?

It has the functions of minilm.py, in the place of which sentence_encoder.py may use it.
"""

import pydoc_data.topics

import keras
import tensorflow as tf
from keras import layers

from performer import TokenAndPositionEmbedding
from python_texts import TOPICS, documentation

WORDS, WIDTH, HEADS = 2000, 64, 4
PACKAGES = ()


def tokenizer(length):
    """A function from texts to int32 `[n, length]`, 0 for padding."""
    vectorize = layers.TextVectorization(WORDS, output_sequence_length=length)
    vectorize.adapt(list(pydoc_data.topics.topics.values()))
    return lambda texts: vectorize(tf.constant(texts)).numpy().astype("int32")


def encoder(length, epochs=8):
    """The encoder: words int32 `[B, length]` to embeddings `[B, 64]` of norm 1."""
    words = keras.Input((length,), dtype="int32")
    x = layers.LayerNormalization()(TokenAndPositionEmbedding(WORDS, length, WIDTH)(words))
    wide = keras.initializers.RandomUniform(-0.4, 0.4, seed=1)  # attends to single words
    for number in range(2):
        name = f"attention_{number}"
        attention = layers.MultiHeadAttention(
            HEADS, WIDTH // HEADS, kernel_initializer=wide, name=name
        )
        x = layers.LayerNormalization()(x + attention(x, x, attention_mask=words[:, None] != 0))
        x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(layers.Dense(128, "gelu")(x)))
    pooled = layers.GlobalAveragePooling1D()(x, mask=words != 0)
    model = keras.Model(words, layers.UnitNormalization()(pooled))
    classifier = keras.Sequential([model, layers.Rescaling(10), layers.Dense(len(TOPICS))])
    classifier.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    texts, labels = documentation(length)
    classifier.fit(tokenizer(length)(texts), labels, batch_size=16, epochs=epochs, verbose=2)
    return model


def main(length=128):
    """Trains, and returns mean cosines of pieces of the same topic and of different ones."""
    texts, labels = documentation(length)
    embedded = encoder(length).predict(tokenizer(length)(texts), verbose=0)
    same = labels[:, None] == labels
    cosines = embedded @ embedded.T
    found = cosines[same].mean(), cosines[~same].mean()
    print(f"cosine of the same topic {found[0]:.2f}, of others {found[1]:.2f}")
    return found


if __name__ == "__main__":
    main()
