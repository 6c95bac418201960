"""Attention under XLA: the fused kernels, the same bits as without it."""

import functools
import re

import numpy as np
import pytest
import tensorflow as tf

from performer import AttentionState, favor_attention
from support import operator_calls
from support.compare import assert_close
from support.inputs import forms
from support.operator_calls import needs_xla

pytestmark = needs_xla


def normal(*shape, seed=0, dtype="float32"):
    return tf.cast(np.random.default_rng(seed).normal(size=shape), dtype)


def both(function, *arguments, signature=None):
    """The results of a function in a graph and compiled by XLA, flat."""
    return [
        tf.nest.flatten(
            tf.function(function, jit_compile=jit, input_signature=signature, autograph=False)(
                *arguments
            )
        )
        for jit in (False, True)
    ]


def assert_same_bits(function, *arguments, signature=None):
    for one, other in zip(*both(function, *arguments, signature=signature), strict=True):
        np.testing.assert_array_equal(
            tf.cast(one, tf.float64).numpy(), tf.cast(other, tf.float64).numpy()
        )


def heads(*shape, dtype="float32"):
    """query [..., 4, 8], key and value [..., 2, 8]."""
    sizes = enumerate((4, 2, 2))
    return [normal(*shape, size, 8, seed=seed, dtype=dtype) for seed, size in sizes]


def with_gradients(function, inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out = function(*inputs)
    return out, tape.gradient(out, inputs)


@forms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_attention_and_gradients_are_the_same_bits(dtype, causal):
    def attend(*inputs):
        return with_gradients(functools.partial(favor_attention, causal=causal), inputs)

    assert_same_bits(attend, *heads(2, 70, dtype=dtype), normal(24, 8))


@forms
@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "relu", "feature_epsilon": 1 / 7, "scale": 1 / 3},
        {"feature_map": "elu"},
        {"key_norm": False, "feature_bias": np.linspace(-1, 1, 24), "scale": 1e-3},
    ],
    ids=["relu", "elu", "no norm"],
)
def test_every_attribute_arrives(options, causal):
    mask = tf.sequence_mask([0, 5], 9)
    assert_same_bits(
        lambda *inputs: favor_attention(*inputs, key_mask=mask, causal=causal, **options),
        *heads(2, 9),
        normal(24, 8),
    )


@forms
def test_a_window_gives_the_same_bits(causal):
    def attend(*inputs):
        options = {"causal": causal, "exact_window": 64}
        return with_gradients(functools.partial(favor_attention, **options), inputs)

    assert_same_bits(attend, *heads(2, 200), normal(24, 8))


def test_a_stream_with_a_window_gives_the_same_bits():
    options = {"causal": True, "exact_window": 64, "return_state": True}

    def attend(projection, *inputs):
        results, state = [], None
        for rows in (slice(0, 126), slice(126, 127), slice(127, 128), slice(128, 129)):
            out, state = favor_attention(
                *(x[:, rows] for x in inputs), projection, initial_state=state, **options
            )
            results.append(out)
        return results, state.log_mass, state.mean, state.near_key

    assert_same_bits(attend, normal(24, 8), *heads(2, 129))


@forms
def test_denormals_are_kept(causal):
    query, key, value = heads(2, 70)
    attend = functools.partial(favor_attention, query, key, causal=causal)
    out = attend(value, normal(24, 8))
    value, tiny = tf.constant(value.numpy() * np.float32(1e-39)), out.numpy() * np.float32(1e-39)
    compiled = tf.function(attend, jit_compile=True)(value, normal(24, 8)).numpy()
    np.testing.assert_array_equal(compiled, attend(value, normal(24, 8)).numpy())
    np.testing.assert_allclose(compiled.astype(float), tiny.astype(float), atol=1e-43)


def test_one_program_for_each_size_of_an_unknown_batch():
    attend = tf.function(
        lambda *inputs: favor_attention(*inputs, normal(24, 8)),
        jit_compile=True,
        input_signature=[tf.TensorSpec([None, None, size, 8]) for size in (4, 2, 2)],
    )
    for batch, rows in ((1, 3), (2, 5), (0, 5), (2, 0)):
        inputs = heads(batch, rows)
        np.testing.assert_array_equal(attend(*inputs), favor_attention(*inputs, normal(24, 8)))


