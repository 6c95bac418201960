"""Streams: full pass, chunks of any sizes and single tokens agree; what a state is and refuses."""

import itertools
import pickle
import resource
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer.features.tolerances import tolerances
from performer.ops import fingerprint
from support.compare import assert_close, assert_same_bits

BOUND = tolerances("float32", causal=True)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def built(shape, **options):
    options = {"num_heads": 4, "key_dim": 8, "supports": 32, "seed": 5, **options}
    layer = performer.Performer(bias_initializer="random_normal", **options)
    layer.build(shape, shape)
    return layer


def stream(layer, parts, state=None, **call):
    """Calls `layer` on parts in a row; returns the outputs as one array, and the last state."""
    outputs = []
    for part in parts:
        output, state = layer(part, part, initial_state=state, return_state=True, **call)
        outputs.append(output)
    return np.concatenate(outputs, axis=1), state


VARIANTS = {
    "plain": {},
    "rotary": {"rotary_embedding": performer.RotaryEmbedding()},
    "grouped": {"num_key_value_heads": 2, "value_dim": 3},
    "relu": {"feature_map": "relu"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("start", ["none", "empty"])
def test_chunks_of_any_sizes_are_the_full_pass(options, start):
    layer, x = built((2, 300, 16), **options), normal(2, 300, 16)
    whole, end = layer(x, x, use_causal_mask=True, return_state=True)
    assert_close(layer(x, x, use_causal_mask=True), whole, worst=0)
    for cuts in ([1, 2, 63, 127, 128, 300], [150, 150, 299, 300], [299, 300]):
        parts = [x[:, i:j] for i, j in itertools.pairwise([0, *cuts])]
        initial = layer.get_initial_state(2) if start == "empty" else None
        output, state = stream(layer, parts, initial, use_causal_mask=True)
        assert_close(output, whole, worst=BOUND.worst, rms=BOUND.rms)
        assert_close(state.log_mass, end.log_mass, rms=BOUND.rms)
        assert_close(state.mean, end.mean, rms=BOUND.rms)
        assert int(state.position) == int(end.position) == 300


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_2000_single_tokens_are_the_full_pass_with_flat_memory():
    """A kept state of every step would be 120 MB."""
    shape = (1, 2000, 16)
    layer = built(shape, key_dim=32, supports=128, rotary_embedding=performer.RotaryEmbedding())
    x, state = normal(*shape), layer.get_initial_state(1)
    sizes = [(part.shape, part.dtype) for part in tf.nest.flatten(state)]

    @tf.function
    def step(token, state):
        return layer(token, token, use_causal_mask=True, initial_state=state, return_state=True)

    outputs = []
    for i in range(2000):
        output, state = step(x[:, i : i + 1], state)
        outputs.append(output)
        assert [(part.shape, part.dtype) for part in tf.nest.flatten(state)] == sizes
        if i == 200:
            before = resident()
    assert resident() - before < 16 * 2**20
    assert step.experimental_get_tracing_count() == 1
    assert int(state.position) == 2000
    whole = layer(x, x, use_causal_mask=True)
    assert_close(np.concatenate(outputs, 1), whole, worst=BOUND.worst, rms=BOUND.rms)


def test_tokens_in_a_graph_loop_are_the_full_pass():
    layer, x = built((2, 50, 16)), normal(2, 50, 16)

    @tf.function
    def loop(x):
        def body(i, state, outputs):
            token = x[:, i : i + 1]
            output, state = layer(
                token, token, use_causal_mask=True, initial_state=state, return_state=True
            )
            return i + 1, state, outputs.write(i, output[:, 0])

        outputs = tf.TensorArray(tf.float32, tf.shape(x)[1])
        state = layer.get_initial_state(2)
        return tf.transpose(
            tf.while_loop(lambda i, *_: i < tf.shape(x)[1], body, (0, state, outputs))[2].stack(),
            [1, 0, 2],
        )

    assert_close(loop(x), layer(x, x, use_causal_mask=True), worst=BOUND.worst, rms=BOUND.rms)


def test_masks_count_in_chunks():
    layer, x = built((2, 40, 16)), normal(2, 40, 16)
    mask = np.random.default_rng(1).random((2, 40)) < 0.6
    x[~mask] = np.nan
    whole = layer(x, x, value_mask=mask, query_mask=mask, use_causal_mask=True)
    state, outputs = None, []
    for i in range(0, 40, 8):
        part, there = x[:, i : i + 8], mask[:, i : i + 8]
        output, state = layer(
            part,
            part,
            value_mask=there,
            query_mask=there,
            use_causal_mask=True,
            initial_state=state,
            return_state=True,
        )
        outputs.append(output)
    assert_close(np.concatenate(outputs, 1), whole, worst=BOUND.worst)


def test_a_prefix_is_seen_by_every_row_that_follows():
    layer, x = built((2, 40, 16)), normal(2, 40, 16)
    prefix = np.arange(40)[None] < 10
    whole = layer(x, x, prefix_mask=prefix, use_causal_mask=True)
    first, state = layer(
        x[:, :25], x[:, :25], prefix_mask=prefix[:, :25], use_causal_mask=True, return_state=True
    )
    second = layer(x[:, 25:], x[:, 25:], use_causal_mask=True, initial_state=state)
    assert_close(np.concatenate([first, second], 1), whole, worst=BOUND.worst)


def test_images_stream_by_rows():
    layer, x = built((2, 6, 3, 5, 16), attention_axes=(1, 2)), normal(2, 6, 3, 5, 16)
    whole = layer(x, x, use_causal_mask=True)
    parts = [x[:, i:j] for i, j in itertools.pairwise([0, 1, 4, 6])]
    output, state = stream(layer, parts, layer.get_initial_state([2, 5]), use_causal_mask=True)
    assert_close(output, whole, worst=BOUND.worst)
    assert state.log_mass.shape[0] == 10 and int(state.position) == 18


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float64"])
def test_states_are_float32_under_every_policy(policy):
    layer, x = built((1, 64, 16), dtype=policy), normal(1, 64, 16)
    expected = "float64" if policy == "float64" else "float32"
    whole = np.asarray(layer(x, x, use_causal_mask=True), "float64")
    output, state = stream(
        layer, [x[:, :30], x[:, 30:]], layer.get_initial_state(1), use_causal_mask=True
    )
    assert state.log_mass.dtype == state.mean.dtype == expected
    assert state.draw.dtype == state.position.dtype == "int64"
    rounding = tolerances(layer.compute_dtype, causal=True).rms
    assert_close(output, whole, rms=max(4 * rounding, 1e-10))


def test_cross_attention_reads_the_state_of_the_encoder():
    layer = built((2, 7, 16), value_dim=3, rotary_embedding=performer.RotaryEmbedding())
    query, value, key = normal(2, 7, 16), normal(2, 50, 16, seed=1), normal(2, 50, 16, seed=2)
    mask = np.random.default_rng(1).random((2, 50)) < 0.6
    whole = layer(query, value, key, value_mask=mask)
    state = layer.summarize(value, key, value_mask=mask)
    assert int(state.position) == 50
    assert_close(layer.read(query, state), whole, worst=BOUND.worst)
    steps = [layer.read(query[:, i : i + 1], state, start_index=i) for i in range(7)]
    assert_close(np.concatenate(steps, 1), whole, worst=BOUND.worst)
    parts = None
    for i in range(0, 50, 20):
        at = slice(i, i + 20)
        parts = layer.summarize(
            value[:, at], key[:, at], value_mask=mask[:, at], initial_state=parts
        )
    assert_close(layer.read(query, parts), whole, worst=BOUND.worst)


def test_summarize_and_read_heed_attached_masks_and_gates():
    layer = built((2, 7, 16), **({"use_gate": True} if _has_gate() else {}))
    query, value = tf.constant(normal(2, 7, 16)), tf.constant(normal(2, 9, 16, seed=1))
    query._keras_mask = tf.constant(np.arange(7) < [[5], [7]])
    value._keras_mask = tf.constant(np.arange(9) < [[4], [0]])
    key = tf.constant(normal(2, 9, 16, seed=2))
    for keys in ((value,), (value, key), (key, value)):  # a mask of value or of key alone, too
        whole = layer(query, *keys)
        assert_close(layer.read(query, layer.summarize(*keys)), whole, worst=BOUND.worst)


def _has_gate():
    return hasattr(keras.layers.MultiHeadAttention(1, 1), "_use_gate")


def test_states_merge():
    layer, x = built((2, 40, 16)), normal(2, 40, 16)
    first, second = layer.summarize(x[:, :15]), layer.summarize(x[:, 15:])
    merged = performer.merge(first, second)
    assert_close(layer.read(x, merged), layer(x, x), worst=BOUND.worst)
    other = performer.merge(second, first)
    assert_same_bits(other.mean, merged.mean)
    assert int(merged.position) == 25


def test_states_are_plain_structures_that_survive_saving(tmp_path):
    layer, x = built((2, 20, 16)), normal(2, 20, 16)
    state = layer(x, x, use_causal_mask=True, return_state=True)[1]
    expected = layer(x, x, use_causal_mask=True, initial_state=state)
    np.savez(tmp_path / "state.npz", **state._asdict())
    loaded = performer.AttentionState(**np.load(tmp_path / "state.npz"))
    arrays = tf.nest.map_structure(lambda x: x.numpy(), state)
    mixed = state._replace(mean=arrays.mean, position=20)
    for other in (mixed, loaded, pickle.loads(pickle.dumps(arrays)), arrays):
        assert_same_bits(layer(x, x, use_causal_mask=True, initial_state=other), expected)


def test_a_state_of_another_draw_is_refused():
    layer, x = built((1, 4, 16)), normal(1, 4, 16)
    old = layer.summarize(x)
    call = tf.function(lambda x, s: layer(x, x, use_causal_mask=True, initial_state=s))
    call(x, old)
    layer.redraw()
    for use in (
        lambda: layer(x, x, initial_state=old),
        lambda: layer(x, x, use_causal_mask=True, initial_state=old, return_state=True),
        lambda: layer.read(x, old),
        lambda: layer.summarize(x, initial_state=old),
    ):
        with pytest.raises(ValueError, match=r"same draw of the projection.*got -?\d+ and -?\d+"):
            use()
    with pytest.raises(tf.errors.InvalidArgumentError, match="same draw"):
        call(x, old)
    new = layer.summarize(x)
    assert int(new.draw) == int(layer.draw) == int(fingerprint(layer.projection))
    call(x, new)


def test_states_in_functional_models():
    layer, x = built((2, 12, 16)), normal(2, 12, 16)
    inputs = keras.Input((None, 16))
    output, state = layer(inputs, inputs, use_causal_mask=True, return_state=True)
    assert state.log_mass.shape == (None, 4, 32) and state.mean.shape == (None, 4, 32, 8)
    again = layer(inputs, inputs, use_causal_mask=True, initial_state=state)
    model = keras.Model(inputs, [output, again])
    first, second = model(x)
    whole = layer(np.concatenate([x, x], 1), np.concatenate([x, x], 1), use_causal_mask=True)
    assert_close(np.concatenate([first, second], 1), whole, worst=BOUND.worst)


def test_gradients_flow_through_states():
    layer, x = built((2, 12, 16), dtype="float64"), normal(2, 12, 16).astype("float64")

    def gradients(loss):
        with tf.GradientTape() as tape:
            value = loss()
        return tape.gradient(value, layer.trainable_variables)

    def in_parts():
        first, state = layer(x[:, :5], x[:, :5], use_causal_mask=True, return_state=True)
        second = layer(x[:, 5:], x[:, 5:], use_causal_mask=True, initial_state=state)
        return tf.reduce_sum(tf.concat([first, second], 1) ** 2)

    whole = gradients(lambda: tf.reduce_sum(layer(x, x, use_causal_mask=True) ** 2))
    for part, expected in zip(gradients(in_parts), whole, strict=True):
        assert_close(part, expected, relative=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"return_attention_scores": True}, "cannot be combined with scores"),
        ({"attention_mask": np.ones((2, 6, 6), bool)}, "cannot be combined with scores"),
        ({"segment_ids": np.zeros((2, 6), int)}, "cannot be combined with `segment_ids`"),
    ],
)
def test_what_has_no_state_is_refused(change, message):
    layer, x = built((2, 6, 16)), normal(2, 6, 16)
    for streams in ({"return_state": True}, {"initial_state": layer.get_initial_state(2)}):
        with pytest.raises(ValueError, match=message):
            layer(x, x, **streams, **change)
        with pytest.raises(ValueError, match=message):
            layer(keras.Input((6, 16)), keras.Input((6, 16)), **streams, **change)


