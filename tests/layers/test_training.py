"""The Performer layer in training: redraws, dropout, gradients, fit, dtype policies."""

import itertools
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer.layers._projection import RandomProjection
from performer.ops import fingerprint
from support.keras_versions import known
from support.operator_calls import needs_xla


def normal(*shape, seed=0, std=1.0):
    return np.random.default_rng(seed).normal(0, std, shape).astype("float32")


def linear(**options):
    return performer.Performer(
        **{"num_heads": 2, "key_dim": 4, "supports": 8, "seed": 5, **options}
    )


def draws_of_training(layer, calls, call=None):
    """Projections and draw numbers that `calls` training calls use."""
    x = normal(2, 3, 6)
    used = []
    for _ in range(calls):
        (call or layer)(x, x, training=True)
        used.append((layer.projection.numpy(), int(layer.redraws)))
    return used


@pytest.mark.parametrize("graph", [False, True])
def test_redraw_schedule(graph):
    layer = linear(redraw_interval=3)
    used = draws_of_training(layer, 8, tf.function(layer) if graph else None)
    assert [draw for _, draw in used] == [0, 0, 0, 1, 1, 1, 2, 2]
    for (first, i), (second, j) in itertools.combinations(used, 2):
        assert np.array_equal(first, second) == (i == j)

    x = normal(2, 3, 6)
    before = layer(x, x)
    for _ in range(7):
        np.testing.assert_array_equal(layer(x, x, training=False), before)
    assert layer.redraws == 2

    # The same seed draws the same sequence, eagerly and in graphs.
    again = draws_of_training(linear(redraw_interval=3), 8)
    for (one, _), (other, _) in zip(used, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    other_seed = draws_of_training(linear(redraw_interval=3, seed=6), 1)
    assert not np.array_equal(used[0][0], other_seed[0][0])


def test_no_schedule_no_redraw():
    layer = linear()
    used = draws_of_training(layer, 4)
    assert all(np.array_equal(projection, used[0][0]) for projection, _ in used)
    assert layer.redraws == 0


def test_redraw_by_hand_restarts_the_count():
    layer = linear(redraw_interval=2)
    first = draws_of_training(layer, 1)[0][0]
    layer.redraw()
    assert layer.redraws == 1 and not np.array_equal(layer.projection, first)
    assert [draw for _, draw in draws_of_training(layer, 3)] == [1, 1, 2]


def test_unseeded_layers_follow_the_global_seed():
    def projection():
        layer = linear(seed=None)
        layer.build((2, 3, 6), (2, 3, 6))
        return layer.projection.numpy()

    keras.utils.set_random_seed(1)
    first, second = projection(), projection()
    keras.utils.set_random_seed(1)
    np.testing.assert_array_equal(projection(), first)
    assert not np.array_equal(first, second)


@pytest.mark.slow
def test_schedule_under_xla_draws_what_it_draws_without():
    def used(jit_compile):
        projection = RandomProjection(6, 4, scaling=1, seed=5, redraw_interval=2)
        projection.build()
        step = tf.function(lambda: projection.current(training=True), jit_compile=jit_compile)
        return [step()[0].numpy() for _ in range(5)], int(projection.redraws)

    (compiled, draw), (plain, _) = used(True), used(False)
    assert draw == 2
    for i, one in enumerate(compiled):
        np.testing.assert_allclose(one, plain[i], rtol=1e-6)
        assert [np.array_equal(one, other) for other in compiled] == [
            i // 2 == j // 2 for j in range(5)
        ]


def test_schedule_in_a_stateless_scope():
    layer, x = linear(redraw_interval=1), normal(2, 3, 6)
    layer(x, x)
    variables = [v.value for v in layer.non_trainable_variables]
    for _ in range(3):
        _, variables = layer.stateless_call(
            layer.trainable_variables, variables, x, x, training=True
        )
    names = [v.path for v in layer.non_trainable_variables]
    after = dict(zip(names, variables, strict=True))
    assert after[layer.redraws.path] == 2 and layer.redraws == 0


@pytest.mark.parametrize("scaling", [0, 1])
def test_norms_of_rows(scaling):
    layer = linear(supports=4096, key_dim=6, scaling=scaling)
    layer.build((2, 3, 6), (2, 3, 6))
    squares = np.sum(layer.projection.numpy() ** 2, axis=1)
    # Chi-squared with 6 degrees of freedom: variance 12, so 5 standard errors of the mean.
    assert abs(squares.mean() - 6) < 5 * np.sqrt(12 / 4096)
    if scaling:
        np.testing.assert_allclose(squares, 6, rtol=1e-5)
    else:
        assert 10 < squares.var() < 14


def test_dropout_drops_whole_keys_and_normalises_the_rest():
    layer = linear(num_heads=1, dropout=0.4)
    rows, keys = 200, 3
    query = np.tile(normal(1, 4, 6), (rows, 1, 1))
    value = np.tile(normal(1, keys, 6, seed=1), (rows, 1, 1))
    np.testing.assert_array_equal(layer(query, value)[0], layer(query, value)[1])
    subsets = list(itertools.product([False, True], repeat=keys))
    expected = [layer(query[:1], value[:1], value_mask=np.array([subset]))[0] for subset in subsets]
    output = layer(query, value, training=True).numpy()
    distance = np.array([np.abs(output - e).max(axis=(1, 2)) for e in expected])
    assert np.all(distance.min(axis=0) < 1e-5)
    chosen = distance.argmin(axis=0)
    dropped = sum(keys - sum(subsets[i]) for i in chosen)
    # Binomial of 600 at 0.4: standard deviation 12.
    assert abs(dropped - 240) < 60
    assert 0 in chosen  # all keys dropped: attention 0
    assert not np.array_equal(output, layer(query, value, training=True))


def test_dropout_gradients_follow_the_forward_pass():
    layer = linear(num_heads=1, dropout=0.5)
    query, value = tf.constant(normal(8, 2, 6)), tf.constant(normal(8, 5, 6, seed=1))
    layer(query, value)
    with tf.GradientTape() as tape:
        tape.watch(value)
        output = layer(query, value, training=True)
    touched = np.any(tape.gradient(output, value).numpy() != 0, axis=-1)
    assert np.all(np.isfinite(output)) and 0 < touched.sum() < touched.size
    # The output is that of attention to just these keys.
    expected = layer(query, value, value_mask=tf.constant(touched))
    some = touched.any(1)
    np.testing.assert_allclose(output[some], expected[some], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_all_trainable_weights(causal):
    layer = linear(dtype="float64", **known({"use_gate": True}))
    x = normal(2, 5, 6).astype("float64")
    direction = [normal(*w.shape, seed=i) for i, w in enumerate(layer_weights(layer, x))]

    def loss():
        return tf.reduce_sum(layer(x, x, use_causal_mask=causal) ** 2)

    with tf.GradientTape() as tape:
        value = loss()
    gradients = tape.gradient(value, layer.trainable_weights)
    assert len(gradients) == 8 + 2 * len(known({"use_gate": True}))
    assert all(np.any(gradient.numpy() != 0) for gradient in gradients)
    expected = sum(np.sum(g.numpy() * d) for g, d in zip(gradients, direction, strict=True))
    ends = []
    for step in (1e-5, -2e-5):
        for weight, d in zip(layer.trainable_weights, direction, strict=True):
            weight.assign_add(step * d)
        ends.append(loss().numpy())
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, expected, rtol=1e-6)


def layer_weights(layer, x):
    layer.build(x.shape, x.shape)
    return layer.trainable_weights


@pytest.mark.parametrize("eager", [True, False])
def test_fit(eager):
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 8))
    layer = linear(redraw_interval=2, dropout=0.1)
    hidden = keras.layers.Add()([inputs, layer([inputs, inputs])])
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=eager)
    assert not model.jit_compile
    x = normal(8, 6, 8)
    history = model.fit(x, x[..., :1], batch_size=4, epochs=2, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert layer.redraws == 1  # 4 training calls, 2 by each draw


@pytest.mark.parametrize(
    ("policy", "bound"), [("mixed_bfloat16", 0.05), ("mixed_float16", 0.01), ("float64", 1e-5)]
)
def test_dtype_policies(policy, bound):
    plain, layer = linear(), linear(dtype=policy, redraw_interval=2)
    x = normal(2, 6, 8)
    expected = plain(x, x).numpy()
    layer.build(x.shape, x.shape)
    layer.set_weights(plain.get_weights())
    output = layer(x, x, training=True)
    assert output.dtype == layer.compute_dtype == layer(keras.Input((6, 8)), x).dtype
    error = np.sqrt(np.mean((np.asarray(output, "float64") - expected) ** 2))
    assert error < bound * np.sqrt(np.mean(expected**2))
    assert layer.projection.dtype == "float32" and layer.redraws.dtype == "int64"
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(x, x, training=True, use_causal_mask=True))
    assert all(g is not None for g in tape.gradient(loss, layer.trainable_weights))