def test_many_threads_share_a_call():
    """Enough work for the whole pool, and more calls at once than it has threads."""

    def attend(*inputs):
        outs = [
            favor_attention(*inputs, normal(64, 8, seed=i), causal=i % 2 == 0) for i in range(6)
        ]
        return tf.stack(outs)

    assert_same_bits(attend, *heads(1, 6000))


def test_a_loop_carries_attention_and_its_gradient():
    projection = normal(24, 8)

    def attend(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = x
            for _ in tf.range(3):
                out += favor_attention(out, out, out, projection, causal=True)
        return out, tape.gradient(out, x)

    x = normal(1, 5, 2, 8) / 4
    # The gradient's sums outside the operators are XLA's own.
    for plain, compiled in zip(*both(tf.autograph.to_graph(attend), x), strict=True):
        assert_close(compiled, plain, relative=1e-6)


@pytest.mark.slow
@forms
def test_second_derivatives(causal):
    def second(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            _, first = with_gradients(functools.partial(favor_attention, causal=causal), inputs)
            total = tf.add_n([tf.reduce_sum(x**2) for x in first])
        return tape.gradient(total, inputs)

    # Two rows, as XLA takes seconds for more; the same without XLA is held against the reference.
    inputs = [*heads(1, 2, dtype="float64"), normal(3, 8, dtype="float64")]
    compiled = tf.function(second, jit_compile=True, autograph=False)(*inputs)
    for one, other in zip(compiled, second(*inputs), strict=True):
        assert_close(one, other, relative=1e-10)


@pytest.mark.slow
@forms
def test_second_derivatives_of_packed_sequences(causal):
    def second(ids, *inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            _, first = with_gradients(
                lambda *inputs: favor_attention(
                    *inputs, causal=causal, segment_ids=ids, max_segments=2
                ),
                inputs,
            )
            total = tf.add_n([tf.reduce_sum(x**2) for x in first])
        return tape.gradient(total, inputs)

    inputs = [*heads(1, 2, dtype="float64"), normal(3, 8, dtype="float64")]
    compiled = tf.function(second, jit_compile=True, autograph=False)
    for ids in ([[0, 1]], [[0, 0]]):
        ids = tf.constant(ids)
        for one, other in zip(compiled(ids, *inputs), second(ids, *inputs), strict=True):
            assert_close(one, other, worst=1e-12)


@forms
@pytest.mark.parametrize("bound", [None, 3])
def test_packed_sequences_whose_number_is_known_when_the_program_runs(causal, bound):
    def attend(ids, mass, mean, *inputs):
        def call(mass, mean, *inputs):
            out, state = favor_attention(
                *inputs,
                segment_ids=ids,
                max_segments=bound,
                causal=causal,
                initial_state=AttentionState(mass, mean, 0),
                draw=0,
                return_state=True,
            )
            return out, state.log_mass, state.mean

        return with_gradients(call, [mass, mean, *inputs])

    compiled = tf.function(attend, jit_compile=True)
    for ids in ([[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]], [[0] * 5, [1] * 5]):
        inputs = (
            tf.constant(ids),
            normal(1, 2, 24),
            normal(1, 2, 24, 8),
            *heads(2, 5),
            normal(24, 8),
        )
        # The states are merged in plain TensorFlow.
        for one, other in zip(
            *map(tf.nest.flatten, (compiled(*inputs), attend(*inputs))), strict=True
        ):
            assert_close(one, other, relative=1e-6)


def test_the_gradient_of_packed_states_has_one_for_each_sequence():
    def attend(ids, *inputs):
        options = {"segment_ids": ids, "causal": True}
        _, state = favor_attention(*inputs, **options, return_state=True)
        with tf.GradientTape() as tape:
            tape.watch(state[:2])
            out = favor_attention(*inputs, **options, initial_state=state)
        return tape.gradient(out, state[:2])

    compiled = tf.function(attend, jit_compile=True)
    inputs = [*heads(2, 5), normal(24, 8)]
    for ids in ([[0, 0, 0, 1, 2], [0, 0, 0, 0, 0]], [[0] * 5, [1] * 5]):
        ids = tf.constant(ids)
        for one, other in zip(compiled(ids, *inputs), attend(ids, *inputs), strict=True):
            np.testing.assert_array_equal(one, other)


def test_more_packed_sequences_than_their_bound_are_refused():
    attend = tf.function(
        lambda ids, *inputs: favor_attention(*inputs, segment_ids=ids, max_segments=2),
        jit_compile=True,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="offsets must end at the number of r"):
        attend(tf.constant([[0, 1, 2], [0, 0, 0]]), *heads(2, 3), normal(24, 8))
    out = attend(tf.constant([[0, 1, 1], [0, 0, 0]]), *heads(2, 3), normal(24, 8))
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_size_known_when_the_program_runs_only_is_refused_by_name(axis):
    @tf.function(jit_compile=True)
    def attend(query, key, value, projection):
        some = tf.where((key[:, 0] if axis == 0 else key[0])[:, 0, 0] < 100)[:, 0]
        some = tf.gather(key, some, axis=axis)
        return favor_attention(query, some, value, projection)

    with pytest.raises(tf.errors.UnimplementedError, match="key must have a shape that is known"):
        attend(*heads(2, 3), normal(24, 8))


def test_a_wrong_rank_is_refused_where_the_number_of_sequences_is_not_known():
    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec(None), tf.TensorSpec([None])])
    def summarize(key, starts):
        offsets = tf.where(starts >= 0)[:, 0]  # a bound of its size is known
        value, projection, bias = (tf.zeros(s) for s in ((1, 3, 1, 2), (1, 4, 2), (1, 1, 1)))
        return operator_calls.function("Summarize")(
            key, value, projection, bias, offsets, packed=True
        )[1]

    starts = tf.constant([0.0, -1.0, -1.0, 3.0])  # offsets 0 and 3
    for shape in ((3,), (), (3, 2)):
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"key must have .*rank 4; got rank"
        ):
            summarize(tf.zeros(shape), starts)
    assert summarize(tf.zeros((1, 3, 1, 2)), starts).shape == (1, 1, 4, 2)