def test_calls_and_states_that_do_not_fit_are_refused():
    layer, x = built((2, 6, 16)), normal(2, 6, 16)
    with pytest.raises(ValueError, match=r"\[6\] queries and \[4\] keys"):
        layer(x, x[:, :4], use_causal_mask=True, return_state=True)
    state = layer.get_initial_state(3)
    with pytest.raises(ValueError, match=r"initial_state.log_mass must have 1 or B = 2"):
        layer(x, x, initial_state=state)
    with pytest.raises(TypeError, match="`initial_state` must be an AttentionState, got tuple"):
        layer(x, x, use_causal_mask=True, initial_state=tuple(layer.get_initial_state(2)))
    wide = built((2, 6, 16), supports=33).get_initial_state(2)
    with pytest.raises(ValueError, match=r"log_mass.*33.*32|log_mass.*32.*33"):
        layer(x, x, initial_state=wide)
    position = layer.get_initial_state(2)._replace(position=1.5)
    with pytest.raises(TypeError, match="position must be an integer, got float32"):
        layer(x, x, initial_state=position)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer.get_initial_state(2),
        lambda layer: layer.summarize(normal(2, 6, 16)),
        lambda layer: layer.read(normal(2, 6, 16), None),
    ],
    ids=["get_initial_state", "summarize", "read"],
)
def test_layers_without_a_projection_have_no_state(call):
    exact = performer.Performer(2, 4, attention_method="quadratic")
    x = normal(2, 6, 16)
    exact(x, x)
    for layer in (exact, performer.Performer(2, 4, supports=8)):
        with pytest.raises(ValueError, match="needs a built layer with attention_method='linear'"):
            call(layer)
    with pytest.raises(ValueError, match="`return_state` needs attention_method='linear'"):
        exact(x, x, return_state=True)
