"""What a step of a stream does only once, or in place, and what that must not change."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from performer import orthogonal_projection
from performer.ops import empty_state, favor_attention, fingerprint
from performer.ops.dispatch import append_rows
from support.compare import assert_same_bits
from support.operator_calls import needs_library, needs_xla

H, D, M, W, STEPS = 2, 16, 24, 64, 150
compiled = pytest.mark.parametrize("xla", [False, pytest.param(True, marks=needs_xla)])
windows = pytest.mark.parametrize("window", [None, W])


def normal(*shape, seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=shape), tf.float32)


def first_state(window, batch=1):
    near = {"exact_window": window, "key_dim": D} if window else {}
    return empty_state(batch, H, M, D, **near)


def attend(x, w, state, window, **options):
    return favor_attention(
        x, x, x, w, causal=True, exact_window=window, initial_state=state, return_state=True,
        **options,
    )  # fmt: skip


def in_a_loop(x, w, state, window):
    """Outputs of single tokens, and the last state."""

    def step(i, outputs, state):
        out, state = attend(x[:, i][:, None], w, state, window)
        return i + 1, outputs.write(i, out[:, 0]), state

    outputs = tf.TensorArray(tf.float32, STEPS, element_shape=[x.shape[0], H, D])
    _, outputs, state = tf.while_loop(
        lambda i, *_: i < STEPS, step, (tf.constant(0), outputs, state), maximum_iterations=STEPS
    )
    return outputs.stack(), state


def operations_in_loops(function, *arguments):
    """Types of the operations in the functions of a graph, which are bodies of loops."""
    graph = function.get_concrete_function(*arguments).graph.as_graph_def()
    bodies = [f for f in graph.library.function if "body" in f.signature.name]
    assert bodies
    return [node.op for body in bodies for node in body.node_def]


@pytest.mark.parametrize(
    ("window", "batch", "xla"),
    [
        pytest.param(window, batch, xla, marks=[*([needs_xla] if xla else []), *marks])
        for window, batch, xla in itertools.product((None, W), (1, 3), (False, True))
        # Four of the eight have all pairs.
        for marks in [[] if (window == W) ^ (batch == 3) ^ xla else [pytest.mark.slow]]
    ],
)
def test_a_loop_over_tokens_has_the_bits_of_single_calls_and_leaves_its_first_state(
    window, batch, xla
):
    x, w = normal(batch, STEPS, H, D), orthogonal_projection(M, D, seed=1)
    _, given = attend(normal(batch, 70, H, D, seed=3), w, first_state(window, batch), window)
    before = [a.numpy().copy() for a in tf.nest.flatten(given)]
    out, last = tf.function(in_a_loop, jit_compile=xla, autograph=False)(x, w, given, window)
    state, parts = given, []
    for i in range(STEPS):
        part, state = attend(x[:, i : i + 1], w, state, window)
        parts.append(part[:, 0])
    assert_same_bits(out, tf.stack(parts))
    for found, expected in zip(tf.nest.flatten(last), tf.nest.flatten(state), strict=True):
        assert_same_bits(found, expected)
    for found, expected in zip(tf.nest.flatten(given), before, strict=True):
        assert_same_bits(found, expected)


@windows
def test_two_streams_that_part_from_one_state_do_not_see_each_other(window):
    x, w = normal(4, 1, 9, H, D), orthogonal_projection(M, D, seed=1)
    _, common = attend(normal(1, 70, H, D, seed=3), w, first_state(window), window)
    alone = [attend(tokens, w, common, window)[0] for tokens in x]
    states = [common] * 4
    for i in range(9):
        for n, tokens in enumerate(x):
            out, states[n] = attend(tokens[:, i : i + 1], w, states[n], window)
            np.testing.assert_allclose(out[:, 0], alone[n][:, i], rtol=1e-4, atol=1e-5)


def test_a_projection_that_no_step_changes_is_hashed_before_the_loop():
    x, w = normal(1, STEPS, H, D), normal(M, D)
    call = tf.function(in_a_loop, autograph=False)
    for projection in (w, (w, w[::-1])):
        assert "Bitcast" not in operations_in_loops(call, x, projection, first_state(None), None)
    of_another = first_state(None)._replace(draw=fingerprint(w + 1))
    with pytest.raises(tf.errors.InvalidArgumentError, match="same draw of the projection"):
        call(x, w, of_another, None)


def around(projection):
    """`in_a_loop` as a graph that captures a projection, which is no argument of it."""
    return tf.function(lambda x, state: in_a_loop(x, projection, state, None), autograph=False)


def test_a_projection_with_values_is_hashed_when_the_loop_is_built():
    x, w = normal(1, STEPS, H, D), normal(M, D)
    for projection in (w, (w, w[::-1])):
        call = around(projection)
        operations = operations_in_loops(call, x, first_state(None))
        assert "Performer>Causal" in operations and "Bitcast" not in operations
        _, state = call(x, first_state(None))
        assert state.draw == fingerprint(projection)


def test_a_projection_that_steps_change_is_refused_in_the_step_after():
    x, w = normal(1, 1, H, D), normal(M, D)

    @tf.function(autograph=False)
    def steps(w, state, change):
        def step(i, w, state):
            return i + 1, w + change, attend(x, w, state, None)[1]

        return tf.while_loop(lambda i, *_: i < 3, step, (tf.constant(0), w, state))[2]

    steps(w, first_state(None), 0.0)
    with pytest.raises(tf.errors.InvalidArgumentError, match="same draw of the projection"):
        steps(w, first_state(None), 1.0)


@compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("batch", "rows", "more", "width"), [(1, 5, 1, 64), (1, 5, 3, 3), (2, 5, 1, 64), (1, 0, 2, 64)]
)
def test_appended_rows_stand_after_the_others(batch, rows, more, width, dtype, xla):
    x = tf.cast(normal(batch, rows, 2, width), dtype)
    call = tf.function(append_rows, jit_compile=xla)
    expected = x
    # XLA compiles a program for every number of rows; only without it does memory grow ahead.
    for seed in range(3 if xla else 2 * rows + 3):
        new = tf.cast(normal(batch, more, 2, width, seed=seed), dtype)
        x, before = call(x, new), x
        assert_same_bits(x, tf.concat([before, new], 1))
        expected = tf.concat([expected, new], 1)
    assert_same_bits(x, expected)


def address(x):
    return np.asarray(memoryview(x)).ctypes.data


def without_the_first(rows):
    """The rows after the first, a view of the same memory, as `favor_attention` keeps them."""
    _, count, *rest = rows.shape
    return tf.reshape(tf.reshape(rows, [count, *rest])[1:], [1, count - 1, *rest])


@needs_library
def test_a_stream_of_rows_copies_few_of_them_and_never_overwrites_one():
    first = append_rows(normal(1, 9, 2, 64), normal(1, 1, 2, 64, seed=1))
    kept, stream = first.numpy(), [first]
    for seed in range(9):
        stream.append(append_rows(without_the_first(stream[-1]), normal(1, 1, 2, 64, seed=seed)))
    places = np.diff([address(rows) for rows in stream])
    assert places.tolist() == [2 * 64 * 4] * 9  # one row further each time
    other = append_rows(without_the_first(first), normal(1, 1, 2, 64, seed=99))
    assert_same_bits(first, kept)
    assert_same_bits(other, tf.concat([first[:, 1:], normal(1, 1, 2, 64, seed=99)], 1))
    assert_same_bits(stream[1], tf.concat([first[:, 1:], normal(1, 1, 2, 64, seed=0)], 1))


@needs_library
@pytest.mark.parametrize("more", [[2, 1, 3], [1, 1, 4], [1, 3]])
def test_rows_of_another_shape_are_not_appended(more):
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)):
        append_rows(tf.zeros([1, 5, 3]), tf.zeros(more))


def test_the_gradient_of_appended_rows_is_that_of_each_part():
    parts, weight = (normal(1, 5, 2, 64), normal(1, 2, 2, 64)), normal(1, 7, 2, 64, seed=2)
    with tf.GradientTape() as tape:
        tape.watch(parts)
        total = tf.reduce_sum(append_rows(*parts) * weight)
    for found, expected in zip(
        tape.gradient(total, parts), tf.split(weight, [5, 2], 1), strict=True
    ):
        assert_same_bits(found, expected)


def test_vectorized_rows_are_appended_one_by_one():
    rows, more = normal(3, 2, 5, 4), normal(2, 1, 4)
    found = tf.vectorized_map(lambda x: append_rows(x, more), rows)
    assert_same_bits(found, tf.stack([tf.concat([x, more], 1) for x in rows]))
