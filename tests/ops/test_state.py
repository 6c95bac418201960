"""States join like sets of keys: associative, commutative, with an identity; draws must agree."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings

from performer import orthogonal_projection, reference
from performer.ops import (
    AttentionState,
    empty_state,
    favor_attention,
    fingerprint,
    merge,
    read,
    summarize,
)
from support.compare import assert_close, assert_finite, assert_same_bits
from support.operator_calls import needs_xla

SHAPE = (2, 2, 3)  # N, G, M
VALUE_DIM = 2

masses = st.lists(
    st.one_of(st.just(-np.inf), st.floats(-300, 300, allow_subnormal=False)),
    min_size=int(np.prod(SHAPE)),
    max_size=int(np.prod(SHAPE)),
)


@st.composite
def states(draw):
    """A float64 state, at some position; features without mass have mean 0."""
    log_mass = np.reshape(draw(masses), SHAPE)
    mean = np.random.default_rng(draw(st.integers(0, 10**6))).normal(size=(*SHAPE, VALUE_DIM))
    mean[log_mass == -np.inf] = 0
    position = tf.constant(draw(st.integers(0, 2**40)), tf.int64)
    return AttentionState(
        tf.constant(log_mass), tf.constant(mean), tf.constant(3, tf.int64), position
    )


def assert_same_state(actual, expected, bound):
    assert_close(actual.log_mass, expected.log_mass, worst=bound * 300, what="log_mass")
    assert_close(actual.mean, expected.mean, worst=bound, what="mean")
    assert int(actual.draw) == int(expected.draw)


@settings(deadline=None, max_examples=20)
@given(states(), states(), states())
def test_merge_is_associative(one, two, three):
    assert_same_state(merge(merge(one, two), three), merge(one, merge(two, three)), 1e-13)


@settings(deadline=None, max_examples=20)
@given(states(), states())
def test_merge_is_commutative_to_the_bit(one, two):
    here, there = merge(one, two), merge(two, one)
    assert_same_bits(here.log_mass, there.log_mass, what="log_mass")
    assert_same_bits(here.mean, there.mean, what="mean")


@settings(deadline=None, max_examples=20)
@given(states(), states())
def test_a_merged_state_stands_at_the_later_position(one, two):
    later = max(int(one.position), int(two.position))
    assert int(merge(one, two).position) == int(merge(two, one).position) == later


@settings(deadline=None, max_examples=20)
@given(states())
def test_the_empty_state_changes_nothing(state):
    empty = empty_state(1, 2, 3, VALUE_DIM, tf.float64, draw=3)
    for joined in (merge(state, empty), merge(empty, state)):
        assert np.array_equal(joined.log_mass, state.log_mass)
        assert np.array_equal(joined.mean, state.mean)


@settings(deadline=None, max_examples=20)
@given(states(), states())
def test_merge_is_that_of_the_reference(one, two):
    joined = merge(one, two)
    for n, g in np.ndindex(*SHAPE[:2]):
        pair = [(x.log_mass[n, g].numpy(), x.mean[n, g].numpy()) for x in (one, two)]
        expected = reference.merge(*pair)
        assert_close(joined.log_mass[n, g], expected[0], worst=1e-11)
        assert_close(joined.mean[n, g], expected[1], worst=1e-12)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 1000))
def test_the_states_of_parts_join_to_the_state_of_the_whole(first, second, seed):
    rng = np.random.default_rng(seed)
    key, value = rng.normal(size=(1, 12, 2, 4)), rng.normal(size=(1, 12, 2, VALUE_DIM))
    w, query = rng.normal(size=(5, 4)), rng.normal(size=(1, 6, 4, 4))
    cuts = [0, *sorted([first, second]), 12]
    parts = [summarize(key[:, i:j], value[:, i:j], w) for i, j in itertools.pairwise(cuts)]
    joined = merge(merge(parts[0], parts[1]), parts[2])
    whole = summarize(key, value, w)
    assert_close(joined.log_mass, whole.log_mass, worst=1e-12)
    assert_close(read(query, w, joined), read(query, w, whole), worst=1e-12)


def test_gradients_of_merge_are_finite_where_both_states_are_empty():
    one = empty_state(1, 1, 2, 2, tf.float64)
    mass = tf.constant([[[-np.inf, 0.5]]], tf.float64)
    inputs = [one.log_mass, one.mean, mass, tf.ones([1, 1, 2, 2], tf.float64)]
    with tf.GradientTape() as outer:
        outer.watch(inputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            joined = merge(
                AttentionState(*inputs[:2], one.draw), AttentionState(*inputs[2:], one.draw)
            )
            loss = tf.reduce_sum(joined.mean**2) + tf.reduce_sum(joined.log_mass[..., 1:] ** 2)
        grads = tape.gradient(loss, inputs)
        square = sum(tf.reduce_sum(g * g) for g in grads)
    for grad in [*grads, *outer.gradient(square, inputs)]:
        assert_finite(grad)
    assert not grads[0].numpy().any()


def small_state(draw, **sizes):
    sizes = {"batch": 1, "heads": 2, "features": 3, "value_dim": 2, **sizes}
    return empty_state(**sizes, draw=draw)


def test_states_of_different_draws_do_not_join():
    with pytest.raises(ValueError, match=r"same draw.*got 1 and 2"):
        merge(small_state(1), small_state(2))
    query, w = tf.zeros([1, 4, 2, 5]), tf.zeros([3, 5])
    with pytest.raises(ValueError, match=r"same draw.*got 7 and 1"):
        read(query, w, small_state(1), draw=7)
    assert read(query, w, small_state(1), draw=1).shape == [1, 4, 2, 2]


def test_draws_known_only_at_run_time_are_checked_there():
    spec = tf.TensorSpec([], tf.int64)

    @tf.function(input_signature=[spec, spec])
    def joined_draw(first, second):
        return merge(small_state(first), small_state(second)).draw

    assert joined_draw(4, 4) == 4
    with pytest.raises(tf.errors.InvalidArgumentError, match="same draw"):
        joined_draw(4, 5)
    assert joined_draw(5, 5) == 5


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (ValueError, {"features": 4}, r"agree in log_mass, .*got \(1, 2, 3\) and \(1, 2, 4\)"),
        (ValueError, {"value_dim": 5}, r"agree in mean, .*got \(1, 2, 3, 2\) and \(1, 2, 3, 5\)"),
        (TypeError, {"dtype": tf.float64}, r"second\.log_mass must be float32, got float64"),
    ],
)
def test_states_that_do_not_fit_are_refused(error, change, message):
    with pytest.raises(error, match=message):
        merge(small_state(0), small_state(0, **change))
    with pytest.raises(ValueError, match=r"N = 1 on axis 0, got \(2, 2, 3\) and \(3, 2, 3\)"):
        merge(small_state(0, batch=2), small_state(0, batch=3))


def test_what_is_no_state_is_refused():
    with pytest.raises(TypeError, match="first must be an AttentionState, got tuple"):
        merge((1, 2), small_state(0))
    lists = AttentionState([[[0.0]]], [[[[1.0]]]], 0)
    np.testing.assert_array_equal(merge(lists, lists).mean, [[[[1.0]]]])
    for sizes, message in (
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 0, got -1"),
        ({"dtype": tf.bfloat16}, "dtype must be float32 or float64, got bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            small_state(0, **sizes)


def test_a_draw_is_an_integer_scalar():
    with pytest.raises(TypeError, match=r"draw must be an integer, got float32"):
        small_state(1.5)
    with pytest.raises(ValueError, match=r"draw must be a scalar, got shape \(2,\)"):
        small_state([1, 2])


def tensors(seed=0):
    x = np.random.default_rng(seed).normal(size=[1, 5, 2, 4]).astype("float32")
    return x, orthogonal_projection(8, 4, seed=seed), orthogonal_projection(8, 4, seed=seed + 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_xla)])
def test_a_fingerprint_is_the_same_eagerly_in_graphs_and_under_xla(compiled):
    _, w, other = tensors()
    call = tf.function(fingerprint, jit_compile=compiled, reduce_retracing=True)
    for projection in (w, tf.cast(w, tf.float64), w[None], (w, w), (w, other), (other, w)):
        variables = tf.nest.map_structure(tf.Variable, projection)
        assert call(variables) == fingerprint(projection)
    assert fingerprint(tf.cast(w, tf.float64)) == fingerprint((w, w)) == fingerprint(w)


def test_every_bit_and_place_of_a_projection_is_in_its_fingerprint():
    w = np.random.default_rng(0).normal(size=[6, 4]).astype("float32")
    numbers = {int(fingerprint(w))}
    for i in range(w.size):
        changed = w.copy()
        changed.flat[i] = np.nextafter(w.flat[i], np.float32(9))
        numbers.add(int(fingerprint(changed)))
    numbers |= {int(fingerprint(x)) for x in (w[::-1], w[:, ::-1], w[:5], np.zeros_like(w), w + 1)}
    for pair in ((w, w[::-1]), (w[::-1], w), (w[::-1], w[::-1])):
        numbers.add(int(fingerprint(pair)))
    assert len(numbers) == 1 + w.size + 7 and all(number % 2 for number in numbers)


def test_states_of_another_projection_are_refused_without_a_number_of_ones_own():
    x, w, other = tensors()
    state = summarize(x, x, w)
    assert state.draw == fingerprint(w)
    uses = {
        "read": lambda w, s, **o: read(x, w, s, **o),
        "attend": lambda w, s, **o: favor_attention(x, x, x, w, initial_state=s, **o),
        "merge": lambda w, s, **o: merge(s, summarize(x, x, w, **o)),
        "stream": lambda w, s, **o: favor_attention(
            x, x, x, w, initial_state=s, causal=True, return_state=True, **o
        )[1],
    }
    for name, use in uses.items():
        use(w, state), use((w, w), state)
        for projection in (other, (other, w), (w, other)):  # keys alone are not enough
            with pytest.raises(ValueError, match="same draw of the projection"):
                use(projection, state)
        use(other, state._replace(draw=7), draw=7)
        use(other, empty_state(1, 2, 8, 4))
        late = tf.function(lambda w, s, use=use: use(w, s), jit_compile=False)
        late(tf.Variable(w), state)
        with pytest.raises(tf.errors.InvalidArgumentError, match="same draw of the projection"):
            late(tf.Variable(other), state)
        assert name  # shown when an assertion above fails


def test_an_empty_state_takes_the_draw_of_what_it_is_joined_with():
    some, nothing = small_state(5), empty_state(1, 2, 3, 2)
    assert merge(some, nothing).draw == merge(nothing, some).draw == 5
    assert merge(nothing, nothing).draw == nothing.draw
    late = tf.function(lambda one, two: merge(one, two).draw)
    assert late(some, nothing) == late(nothing, some) == 5


def test_calls_without_a_state_compute_no_fingerprint(monkeypatch):
    x, w, _ = tensors()
    monkeypatch.setattr("performer.ops.arguments.fingerprint_of_sides", lambda *_: pytest.fail())
    favor_attention(x, x, x, w)
    state = summarize(x, x, w, draw=3)
    read(x, w, state, draw=3)