@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_feature_maps(feature_map):
    layer, x = linear(feature_map=feature_map), normal(2, 6, 8)
    q, k, v = (
        dense(x).numpy() for dense in (layer_dense(layer, x), layer.key_dense, layer.value_dense)
    )
    w = layer.projection.numpy()

    def features(x):
        u = np.einsum("blhd,md->bhlm", x, w)
        return (
            np.maximum(u, 0) + 1e-3 if feature_map == "relu" else np.where(u > 0, u + 1, np.exp(u))
        )

    scores = np.einsum("bhlm,bhsm->bhls", features(q), features(k))
    attended = np.einsum("bhls,bshe->blhe", scores / scores.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(
        layer(x, x), layer.output_dense(attended.astype("float32")), rtol=1e-4, atol=1e-5
    )


def layer_dense(layer, x):
    layer.build(x.shape, x.shape)
    return layer.query_dense


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "graph", pytest.param("xla", marks=needs_xla)])
def test_calls_of_eight_threads_are_counted_one_by_one(how):
    layer, x = linear(redraw_interval=3), normal(2, 3, 6)
    call = layer if how == "eager" else tf.function(layer, jit_compile=how == "xla")
    call(x, x, training=True)
    threads = [
        threading.Thread(target=lambda: [call(x, x, training=True) for _ in range(10)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layer.redraws == 80 // 3  # 81 calls, 3 by each draw
    assert_fingerprint(layer)
    again = linear(redraw_interval=3)
    again.build((2, 3, 6), (2, 3, 6))
    for _ in range(80 // 3):
        again.redraw()
    np.testing.assert_allclose(layer.projection, again.projection, rtol=1e-5, atol=1e-6)


def assert_fingerprint(layer):
    assert int(layer.draw) == int(fingerprint(layer.projection))


def test_the_draw_follows_whatever_replaces_the_projection(tmp_path):
    layer, x = linear(), normal(2, 3, 6)
    layer(x, x)
    seen = [int(layer.draw)]

    def changed():
        assert_fingerprint(layer)
        seen.append(int(layer.draw))
        assert len(set(seen)) == len(seen)

    assert_fingerprint(layer)
    layer.redraw()
    changed()
    layer.projection.assign(normal(8, 4, seed=9))
    changed()
    weights = layer.get_weights()
    place = [w is layer.projection for w in layer.weights].index(True)
    weights[place] = normal(8, 4, seed=10)  # the fingerprint in the list is of another one
    layer.set_weights(weights)
    changed()
    checkpoint = tf.train.Checkpoint(layer=layer)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    saved = int(layer.draw)
    layer.redraw()
    changed()
    checkpoint.read(path).assert_consumed()
    assert_fingerprint(layer)
    assert int(layer.draw) == saved