def test_bad_shapes_get_the_sentence_they_get_without_xla():
    def attend(query, key, value, projection):
        return favor_attention(query, key, value, projection)

    inputs = heads(2, 3)
    inputs[2] = inputs[2][:, :2]
    messages = []
    for jit_compile in (False, True):
        unknown = [tf.TensorSpec([None] * 4)] * 3 + [tf.TensorSpec([None, None])]
        compiled = tf.function(attend, jit_compile=jit_compile, input_signature=unknown)
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            compiled(*inputs, normal(24, 8))
        messages.append(re.search("value must.*", str(caught.value))[0])
    assert messages[0].split("[")[0] == messages[1].split("[")[0]


@tf.function(jit_compile=True)
def attend_from(starts, sizes, mass, mean, *inputs):
    """Packed causal attention; only the running program knows how many sequences start, and how
    many initial states there are, `sizes` of log_mass and of mean."""
    query, key, value, projection = inputs
    mass, mean = (
        tf.boolean_mask(x, tf.range(tf.shape(x)[0]) < size)
        for x, size in ((mass, sizes[0]), (mean, sizes[1]))
    )
    return operator_calls.function("Causal")(
        query,
        key,
        value,
        projection[None],
        projection[None],
        tf.zeros([1, 24]),
        tf.zeros([1, 1, 1]),
        mass,
        mean,
        tf.concat([tf.where(starts)[:, 0], [5]], 0),
        packed=True,
    )


def states_and_inputs():
    return normal(5, 2, 24), normal(5, 2, 24, 8), *heads(1, 5), normal(24, 8)


@pytest.mark.parametrize("states", [1, 3])
def test_initial_states_whose_number_is_known_when_the_program_runs(states):
    mass, mean, query, key, value, projection = states_and_inputs()
    starts = tf.constant([True, False, True, True, False])
    got = attend_from(starts, tf.constant([states] * 2), mass, mean, query, key, value, projection)
    wanted = operator_calls.function("Causal")(
        query,
        key,
        value,
        projection[None],
        projection[None],
        tf.zeros([1, 24]),
        tf.zeros([1, 1, 1]),
        mass[:states],
        mean[:states],
        tf.constant([0, 2, 3, 5], tf.int64),
        packed=True,
    )
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sizes", [[2, 2], [4, 4], [3, 2], [1, 4], [0, 0]])
def test_another_number_of_initial_states_than_sequences_is_refused_when_it_is_known(sizes):
    starts = tf.constant([True, False, True, True, False])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"initial_.* must have as many sequences as offsets"
    ):
        attend_from(starts, tf.constant(sizes), *states_and_inputs())


def test_other_numbers_of_initial_states_in_its_two_parts_are_refused_when_they_are_known():
    starts = tf.constant([True, False, True, True, False])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"initial_.* must have"):
        attend_from(starts, tf.constant([3, 1]), *states_and_inputs())
