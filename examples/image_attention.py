"""Attention over images: every pixel of a handwritten digit attends to all others, in two axes.

Needs scikit-learn, for the images: `pip install scikit-learn`.
"""

import keras
import numpy as np
from sklearn.datasets import load_digits

from performer import Performer


def data():
    """Returns ((x, y) to train on, (x, y) held out); x `(N, 8, 8, 3)`: grey, row and column."""
    images, labels = load_digits(return_X_y=True)
    grey = images.reshape(-1, 8, 8, 1) / 8 - 1
    line = np.linspace(-1, 1, 8)
    places = np.broadcast_to(np.stack(np.meshgrid(line, line), -1), (len(grey), 8, 8, 2))
    x = np.concatenate([grey, places], -1).astype("float32")
    return (x[:1400], labels[:1400]), (x[1400:], labels[1400:])


def build():
    """Returns the model: images `(B, 8, 8, 3)` to logits `(B, 10)`."""
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(32, 3, padding="same", activation="gelu")(images)
    y = keras.layers.LayerNormalization()(x)
    # Axes 1 and 2 form one sequence of 64 pixels. (2,) alone would attend within rows.
    x += Performer(num_heads=4, key_dim=8, supports=32, attention_axes=(1, 2))(y, y)
    y = keras.layers.LayerNormalization()(x)
    x += keras.layers.Dense(32, activation="gelu")(y)
    return keras.Model(images, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def main(epochs=5):
    """Trains, and returns the accuracy on images that were held out."""
    keras.utils.set_random_seed(0)
    train, held_out = data()
    model = build()
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*train, batch_size=32, epochs=epochs, verbose=2)
    accuracy = model.evaluate(*held_out, verbose=0)[1]
    print(f"{len(held_out[0])} digits held out: {accuracy:.0%} right")
    return accuracy


if __name__ == "__main__":
    main()
