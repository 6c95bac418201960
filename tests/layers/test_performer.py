"""The Performer layer: calls, shapes, axes, masks, agreement with the parent, refusals."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer.layers._axes import fold, resolve_axes, unfold
from performer.networks import linear_attention
from support.keras_versions import known


def normal(*shape, seed=0, std=1.0):
    return np.random.default_rng(seed).normal(0, std, shape).astype("float32")


def linear(**options):
    options = {"num_heads": 2, "key_dim": 4, "supports": 16, "seed": 5, **options}
    return performer.Performer(bias_initializer="random_normal", **options)


def output_bias(layer):
    return layer.output_dense.bias.numpy()


def test_published_examples():
    layer = linear_attention.Performer(
        num_heads=2, key_dim=2, attention_method="linear", supports=2, attention_axes=None
    )
    query, key = tf.keras.Input(shape=[8, 16]), tf.keras.Input(shape=[4, 16])
    assert layer([query, key]).shape == (None, 8, 16)

    layer = performer.Performer(
        num_heads=2, key_dim=2, attention_method="linear", supports=10, attention_axes=(2, 3)
    )
    query, key = tf.keras.Input(shape=[5, 3, 4, 16]), tf.keras.Input(shape=[5, 3, 4, 16])
    output = layer([query, key])
    assert output.shape == (None, 5, 3, 4, 16)
    model = keras.Model([query, key], output)
    x, y = normal(2, 5, 3, 4, 16), normal(2, 5, 3, 4, 16, seed=1)
    np.testing.assert_array_equal(model([x, y]), layer(x, y))


def test_list_calls_are_calls():
    layer = linear()
    q, v, k = normal(2, 5, 6), normal(2, 3, 6, seed=1), normal(2, 3, 6, seed=2)
    np.testing.assert_array_equal(layer([q, v]), layer(q, v))
    np.testing.assert_array_equal(layer([q, v, k]), layer(q, v, key=k))
    np.testing.assert_array_equal(layer((q, v), key=k), layer(query=q, value=v, key=k))
    assert not np.array_equal(layer([q, v, k]), layer([q, v]))
    for inputs in ([q], [q, v, k, k]):
        with pytest.raises(
            ValueError, match=rf"\[query, value\].*Received a list of {len(inputs)}"
        ):
            layer(inputs)


def test_symbolic_and_eager_agree():
    layer = linear(value_dim=3, output_shape=(2, 5), use_bias=False, **known({"use_gate": True}))
    q, v, k = normal(2, 5, 6), normal(2, 3, 7, seed=1), normal(2, 3, 8, seed=2)
    inputs = [keras.Input((None, x.shape[-1])) for x in (q, v, k)]
    output = layer(inputs)
    assert output.shape == (None, None, 2, 5)
    assert layer(q, v, k).shape == layer.compute_output_shape(q.shape, v.shape, k.shape)
    np.testing.assert_array_equal(keras.Model(inputs, output)([q, v, k]), layer(q, v, k))


@pytest.mark.parametrize("options", [{}, known({"use_gate": True}), {"dropout": 0.25, "seed": 3}])
def test_quadratic_is_the_parent_bit_for_bit(options):
    options = {"num_heads": 2, "key_dim": 4, **options}
    parent = keras.layers.MultiHeadAttention(**options)
    layer = performer.Performer(attention_method="quadratic", **options)
    q, v = normal(2, 6, 8), normal(2, 6, 8, seed=1)
    parent(q, v), layer([q, v])
    layer.set_weights(parent.get_weights())
    mask = np.tri(6, dtype=bool)[None]
    for call in (
        {},
        {"use_causal_mask": True},
        {"attention_mask": mask},
        {"return_attention_scores": True},
        {"training": True},
    ):
        for got, expected in zip(
            tf.nest.flatten(layer(q, v, **call)), tf.nest.flatten(parent(q, v, **call)), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert layer.projection is None and layer.draw is None and layer.supports_jit


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_softmax_as_supports_grow(causal):
    """At small norms the rms error is below 2 / sqrt(M) of the spread, and falls 4x for M x 16."""
    x = normal(2, 12, 8, std=0.5)
    exact = keras.layers.MultiHeadAttention(2, 8)
    expected = exact(x, x, use_causal_mask=causal).numpy()
    error = {}
    for supports in (32, 512):
        layer = linear(key_dim=8, supports=supports)
        layer.build(x.shape, x.shape)
        layer.set_weights(exact.get_weights() + layer.get_weights()[len(exact.weights) :])
        squares = []
        for _ in range(8):
            squares.append(np.mean((layer(x, x, use_causal_mask=causal).numpy() - expected) ** 2))
            layer.redraw()
        error[supports] = np.sqrt(np.mean(squares) / np.mean(expected**2))
    assert error[512] < 2 / np.sqrt(512)
    assert 2.5 < error[32] / error[512] < 6.5


def test_causal_past_does_not_see_the_future():
    layer = linear()
    x = normal(2, 9, 6)
    before = layer(x, x, use_causal_mask=True).numpy()
    for garbage in (np.nan, 1e30, 7.0):
        changed = x.copy()
        changed[:, 5:] = garbage
        after = layer(changed, changed, use_causal_mask=True).numpy()
        np.testing.assert_array_equal(after[:, :5], before[:, :5])
    last = layer(x[:, -1:], x).numpy()
    np.testing.assert_allclose(before[:, -1:], last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["value_mask", "key_mask", "attention_mask", "attention_mask 4-D", "attached"]
)
def test_masked_keys_are_deleted_keys(form):
    layer = linear()
    query, value = normal(2, 4, 6), normal(2, 7, 6, seed=1)
    kept = np.array([True, False, True, True, False, True, False])
    expected = layer(query, value[:, kept])
    poisoned = np.where(kept[:, None], value, np.nan).astype("float32")
    mask = np.stack([kept, kept])
    if form == "attached":
        poisoned = tf.constant(poisoned)
        poisoned._keras_mask = tf.constant(mask)
        output = layer(query, poisoned)
        assert poisoned._keras_mask is not None
    elif form == "attention_mask":
        output = layer(query, poisoned, attention_mask=mask[:, None])
    elif form == "attention_mask 4-D":
        output = layer(query, poisoned, attention_mask=mask[:1, None, None].astype("int32"))
    else:
        output = layer(query, poisoned, **{form: mask})
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_masks_combine_and_empty_rows_give_the_bias():
    layer = linear()
    x = normal(2, 4, 6)
    some = np.array([[True, True, False, True], [True, False, True, True]])
    other = np.array([[False, True, True, True], [False] * 4])
    both = layer(x, x, x, value_mask=some, key_mask=other)
    np.testing.assert_array_equal(both, layer(x, x, value_mask=some & other))
    np.testing.assert_array_equal(both[1], np.broadcast_to(output_bias(layer), (4, 6)))

    causal = layer(x, x, value_mask=other, use_causal_mask=True)
    np.testing.assert_array_equal(causal[0, 0], output_bias(layer))

    plain, masked = layer(x, x).numpy(), layer(x, x, query_mask=some).numpy()
    np.testing.assert_array_equal(masked[some], plain[some])
    np.testing.assert_array_equal(masked[~some], np.broadcast_to(output_bias(layer), (2, 6)))


def test_masks_of_embeddings_pass_through():
    ids = np.array([[3, 1, 2, 0, 0], [4, 4, 0, 0, 0]])
    inputs = keras.Input([None], dtype="int32")
    embedded = keras.layers.Embedding(6, 8, mask_zero=True)(inputs)
    layer = linear()
    model = keras.Model(inputs, layer([embedded, embedded]))
    output = model(ids)
    np.testing.assert_array_equal(output._keras_mask, ids != 0)
    short = model(ids[1:, :2])
    np.testing.assert_allclose(output[1, :2], short[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output[1, 2:], np.broadcast_to(output_bias(layer), (3, 8)))


@pytest.mark.parametrize(
    ("axes", "causal"),
    [((2,), True), ((1, 3), False), ((1, 3), True), ((-2, 1), True), (2, False), (None, True)],
)
def test_axes_are_a_loop_over_the_others(axes, causal):
    layer = linear(attention_axes=axes)
    shape = (1, 2, 4, 3, 6)
    x = normal(*shape)
    mask = np.random.default_rng(1).random(shape[:-1]) < 0.7
    output = layer(x, x, value_mask=mask, use_causal_mask=causal).numpy()

    attended = resolve_axes((axes,) if isinstance(axes, int) else axes, 5)
    others = [axis for axis in range(4) if axis not in attended]
    flat = linear(seed=6)
    flat.build((1, 3, 6), (1, 3, 6))
    flat.set_weights(layer.get_weights())
    order = [*attended, 4]
    for index in itertools.product(*(range(shape[axis]) for axis in others)):
        at = [slice(None)] * 5
        for axis, i in zip(others, index, strict=True):
            at[axis] = i
        left = [axis for axis in range(5) if axis not in others]
        transposition = [left.index(axis) for axis in order]
        sequence = x[tuple(at)].transpose(transposition).reshape(1, -1, 6)
        kept = mask[tuple(at[:-1])].transpose(transposition[:-1]).reshape(1, -1)
        expected = flat(sequence, sequence, value_mask=kept, use_causal_mask=causal).numpy()
        got = output[tuple(at)].transpose(transposition).reshape(1, -1, 6)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_mask_over_the_attended_axes_only():
    layer = linear(attention_axes=(2, 1))
    x = normal(2, 3, 4, 5, 6)
    mask = np.random.default_rng(1).random((2, 4, 3)) < 0.6
    full = np.broadcast_to(mask.transpose(0, 2, 1)[..., None], (2, 3, 4, 5))
    expected = layer(x, x, value_mask=full)
    np.testing.assert_array_equal(layer(x, x, value_mask=mask), expected)
    np.testing.assert_array_equal(layer(x, x, attention_mask=mask[:, None, None]), expected)


def test_fold_with_unknown_sizes():
    x = normal(2, 3, 4, 2, 5, 6)

    @tf.function(input_signature=[tf.TensorSpec([None] * 4 + [5, 6])])
    def there_and_back(x):
        folded = fold(x, (3, 1))
        assert folded.shape[2:] == (5, 6)
        return folded, unfold(folded, (3, 1), like=x[..., 0])

    folded, back = there_and_back(x)
    assert folded.shape == (2 * 4, 2 * 3, 5, 6)
    np.testing.assert_array_equal(back, x)
    assert there_and_back(x[:0])[1].shape == (0, 3, 4, 2, 5, 6)


def test_empty_batch_and_no_keys():
    layer = linear()
    x = normal(2, 3, 6)
    assert layer(x[:0], x[:0]).shape == (0, 3, 6)
    nothing = layer(x, x[:, :0])
    np.testing.assert_array_equal(nothing, np.broadcast_to(output_bias(layer), (2, 3, 6)))
