"""The public function does what its arguments say."""

import numpy as np
import pytest
import tensorflow as tf

from performer import reference
from performer.ops import favor_attention, read, summarize
from support.attention_inputs import B, D, G, H, L, M, random_state, random_tensors
from support.compare import assert_close, assert_same_bits
from support.inputs import forms


@forms
def test_every_option_is_that_of_the_reference(causal):
    x, rng = random_tensors(), np.random.default_rng(1)
    pair = rng.normal(size=(H, M, D)), rng.normal(size=(G, M, D))
    mask, bias = rng.random((B, L)) > 0.3, rng.normal(size=(B, G, L))
    feature_bias, state = rng.normal(size=(G, M)), random_state()
    attributes = {"feature_map": "softmax", "scale": 0.4, "key_norm": False}
    del x["projection"]
    out, final = favor_attention(
        **x,
        projection=pair,
        causal=causal,
        key_mask=mask,
        key_bias=bias,
        feature_bias=feature_bias,
        initial_state=state,
        draw=0,
        return_state=True,
        **attributes,
    )
    masked_bias = np.where(mask[:, None], bias, -np.inf)
    expected, expected_final = reference.attention(
        *x.values(),
        *pair,
        feature_bias=feature_bias,
        key_bias=masked_bias,
        initial_state=state[:2],
        causal=causal,
        **attributes,
    )
    assert_close(out, expected, relative=1e-12, what="out")
    assert_close(final.log_mass, expected_final[0], relative=1e-12, what="log_mass")
    assert_close(final.mean, expected_final[1], relative=1e-12, what="mean")


@pytest.mark.parametrize("feature_map", ["softmax", "relu", "elu"])
def test_the_halves_and_the_defaults_are_those_of_the_whole(feature_map):
    x = random_tensors()
    out = favor_attention(**x, feature_map=feature_map)
    assert_close(
        out,
        reference.attention(*x.values(), feature_map=feature_map)[0],
        relative=1e-12,
    )
    state = summarize(x["key"], x["value"], x["projection"], feature_map=feature_map)
    assert_same_bits(read(x["query"], x["projection"], state, feature_map=feature_map), out)


@forms
def test_segments_are_attention_of_each_run_by_itself(causal):
    x = random_tensors(L=6)
    ids = np.array([[5, 5, 1, 1, 1, 5], [5, 5, 5, 5, 5, 5]])  # the second row is its own sequence
    mask = np.array([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1]], bool)
    bias = np.random.default_rng(1).normal(size=(2, G, 6))
    out, state = favor_attention(
        **x, segment_ids=ids, key_mask=mask, key_bias=bias, causal=causal, return_state=True
    )
    assert state.log_mass.shape == [4, G, M]
    runs = [(0, slice(0, 2)), (0, slice(2, 5)), (0, slice(5, 6)), (1, slice(6))]
    for n, (b, rows) in enumerate(runs):
        run = {name: x[name][b : b + 1, rows] for name in ("query", "key", "value")}
        alone, alone_state = favor_attention(
            **run,
            projection=x["projection"],
            key_mask=mask[b : b + 1, rows],
            key_bias=bias[b : b + 1, :, rows],
            causal=causal,
            return_state=True,
        )
        assert_close(out[b : b + 1, rows], alone, worst=1e-13, what=f"run {n}")
        assert_close(state.mean[n], alone_state.mean[0], worst=1e-13, what=f"state of run {n}")


@forms
def test_a_bound_of_the_segments_changes_the_number_of_states_only(causal):
    x = random_tensors(L=6)
    ids = np.array([[5, 5, 1, 1, 1, 5], [5, 5, 5, 5, 5, 5]])
    options = {"segment_ids": ids, "causal": causal, "return_state": True}
    out, state = favor_attention(**x, **options)
    bounded, states = favor_attention(**x, **options, max_segments=4)
    assert_same_bits(bounded, out)
    used = [0, 1, 2, 4]
    assert_same_bits(tf.gather(states.mean, used), state.mean)
    empty = tf.gather(states.log_mass, [3, 5, 6, 7])
    assert states.log_mass.shape == [8, G, M] and np.all(empty == -np.inf)
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_segments must be at least the r"):
        favor_attention(**x, **options, max_segments=2)


def test_streaming_with_the_state_is_the_whole():
    x = random_tensors()
    whole = favor_attention(**x, causal=True)
    state, parts = None, []
    for rows in (slice(0, 1), slice(1, 6), slice(6, 9)):
        part = {name: x[name][:, rows] for name in ("query", "key", "value")}
        out, state = favor_attention(
            **part, projection=x["projection"], causal=True, initial_state=state, return_state=True
        )
        parts.append(out)
    assert_close(tf.concat(parts, 1), whole, worst=1e-13)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_result_has_the_type_of_the_query_and_the_state_a_wide_one(causal, dtype):
    x = {name: tf.cast(value, dtype) for name, value in random_tensors().items()}
    out, state = favor_attention(**x, causal=causal, return_state=True, draw=4)
    wide = "float64" if dtype == "float64" else "float32"
    assert (out.dtype.name, state.log_mass.dtype.name, state.mean.dtype.name) == (dtype, wide, wide)
    assert (int(state.draw), state.draw.dtype) == (4, tf.int64)


@forms
def test_shapes_known_only_at_run_time_are_served(causal):
    x = {name: tf.constant(value) for name, value in random_tensors().items()}
    spec = {
        name: tf.TensorSpec([None] * value.shape.rank, value.dtype) for name, value in x.items()
    }
    ids = tf.constant([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * B)
    traced = tf.function(
        lambda x, ids: favor_attention(**x, segment_ids=ids, causal=causal),
        input_signature=[spec, tf.TensorSpec([None, None], tf.int32)],
        autograph=False,
    )
    expected = favor_attention(**x, segment_ids=ids, causal=causal)
    assert_close(traced(x, ids), expected, worst=1e-13)
