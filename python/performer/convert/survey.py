"""Which sizes a model needs: errors of its heads after calibration at several of them."""

from __future__ import annotations

import itertools

from performer.convert.calls import first_heads, pairs
from performer.convert.replacement import names_inside, replace_attention
from performer.convert.report import Report, Trial
from performer.layers._calibration import calibrate
from performer.layers._learned import LearnedProjection


def survey(
    model,
    data,
    *,
    supports=(32, 64, 128, 256),
    exact_window=(None, 64),
    exact_keys=(None,),
    steps=8,
    seed=0,
    **arguments,
) -> Report:
    """Measures what features, a window and exact keys would give on the heads of a trained model.

    The model is called once; each of its exact attention layers is calibrated at all sizes on what
    reaches it, as `calibrate` does. Nothing is changed. `Report.recommend` then names the cheapest
    sizes for an error, `Report.misfits` the heads that none of them serves.

    Args:
        model: Model with exact attention.
        data: Inputs of one call, as in `calibrate`.
        supports, exact_window, exact_keys: Values to try, all combinations; see
            `performer.Performer`. `exact_keys` is left out for layers that are causal or packed.
        steps, seed: As in `Performer.calibrate`.
        **arguments: Other arguments of `replace_attention`.

    Returns:
        A `Report` with `trials`.

    Example:

    >>> import keras, tensorflow as tf
    >>> from performer import convert
    >>> x = keras.Input((64, 16))
    >>> model = keras.Model(x, keras.layers.MultiHeadAttention(2, 8, name="attention")(x, x))
    >>> data = tf.random.stateless_normal([8, 64, 16], seed=[1, 2])
    >>> report = convert.survey(model, data, supports=(16, 32), exact_window=(None,), steps=2)
    >>> [(trial.layer, trial.sizes) for trial in report.trials]
    [('attention', (16, None, None)), ('attention', (32, None, None))]
    """
    options = {**arguments, "supports": 1, "feature_map": "learned"}
    layers = pairs(replace_attention(model, **options), model)
    names, trials = names_inside(model), list[Trial]()

    def measure(number, heads, masks):
        name = names[id(layers[number][1])]
        query, key, _ = heads
        several = exact_keys if not masks.causal and masks.segment_ids is None else (None,)
        for sizes in itertools.product(supports, exact_window, several):
            count, window, keys = sizes
            projection = LearnedProjection(
                *(count, query.shape[-1], query.shape[-2], key.shape[-2]), scaling=0, seed=seed
            )
            projection.build()
            features = projection.current_features(False, with_draw=False)._replace(
                exact_window=window, exact_keys=keys
            )
            found = calibrate(name, projection, features, heads, masks, steps=steps, seed=seed)
            trials.append(Trial(name, *sizes, found.after))

    first_heads(lambda: model(data, training=False), layers, measure)
    return Report([], trials=trials)
