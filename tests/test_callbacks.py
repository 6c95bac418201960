"""Callbacks: redraws by a schedule of one's own, and how good the features are, for TensorBoard."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import callbacks
from performer.features import diagnostics

X = np.random.default_rng(0).normal(0, 0.7, (8, 6, 8)).astype("float32")


def make_model(**options):
    options = {"num_heads": 2, "key_dim": 4, "supports": 16, "seed": 5, **options}
    keras.utils.set_random_seed(1)
    # The sizes of Keras's default differ among its versions, and errors with them.
    options["kernel_initializer"] = keras.initializers.RandomNormal(stddev=0.35)
    x = keras.Input((6, 8))
    y = performer.Performer(name="first", **options)(x, x, use_causal_mask=True)
    y = keras.Sequential([keras.layers.Dense(8)])(y)
    model = keras.Model(x, performer.Performer(name="second", **options)(y, x))
    model.compile("sgd", "mse")
    return model


@pytest.fixture(scope="module")
def twins():
    """Two equal models, whose draws are the same after every test."""
    return make_model(), make_model()


@pytest.mark.parametrize(
    ("every", "unit", "draws"),
    [
        (1, "epoch", [1, 2, 3, 4]),
        (3, "epoch", [0, 0, 1, 1]),
        (4, "batch", [1, 2, 3, 4]),
        (3, "batch", [1, 2, 4, 5]),
        (lambda epoch: epoch in (1, 3), "epoch", [1, 1, 2, 2]),
    ],
)
def test_redraws(every, unit, draws, twins):
    model, again = twins
    first, second = model.get_layer("first"), model.get_layer("second")
    seen, before = [], int(second.redraws)
    watch = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: seen.append(int(second.redraws) - before)
    )
    redraws = callbacks.RedrawProjections(every, unit)
    model.fit(X, X, batch_size=2, epochs=4, verbose=0, callbacks=[redraws, watch])
    assert seen == draws and int(first.redraws) == before + draws[-1]
    # Draw number n is the same whoever asks for it.
    for _ in range(draws[-1]):
        again.get_layer("second").redraw()
    np.testing.assert_array_equal(second.projection, again.get_layer("second").projection)


@pytest.mark.slow
def test_the_graph_of_fit_uses_the_new_draw():
    model = make_model()
    model.fit(X, X, verbose=0)
    before = model.predict(X, verbose=0)
    model.get_layer("second").redraw()
    assert not np.array_equal(model.predict(X, verbose=0), before)


def test_refusals():
    for bad in (0, -1, 1.5, "epoch"):
        with pytest.raises(ValueError, match=f"`every`.*{bad}"):
            callbacks.RedrawProjections(bad)
    with pytest.raises(ValueError, match="unit='step'"):
        callbacks.RedrawProjections(unit="step")
    for bad in ({"rows": 0}, {"positions": 2.5}):
        with pytest.raises(ValueError, match="positive integer"):
            callbacks.LogApproximation("somewhere", X, **bad)


def scalars(folder):
    found = collections.defaultdict(list)
    for file in folder.iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[value.tag].append((event.step, float(tf.make_ndarray(value.tensor))))
    return found


def test_error_and_draws_are_logged(tmp_path):
    model = make_model(redraw_interval=4)
    logger = callbacks.LogApproximation(tmp_path, X, rows=2)
    model.fit(X, X, batch_size=2, epochs=3, verbose=0, callbacks=[logger])
    found = scalars(tmp_path)
    assert set(found) == {
        f"performer/{layer}/{what}"
        for layer in ("first", "second")
        for what in ("error", "redraws")
    }
    # 4 calls an epoch, 4 by each draw.
    assert found["performer/second/redraws"] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    errors = [error for _, error in found["performer/second/error"]]
    assert len(set(errors)) == 3 and all(0 < error < 3 for error in errors)

    # The last one is that of the model as it is, of two rows and all positions.
    first, second = model.get_layer("first"), model.get_layer("second")
    y = model.layers[2](first(X[:2], X[:2], use_causal_mask=True))
    q, k = second.query_dense(y), second.key_dense(X[:2])
    expected = diagnostics.approximation_error(q, k, second.projection.value)
    np.testing.assert_allclose(errors[-1], expected, rtol=1e-5)
    before = [variable.numpy() for variable in model.variables]
    again = [error for name, error, draw in logger.measure() if name == "second"]
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)  # measuring draws nothing, changes nothing
    np.testing.assert_allclose(again, errors[-1:], rtol=1e-6)
    assert "call" not in vars(second)


def test_models_that_pass_masks_by_position_are_logged():
    class Encoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = performer.Performer(2, 4, supports=16, seed=5)

        def call(self, x):
            return self.attention(x, x, x, tf.ones(tf.shape(x)[:2], tf.bool))

    model = Encoder()
    logger = callbacks.LogApproximation("unused", X)
    logger.set_model(model)
    model(X)
    ((name, error, draw),) = logger.measure()
    assert name == model.attention.name and 0 < error < 3 and draw == 0


def test_few_positions_of_long_sequences():
    model = make_model()
    logger = callbacks.LogApproximation("unused", X, positions=3)
    logger.set_model(model)
    name, error, draw = logger.measure()[0]
    assert (name, draw) == ("first", 0)
    first = model.get_layer("first")
    at = [0, 2, 5]
    q, k = (dense(X[:4])[:, :6] for dense in (first.query_dense, first.key_dense))
    expected = diagnostics.approximation_error(
        tf.gather(q, at, axis=1), tf.gather(k, at, axis=1), first.projection.value
    )
    np.testing.assert_allclose(error, expected, rtol=1e-6)


@pytest.mark.parametrize("entry", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_the_error_is_no_number_where_an_entry_is_none(which, entry):
    pair = [np.random.default_rng(i).normal(size=(1, 5, 2, 8)) for i in range(2)]
    pair[which][0, 3, 1, 2] = entry
    projection = performer.orthogonal_projection(16, 8, seed=1)
    assert np.isnan(diagnostics.approximation_error(*pair, projection))


@pytest.mark.slow
def test_the_error_falls_with_features_and_knows_the_map():
    random = np.random.default_rng(0)
    q, k = (random.normal(0, 0.4, (2, 32, h, 8)).astype("float32") for h in (4, 2))
    errors = [
        np.mean(
            [
                diagnostics.approximation_error(
                    q, k, performer.orthogonal_projection(m, 8, seed=seed)
                )
                for seed in range(8)
            ]
        )
        for m in (16, 256, 4096)
    ]
    # By 4 in theory, for 16 times the features; less while it is far from small.
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 0.15
    projection = performer.orthogonal_projection(4096, 8, seed=1)
    assert diagnostics.approximation_error(q, k, projection, feature_map="elu") > 0.3
    same = np.zeros_like(q)
    assert diagnostics.approximation_error(same, same, projection) == 0
    # Softmax is uniform, the estimate is not: no multiple of a distance 0.
    assert diagnostics.approximation_error(same, k, projection) == np.inf
