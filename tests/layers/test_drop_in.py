"""Performer takes the place of MultiHeadAttention: a table, argument by argument.

Every row is a call that both layers get, with the same weights. What the quadratic layer returns
must be the same bits; what the linear one returns, the same within what thousands of random
features leave open at these small norms.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from support.keras_versions import known

RANDOM = np.random.default_rng(0)


def normal(*shape, std=0.5):
    return RANDOM.normal(0, std, shape).astype("float32")


QUERY, VALUE, KEY = normal(3, 5, 8), normal(3, 4, 8), normal(3, 4, 8)
IMAGE, OTHER_IMAGE = normal(2, 3, 4, 8), normal(2, 3, 4, 8)
MASK = RANDOM.random((3, 2, 5, 4)) < 0.6
MASK[..., 0] = True
ROWS = np.array([[True] * 5, [True] * 3 + [False] * 2, [True, False] * 2 + [True]])
BASE = {"num_heads": 2, "key_dim": 4}
# The error to softmax, of the spread of what is compared, that so many features may make here.
BOUND = 0.08


def both(method, inputs=(QUERY, VALUE), supports=32768, **options):
    """A MultiHeadAttention, and a Performer with the same weights."""
    options = {**BASE, **options}
    keras.utils.set_random_seed(1)
    exact = keras.layers.MultiHeadAttention(**options)
    exact.build(*(x.shape for x in inputs))
    added = {"supports": supports, "seed": 7} if method == "linear" else {}
    layer = performer.Performer(attention_method=method, **{**added, **options})
    performer.convert.copy_weights(exact, layer)
    return exact, layer


def assert_same(method, exact, layer, *inputs, rows=..., **call):
    """Both layers agree on a call, eagerly, and on its symbolic shapes."""
    expected, output = (tf.nest.flatten(x(*inputs, **call)) for x in (exact, layer))
    symbolic = tf.nest.flatten(layer(*(keras.Input(batch_shape=x.shape) for x in inputs), **call))
    for one, other, spec in zip(expected, output, symbolic, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == spec.dtype
        assert spec.shape == other.shape
        one, other = (x.numpy().astype("float32") for x in (one, other))
        if one.shape[:2] == ROWS.shape:
            one, other = one[rows], other[rows]
        if method == "quadratic":
            np.testing.assert_array_equal(other, one)
        else:
            assert np.sqrt(np.mean((other - one) ** 2)) < BOUND * np.std(one)


# Constructor: argument, values, and the inputs where others than the usual are needed.
CONSTRUCTOR = {
    "num_heads": [1, 3],
    "key_dim": [1, 6],
    "value_dim": [3],
    "dropout": [0.5],
    "use_bias": [False],
    "output_shape": [5, (2, 3)],
    "attention_axes": [1, -2, (1,)],
    "sliding_window": [2],
    "flash_attention": [False],
    "kernel_initializer": ["he_normal", keras.initializers.TruncatedNormal(stddev=0.2)],
    "bias_initializer": ["ones"],
    "kernel_regularizer": ["l2"],
    "bias_regularizer": ["l1"],
    "activity_regularizer": ["l2"],
    "kernel_constraint": ["non_neg"],
    "bias_constraint": ["max_norm"],
    "use_gate": [True],
    "seed": [3],
    "kwargs": [{"name": "attention"}, {"trainable": False}, {"dtype": "float64"}],
}
ONLY_QUADRATIC = {"sliding_window"}


@pytest.mark.parametrize("method", ["linear", "quadratic"])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, row in CONSTRUCTOR.items() for value in row]
)
def test_constructor(name, value, method):
    options = value if name == "kwargs" else {name: value}
    if not known(options):
        pytest.skip(f"this Keras has no {name}")
    if method == "linear" and name in ONLY_QUADRATIC:
        with pytest.raises(
            ValueError, match=f"`{name}` must be None with attention_method='linear'"
        ):
            performer.Performer(supports=8, **{**BASE, **options})
        return
    exact, layer = both(method, supports=4096, **options)
    assert_same(method, exact, layer, QUERY, VALUE)
    assert [(w.path.split("/")[-2:], w.shape) for w in exact.weights] == [
        (w.path.split("/")[-2:], w.shape) for w in layer.weights[: len(exact.weights)]
    ]
    # What the argument does to the weights, and to the losses.
    for one, other in zip(exact.weights, layer.weights, strict=False):
        assert type(one.regularizer) is type(other.regularizer)
        assert type(one.constraint) is type(other.constraint)
        assert one.trainable == other.trainable
    exact(QUERY, VALUE), layer(QUERY, VALUE)
    np.testing.assert_allclose(sum(layer.losses), sum(exact.losses), rtol=0.05)
    config, expected = layer.get_config(), exact.get_config()
    mine = {"name", "seed", "flash_attention"} - set(options)
    assert {k: config[k] for k in expected if k not in mine} == {
        k: v for k, v in expected.items() if k not in mine
    }


def test_initializers_reach_every_sublayer():
    initializer = keras.initializers.RandomNormal(stddev=0.3, seed=5)
    layers = [
        kind(**BASE, kernel_initializer=initializer, bias_initializer="ones", **added)
        for kind, added in (
            (keras.layers.MultiHeadAttention, {}),
            (performer.Performer, {"supports": 8}),
        )
    ]
    for layer in layers:
        layer.build(QUERY.shape, VALUE.shape)
    for one, other in zip(layers[0].weights, layers[1].weights, strict=False):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["linear", "quadratic"])
@pytest.mark.parametrize("axes", [None, (1,), 2, (1, 2), (2, 1), (-2, -3)])
def test_attention_axes(axes, method):
    inputs = IMAGE, OTHER_IMAGE
    exact, layer = both(method, inputs, attention_axes=axes)
    assert_same(method, exact, layer, *inputs)
    assert_same(method, exact, layer, *inputs, return_attention_scores=True)


# Call: argument, and rows of keyword arguments that show it.
CALL = {
    "query": [{}],
    "value": [{}],
    "key": [{"key": KEY}],
    "query_mask": [{"query_mask": ROWS}],
    "value_mask": [{"value_mask": MASK[:, 0, 0]}, {"value_mask": MASK[:, 0, 0].astype("int32")}],
    "key_mask": [
        {"key": KEY, "key_mask": MASK[:, 0, 1]},
        {"key": KEY, "key_mask": MASK[:, 0, 1], "value_mask": MASK[:, 0, 0]},
    ],
    "attention_mask": [
        {"attention_mask": MASK[:, 0]},
        {"attention_mask": MASK[:, 0].astype("float32")},
        {"attention_mask": MASK[0, 0]},
        {"attention_mask": MASK[:, :1]},
        {"attention_mask": MASK},
        {"attention_mask": MASK[:, 0, :1]},
        {"attention_mask": MASK[:, :1, :1]},
        {"attention_mask": MASK[:, 0], "value_mask": MASK[:, 1, 0]},
    ],
    "return_attention_scores": [
        {"return_attention_scores": True},
        {"return_attention_scores": True, "attention_mask": MASK[:, 0]},
        {"return_attention_scores": True, "use_causal_mask": True},
        {"return_attention_scores": True, "value_mask": MASK[:, 0, 0]},
    ],
    "training": [{"training": False}, {"training": True}, {"training": None}],
    "use_causal_mask": [
        {"use_causal_mask": True},
        {"use_causal_mask": True, "value_mask": MASK[:, 0, 0]},
        {"use_causal_mask": True, "attention_mask": MASK[:, 0]},
    ],
}


@pytest.fixture(scope="module", params=["linear", "quadratic"])
def pair(request):
    return request.param, *both(request.param)


@pytest.mark.parametrize(
    ("name", "row"), [(n, i) for n, rows in CALL.items() for i in range(len(rows))]
)
def test_call(name, row, pair):
    method, exact, layer = pair
    call = {
        k: tf.constant(v) if isinstance(v, np.ndarray) else v for k, v in CALL[name][row].items()
    }
    # Keras's layer looks at attached masks of the query only, and a masked query is nobody's.
    rows = ROWS if "query_mask" in call else ...
    assert_same(method, exact, layer, QUERY, VALUE, rows=rows, **call)


@pytest.mark.parametrize("lengths", [(5, 4), (4, 5), (5, 5)])
def test_causal_calls_of_any_lengths(lengths, pair):
    method, exact, layer = pair
    query, value = normal(3, lengths[0], 8), normal(3, lengths[1], 8)
    assert_same(method, exact, layer, query, value, use_causal_mask=True)
    if method == "linear":
        spec = [tf.TensorSpec([None, None, 8])] * 2
        dynamic = tf.function(lambda q, v: layer(q, v, use_causal_mask=True), input_signature=spec)
        expected = layer(query, value, use_causal_mask=True)
        np.testing.assert_allclose(dynamic(query, value), expected, rtol=1e-5, atol=1e-6)


def test_attached_masks(pair):
    method, exact, layer = pair
    outputs = []
    for attention in (exact, layer):
        query, value = tf.constant(QUERY), tf.constant(VALUE)
        query._keras_mask, value._keras_mask = tf.constant(ROWS), tf.constant(MASK[:, 0, 0])
        output = attention(query, value)
        np.testing.assert_array_equal(output._keras_mask, ROWS)
        if attention is layer:  # Keras's layer takes them off the tensors of the caller
            np.testing.assert_array_equal(query._keras_mask, ROWS)
            np.testing.assert_array_equal(value._keras_mask, MASK[:, 0, 0])
        outputs.append(output.numpy()[ROWS])
    assert np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2)) < BOUND * np.std(outputs[0])
    if method == "quadratic":
        np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_query_masks_of_grouped_quadratic_heads(attached, causal):
    exact = keras.layers.GroupQueryAttention(8, 4, 2)
    layer = performer.Performer(4, 8, num_key_value_heads=2, attention_method="quadratic")
    exact(QUERY, VALUE), layer(QUERY, VALUE)
    layer.set_weights(exact.get_weights())
    outputs = []
    for attention in (exact, layer):
        query = tf.constant(QUERY)
        options = {"use_causal_mask": causal}
        if attached:
            query._keras_mask = tf.constant(ROWS)
        else:
            options["query_mask"] = tf.constant(ROWS)
        outputs.append(attention(query, VALUE, **options).numpy()[ROWS])
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


def test_queries_that_see_no_key(pair):
    """Keras: the mean of all values in one path, the bias in another. Here always the bias."""
    method, exact, layer = pair
    nothing = tf.zeros([3, 5, 4], tf.bool)
    if method == "quadratic":
        assert_same(method, exact, layer, QUERY, VALUE, attention_mask=nothing)
        return
    for call in (
        {"attention_mask": nothing},
        {"attention_mask": nothing[:, :1]},
        {"value_mask": nothing[:, 0]},
        {"attention_mask": nothing, "return_attention_scores": True},
    ):
        output, *scores = tf.nest.flatten(layer(QUERY, VALUE, **call))
        bias = layer.output_dense.bias
        np.testing.assert_array_equal(output, tf.broadcast_to(bias, output.shape))
        for score in scores:
            np.testing.assert_array_equal(score, tf.zeros_like(score))


def test_no_argument_is_left_out():
    for table, function in (
        (CONSTRUCTOR, keras.layers.MultiHeadAttention.__init__),
        (CALL, keras.layers.MultiHeadAttention.call),
    ):
        assert set(inspect.signature(function).parameters) - {"self"} <= set(table)
    names = [*inspect.signature(keras.layers.MultiHeadAttention.call).parameters]
    assert [*inspect.signature(performer.Performer.call).parameters][: len(names)] == names
