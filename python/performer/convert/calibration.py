"""Calibration of all layers of a model, without training."""

from __future__ import annotations

import dataclasses

from performer.convert.calls import first_heads, learned_layers
from performer.convert.replacement import names_inside
from performer.convert.report import Report
from performer.layers._calibration import LayerReport


def calibrate(model, data, *, steps=8, seed=0) -> Report:
    """Fits the learned features of a model to its own queries and keys, without training.

    The model is called once on the data. Every `Performer` layer with `feature_map="learned"` is
    calibrated with the inputs and masks that reach it, see `Performer.calibrate`, and then goes
    on with the weights it has found: later layers are calibrated with what the earlier ones now
    give them. No other weight changes. A layer that is called several times is calibrated by the
    first call.

    Args:
        model: Keras model or layer, such as `replace_attention(..., feature_map="learned")` makes.
        data: Inputs of one call, arrays or tensors: 16 to 32 sequences of the length and kind
            that the model is for.
        steps, seed: As in `Performer.calibrate`.

    Returns:
        A `Report`: errors of every head of every layer, before and after.

    Raises:
        ValueError: The model has no layer with learned features, or the call reaches none; and as
            `Performer.calibrate`.

    Example:

    >>> import keras, tensorflow as tf
    >>> from performer import convert
    >>> x = keras.Input((64, 16))
    >>> exact = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x))
    >>> linear = convert.replace_attention(exact, supports=16, feature_map="learned", seed=1)
    >>> data = tf.random.stateless_normal([8, 64, 16], seed=[1, 2])
    >>> (layer,) = convert.calibrate(linear, data).layers
    >>> bool(layer.after.mean() < 0.8 * layer.before.mean())
    True
    """
    layers, names = learned_layers(model), names_inside(model)
    found: list[LayerReport] = []

    def fit(number, heads, masks):
        report = layers[number]._fit_features(heads, masks, steps, seed)
        found.append(dataclasses.replace(report, layer=names[id(layers[number])]))

    if layers:
        watched = [(layer, layer) for layer in layers]
        first_heads(lambda: model(data, training=False), watched, fit)
    if not found:
        raise ValueError(
            "`model` must have a Performer layer with attention_method='linear' and "
            f"feature_map='learned' that a call reaches. Received: {model.name!r}, with "
            f"{len(layers)} of them"
        )
    return Report(found)
