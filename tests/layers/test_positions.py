"""Rotary and learned positions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer.layers.rotary_embedding import positions_in_runs
from support.compare import assert_close, assert_same_bits


def normal(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def turned(x, positions, max_wavelength=10000, scaling_factor=1.0):
    """Rotary positions as products of complex numbers, in float64; x [B, L, H, D]."""
    half = x.shape[-1] // 2
    speed = float(max_wavelength) ** (-np.arange(half) / half) / scaling_factor
    z = x[..., :half].astype("complex128") + 1j * x[..., half:]
    z = z * np.exp(1j * np.multiply.outer(positions, speed))[:, None]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("start", [0, 17, 3_000_001])
@pytest.mark.parametrize("options", [{}, {"max_wavelength": 500, "scaling_factor": 4.0}])
def test_pairs_turn_like_complex_numbers(start, options):
    x = normal(2, 9, 3, 16)
    got = performer.RotaryEmbedding(**options)(x, start_index=start)
    assert_close(got, turned(x, start + np.arange(9), **options), worst=4e-6)


def test_products_depend_on_distance_and_norms_stay():
    rotary = performer.RotaryEmbedding()
    q, k = normal(1, 1, 2, 16, dtype="float64"), normal(1, 1, 2, 16, seed=1, dtype="float64")
    products = [
        np.sum(rotary(q, start_index=i + 5) * rotary(k, start_index=i), -1) for i in (0, 7, 5000)
    ]
    assert_close(products[1], products[0], worst=1e-11)
    assert_close(products[2], products[0], worst=1e-11)
    assert_close(np.linalg.norm(rotary(q, start_index=9)), np.linalg.norm(q), worst=1e-12)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_the_type_of_the_inputs_is_kept(dtype):
    x = tf.cast(normal(1, 5, 8), dtype)
    got = performer.RotaryEmbedding()(x, start_index=40)
    assert got.dtype == x.dtype and got.shape == x.shape
    expected = turned(np.float64(tf.cast(x, "float64"))[:, :, None], 40 + np.arange(5))[:, :, 0]
    assert_close(
        got, expected, rms={"float64": 1e-13, "float32": 1e-6, "float16": 1e-3}.get(dtype, 4e-3)
    )


def test_positions_start_again_with_every_run():
    ids = np.array([[3, 3, 3, 1, 1, 3], [2, 2, 2, 2, 5, 5]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]]
    np.testing.assert_array_equal(positions_in_runs(tf.constant(ids)), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_separate_ones(causal):
    layer = performer.Performer(2, 8, supports=16, rotary_embedding=performer.RotaryEmbedding())
    x = normal(1, 20, 12)
    ids = np.array([[0] * 7 + [1] * 13])
    packed = layer(x, x, segment_ids=ids, use_causal_mask=causal)
    parts = [layer(p, p, use_causal_mask=causal) for p in (x[:, :7], x[:, 7:])]
    assert_close(packed, np.concatenate(parts, 1), worst=1e-5)


def test_positions_follow_the_order_of_the_attention_axes():
    rotary = performer.RotaryEmbedding()
    image = performer.Performer(2, 8, supports=16, attention_axes=(2, 1), rotary_embedding=rotary)
    flat = performer.Performer(2, 8, supports=16, rotary_embedding=rotary)
    x = normal(1, 3, 4, 12)
    output = image(x, x)
    sequence = x.transpose(0, 2, 1, 3).reshape(1, 12, 12)
    flat(sequence, sequence)
    flat.set_weights(image.get_weights())
    expected = np.asarray(flat(sequence, sequence)).reshape(1, 4, 3, 12).transpose(0, 2, 1, 3)
    assert_close(output, expected, worst=1e-5)


def test_rotary_layers_are_saved(tmp_path):
    rotary = performer.RotaryEmbedding(max_wavelength=777)
    inputs = keras.Input((None, 12))
    attention = performer.Performer(2, 8, supports=16, rotary_embedding=rotary)
    model = keras.Model(inputs, attention(inputs, inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = normal(2, 9, 12)
    assert_same_bits(loaded(x), model(x))
    plain = performer.Performer(2, 8, supports=16)
    plain(x, x)
    plain.set_weights(attention.get_weights())
    assert not np.allclose(plain(x, x), model(x), atol=1e-3)


def test_learned_vectors_are_those_of_the_positions():
    layer = performer.PositionEmbedding(10)
    x = normal(2, 4, 6)
    table = layer(normal(1, 10, 6))[0]
    assert_same_bits(layer(x, start_index=6)[1], table[6:])
    assert_same_bits(layer(x, start_index=tf.constant(3))[0], table[3:7])


def test_token_embeddings_stream(tmp_path):
    layer = performer.TokenAndPositionEmbedding(20, 10, 6, mask_zero=True)
    tokens = np.array([[3, 4, 5, 0, 0, 0], [1, 2, 3, 4, 5, 6]])
    whole = layer(tokens)
    np.testing.assert_array_equal(whole._keras_mask, tokens != 0)
    state, parts = layer.get_initial_state(2), []
    for part in (tokens[:, :1], tokens[:, 1:4], tokens[:, 4:]):
        part, state = layer(part, initial_state=state, return_state=True)
        parts.append(part)
    assert_same_bits(np.concatenate(parts, 1), whole.numpy())
    assert int(state) == 6
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    assert_same_bits(keras.models.load_model(tmp_path / "model.keras")(tokens), whole.numpy())


def test_positions_beyond_the_last_are_refused():
    layer = performer.TokenAndPositionEmbedding(20, 10, 6)
    with pytest.raises(ValueError, match=r"below sequence_length = 10\. Received: start_index=8"):
        layer(np.ones((1, 3), int), start_index=8)
    call = tf.function(
        lambda x, start: layer(x, start_index=start),
        input_signature=[tf.TensorSpec([1, None], tf.int32), tf.TensorSpec([], tf.int32)],
    )
    assert call([[1, 2]], 8).shape == (1, 2, 6)
    for tokens, start in (([[1, 2, 3]], 8), ([[1, 2]], -1)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="below sequence_length = 10"):
            call(tokens, start)
    with pytest.raises(ValueError, match=r"at least 0 .*Received: start_index=-1"):
        layer(np.ones((1, 3), int), start_index=-1)


@pytest.mark.parametrize(("start", "outside"), [(9, [0, 1, 1]), (-2, [1, 1, 0]), (7, [0, 0, 0])])
def test_xla_gives_positions_beyond_the_last_no_vector_of_another(start, outside):
    layer = performer.TokenAndPositionEmbedding(20, 10, 6)
    call = tf.function(lambda x, start: layer(x, start_index=start), jit_compile=True)
    found = call(tf.ones([1, 3], tf.int32), tf.constant(start)).numpy()
    np.testing.assert_array_equal(np.isnan(found[0]).all(-1), np.array(outside, bool))


def test_bad_rotary_arguments_are_refused():
    for options in ({"max_wavelength": 0}, {"scaling_factor": -1.0}, {"max_wavelength": "10"}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be a number above 0"):
            performer.RotaryEmbedding(**options)
    with pytest.raises(ValueError, match=r"even number.*\(1, 2, 7\)"):
        performer.RotaryEmbedding()(normal(1, 2, 7))
    with pytest.raises(ValueError, match="`rotary_embedding` must be None with"):
        performer.Performer(
            2, 4, attention_method="quadratic", rotary_embedding=performer.RotaryEmbedding()
        )


def test_axes_of_rotary_inputs_are_the_callers_choice():
    x = normal(2, 9, 3, 16)
    expected = performer.RotaryEmbedding()(x, start_index=4)
    for order, axes in (
        ((0, 2, 1, 3), (2, -1)),
        ((0, 3, 2, 1), (-1, 1)),
        ((0, 1, 3, 2), (1, 2)),
    ):
        rotary = performer.RotaryEmbedding(sequence_axis=axes[0], feature_axis=axes[1])
        rotary = performer.RotaryEmbedding.from_config(rotary.get_config())
        turned_back = np.transpose(rotary(x.transpose(order), start_index=4), np.argsort(order))
        assert_close(turned_back, expected, worst=1e-6)
    each = np.array([[7, 1, 0, 2, 2, 9, 3, 5, 4], np.arange(9)])
    rotary = performer.RotaryEmbedding(sequence_axis=2, feature_axis=1)
    got = rotary(x.transpose(0, 3, 1, 2), positions=each)
    assert_close(got[0, :, 5], turned_rows(x[0, 5], 9).T, worst=4e-6)
    with pytest.raises(ValueError, match="`sequence_axis` and `feature_axis` must be two axes"):
        performer.RotaryEmbedding(sequence_axis=3)(x)


def turned_rows(x, position):
    return turned(x[None, None], np.array([position]))[0, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_rotary_layer_of_another_type_gives_this_type(dtype):
    layer = performer.RotaryEmbedding(dtype=dtype)
    assert layer(normal(1, 5, 8)).dtype == dtype
    assert layer(keras.Input((5, 8))).dtype == dtype
    attention = performer.Performer(2, 8, supports=4, rotary_embedding=layer)
    assert attention(normal(1, 5, 8), normal(1, 5, 8)).dtype == "float32"


def test_learned_vectors_of_given_positions_and_of_more_axes():
    layer = performer.PositionEmbedding(10)
    table = layer(normal(1, 10, 6))[0]
    positions = np.array([[3, 9], [0, 3]])
    assert_same_bits(layer(normal(2, 2, 6), positions=positions), tf.gather(table, positions))
    assert_same_bits(layer(normal(2, 2, 6), positions=[4, 1])[1], tf.gather(table, [4, 1]))
    deep = layer(normal(2, 5, 2, 6), positions=positions)
    assert_same_bits(deep[1, 3], tf.gather(table, positions[1]))
    assert_same_bits(layer(normal(2, 5, 3, 6), start_index=2)[1, 4], table[2:5])
    assert layer(keras.Input((None, None, 6))).shape == (None, None, None, 6)
    with pytest.raises(tf.errors.InvalidArgumentError, match="below sequence_length = 10"):
        layer(normal(2, 2, 6), positions=[4, 10])
    for bad in ([1, 2, 3], [[[1]]], ["a", "b"], None.__class__):
        with pytest.raises(ValueError, match="`positions` must be numbers of shape"):
            layer(normal(2, 2, 6), positions=bad)


def test_positions_do_not_wrap_around_32_bits():
    layer = performer.PositionEmbedding(10)
    x = normal(1, 2, 6)
    layer(x)
    call = tf.function(lambda start: layer(x, start_index=start))
    for start in (2**32, 2**63 - 1, -(2**32)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="below sequence_length = 10"):
            call(tf.constant(start, tf.int64))
