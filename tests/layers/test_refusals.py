"""What the Performer layer refuses: the exception, and a message with argument, rule and value."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer

X = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
LINEAR = {"num_heads": 2, "key_dim": 4, "supports": 8}


def test_linear_needs_supports():
    for options in ({}, {"attention_method": "linear"}, {"supports": None}):
        with pytest.raises(RuntimeError) as caught:
            performer.Performer(num_heads=2, key_dim=4, **options)
        assert str(caught.value) == "must have numbers of supports specified"
    performer.Performer(num_heads=2, key_dim=4, attention_method="quadratic")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("num_heads", 0, "positive integer"),
        ("key_dim", 0, "positive integer"),
        ("value_dim", 0, "positive integer"),
        ("num_heads", 2.0, "positive integer"),
        ("supports", 0, "positive integer"),
        ("supports", -3, "positive integer"),
        ("supports", 2.0, "positive integer"),
        ("supports", True, "positive integer"),
        ("dropout", 1.0, r"in \[0, 1\)"),
        ("dropout", -0.1, r"in \[0, 1\)"),
        ("dropout", float("nan"), r"in \[0, 1\)"),
        ("dropout", "0.1", r"in \[0, 1\)"),
        ("attention_method", "cubic", "'linear', 'quadratic'"),
        ("attention_method", None, "'linear', 'quadratic'"),
        ("feature_map", "sigmoid", "'softmax', 'relu', 'elu'"),
        ("scaling", 2, "one of 0, 1"),
        ("scaling", True, "one of 0, 1"),
        ("redraw_interval", 0, "positive integer"),
        ("redraw_interval", 0.5, "positive integer"),
        ("seed", 1.5, "integer of 64 bits"),
        ("seed", 2**63, "integer of 64 bits"),
        ("num_key_value_heads", 0, "positive integer"),
        ("num_key_value_heads", 3, "must divide"),
        ("max_segments", 0, "positive integer"),
        ("dense_limit", 0, "positive integer"),
        ("dense_limit", None, "positive integer"),
        ("sliding_window", 3, "must be None with attention_method='linear'"),
    ],
)
def test_constructor(name, value, rule):
    with pytest.raises(ValueError, match=rf"`{name}`.*{rule}") as caught:
        performer.Performer(**{**LINEAR, name: value})
    assert f"{name}={value!r}" in str(caught.value)


CALLS = {
    "general mask that does not fit": (
        {"attention_mask": np.ones((2, 4, 3), bool)},
        r"attention_mask.*\(2, 2, 4, 4\).*\(2, 4, 3\)",
    ),
    "mask by head that does not fit": (
        {"attention_mask": np.ones((2, 3, 4, 4), bool)},
        r"attention_mask.*\(2, 2, 4, 4\).*\(2, 3, 4, 4\)",
    ),
    "mask of too many axes": (
        {"attention_mask": np.ones((2, 1, 1, 4, 4), bool)},
        r"attention_mask.*\(2, 1, 1, 4, 4\)",
    ),
    "mask of rank 1": ({"attention_mask": np.ones(4, bool)}, r"attention_mask.*shape=\(4,\)"),
    "short mask": ({"value_mask": np.ones((2, 3), bool)}, r"value_mask.*shape=\(2, 3\)"),
    "mask of length 1": ({"value_mask": np.ones((2, 1), bool)}, r"value_mask.*shape=\(2, 1\)"),
    "batch of mask": ({"query_mask": np.ones((3, 4), bool)}, r"query_mask.*shape=\(3, 4\)"),
    "rank of mask": ({"key_mask": np.ones((2, 4, 4), bool)}, r"key_mask.*rank 2"),
    "type of mask": (
        {"value_mask": np.full((2, 4), "yes")},
        r"value_mask.*must be boolean.*string",
    ),
    "value of rank 4": ({"value": X[:, None]}, "same rank"),
    "segments of two lengths": (
        {"value": X[:, :3], "segment_ids": np.ones((2, 3), int)},
        r"segment_ids.*same length.*\(2, 4, 6\).*\(2, 3, 6\)",
    ),
    "type of segments": (
        {"segment_ids": np.ones((2, 4), np.float32)},
        r"segment_ids.*must be integers.*float32",
    ),
    "prefix of two lengths": (
        {"value": X[:, :3], "prefix_mask": np.ones((2, 3), bool), "use_causal_mask": True},
        r"prefix_mask.*same length.*\(2, 4, 6\).*\(2, 3, 6\)",
    ),
    "prefix without causal mask": (
        {"prefix_mask": np.ones((2, 4), bool)},
        r"prefix_mask.*use_causal_mask=False",
    ),
    "prefix and segments": (
        {
            "prefix_mask": np.ones((2, 4), bool),
            "segment_ids": np.ones((2, 4), int),
            "use_causal_mask": True,
        },
        r"prefix_mask.*must be None with `segment_ids`",
    ),
    "batches": ({"value": np.concatenate([X, X])}, r"axis 0.*\(2, 4, 6\).*\(4, 4, 6\)"),
}


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("case", CALLS)
def test_call(case, graph):
    options, message = CALLS[case]
    layer = performer.Performer(**LINEAR)
    value = options.get("value", X)
    layer.build(X.shape, X.shape)

    def call():
        return layer(X, value, **{k: v for k, v in options.items() if k != "value"})

    with pytest.raises(ValueError, match="(?s)" + message):
        tf.function(call)() if graph else call()
    assert np.all(np.isfinite(layer(X, X)))  # the next good call is right


def test_symbolic_call_is_checked_too():
    layer, x = performer.Performer(dense_limit=16, **LINEAR), keras.Input((4, 6))
    with pytest.raises(ValueError, match=r"prefix_mask.*needs it"):
        layer(x, x, prefix_mask=keras.Input((4,), dtype="bool"))
    with pytest.raises(ValueError, match="rank of at least 2"):
        layer(x, x, attention_mask=keras.Input((), dtype="bool"))
    longer = keras.Input((5, 6))
    with pytest.raises(ValueError, match=r"dense_limit = 16.*T = 4, S = 5"):
        layer(x, longer, return_attention_scores=True)


@pytest.mark.slow
def test_dense_form_has_a_limit():
    layer = performer.Performer(dense_limit=16, **LINEAR)
    longer = np.concatenate([X, X[:, :1]], 1)
    mask = np.ones((2, 4, 5), bool)
    layer(X, X, return_attention_scores=True)
    message = "T \\* S, up to T \\* S = dense_limit = 16"
    for call in ({"return_attention_scores": True}, {"attention_mask": mask}):
        with pytest.raises(ValueError, match=message + ".*T = 4, S = 5"):
            layer(X, longer, **call)
        unknown = tf.function(
            lambda x, y, call=call: layer(x, y, **call),
            input_signature=[tf.TensorSpec([None, None, 6]), tf.TensorSpec([None, None, 6])],
        )
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            unknown(X, longer)
    layer(X, longer, attention_mask=mask[:, :1])
    performer.Performer(dense_limit=20, **LINEAR)(X, longer, attention_mask=mask)


def test_quadratic_refuses_what_the_parent_does_not_have():
    layer = performer.Performer(num_heads=2, key_dim=4, attention_method="quadratic")
    for call in ({"segment_ids": np.ones((2, 4), int)}, {"prefix_mask": np.ones((2, 4), bool)}):
        with pytest.raises(ValueError, match=r"attention_method='linear'.*Received"):
            layer(X, X, **call)


@pytest.mark.parametrize("axes", [(0,), (3,), (1, 1), (1, -3), (-1,), (-9,), (), (1.0,)])
def test_axes(axes):
    layer = performer.Performer(attention_axes=axes, **LINEAR)
    with pytest.raises(ValueError, match="attention_axes"):
        layer(X[:, None], X[:, None])


def test_axes_without_attention_must_agree():
    layer = performer.Performer(attention_axes=(2,), **LINEAR)
    with pytest.raises(ValueError, match="axis 1, over which there is no attention"):
        layer(X[:, None], np.stack([X, X], 1))


def test_redraw_needs_a_projection():
    with pytest.raises(ValueError, match="built=False"):
        performer.Performer(**LINEAR).redraw()
    layer = performer.Performer(num_heads=2, key_dim=4, attention_method="quadratic")
    layer(X, X)
    with pytest.raises(ValueError, match="'quadratic'"):
        layer.redraw()


def test_more_segments_than_max_segments():
    layer = performer.Performer(**LINEAR, max_segments=2)
    assert np.all(np.isfinite(layer(X, X, segment_ids=[[0, 0, 1, 1], [0, 0, 0, 0]])))
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_segments must be at least"):
        layer(X, X, segment_ids=[[0, 1, 2, 2], [0, 0, 0, 0]])
