"""Near-and-far attention of the reference: two forms, closed forms, gradients."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from performer import reference
from performer.reference import NONE, NearFar
from support.compare import assert_close, assert_finite, assert_same_bits
from support.reference_inputs import (
    INPUTS,
    STATE,
    D,
    E,
    L,
    M,
    arguments,
    differences,
    heads_inputs,
    random_state,
)

forms = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    std=st.sampled_from([0.1, 1.0, 5.0]),
    mask=st.lists(st.booleans(), min_size=L, max_size=L),
    window=st.integers(1, 6),
    start=st.integers(0, 11),
    queries=st.integers(0, L),
    causal=st.booleans(),
    norms=st.tuples(st.booleans(), st.booleans()),
    with_state=st.booleans(),
)
def test_direct_and_blocked_forms_agree(
    seed, std, mask, window, start, queries, causal, norms, with_state
):
    inputs = arguments(seed, std=std)
    inputs[-1] = np.where(mask, NONE, inputs[-1])
    inputs[0] = inputs[0][: queries if causal else L]
    options = NearFar(window, causal, start, 0.7, *norms)
    state = random_state() if with_state else None
    expected = reference.near_far_direct(*inputs, options, state=state)
    actual = reference.near_far_in_blocks(*inputs, options, state=state)
    for one, other, what in zip(actual[:2], expected[:2], ("out", "log_weight"), strict=True):
        assert_close(one, other, worst=1e-12, what=what)
    for one, other, what in zip(actual[2], expected[2], STATE, strict=True):
        assert_close(one, other, worst=1e-12, what=what)


@forms
def test_a_window_as_long_as_the_sequence_is_softmax_attention(causal):
    inputs = arguments()
    inputs[-1][3] = NONE
    q, k, v, key_bias = inputs[0], inputs[1], inputs[2], inputs[-1]
    logits = q @ k.T * D**-0.5 + key_bias
    if causal:
        logits = np.where(np.tri(L, dtype=bool), logits, NONE)
    out, log_weight, _ = reference.near_far_in_blocks(*inputs, NearFar(L, causal))
    assert_close(out, reference.softmax(logits, -1) @ v, worst=1e-13)
    assert_close(log_weight, reference.logsumexp(logits, -1), worst=1e-13)


@pytest.mark.slow
@forms
def test_the_far_part_estimates_the_same_as_the_near_part(causal):
    # Every constant must be there: the near and the far weights stand in one sum.
    rng = np.random.default_rng(3)
    q, k, v, *_, key_bias = arguments(std=0.7)
    w = rng.normal(size=(400_000, D))
    inputs = [q, k, v, w, w, np.zeros(len(w)), key_bias]
    exact = reference.near_far_in_blocks(*inputs, NearFar(L, causal))
    estimate = reference.near_far_in_blocks(*inputs, NearFar(1, causal))
    assert_close(estimate[0], exact[0], worst=0.01)
    assert_close(estimate[1], exact[1], worst=0.01)


@forms
def test_a_masked_key_is_nothing_whatever_it_holds(causal):
    inputs, options = arguments(), NearFar(2, causal)
    inputs[-1][[0, 5]] = NONE
    clean = reference.near_far_in_blocks(*inputs, options)
    for x in inputs[1:3]:
        x[[0, 5]] = np.nan
    dirty = reference.near_far_in_blocks(*inputs, options)
    for one, other in zip(dirty[:2], clean[:2], strict=True):
        assert_same_bits(one, other)
    if causal:
        assert_same_bits(dirty[0][0], np.zeros(E))
        assert dirty[1][0] == NONE


def test_the_future_cannot_change_a_bit_of_the_past():
    inputs, options = arguments(rows=20, keys=20), NearFar(3, causal=True)
    past = reference.near_far_in_blocks(*inputs, options)
    for poison in (np.nan, np.inf, 1e30):
        changed = [x.copy() for x in inputs]
        changed[1][10:], changed[2][12:] = poison, poison
        with np.errstate(all="ignore"):
            out, log_weight, _ = reference.near_far_in_blocks(*changed, options)
        assert_same_bits(out[:10], past[0][:10], what=f"rows before {poison}")
        assert_same_bits(log_weight[:10], past[1][:10], what=f"rows before {poison}")


@pytest.mark.parametrize("ends", [(3, 4, 9), tuple(range(1, 10)), (9,)], ids=str)
def test_streams_are_the_whole_with_stored_rows_and_the_final_state(ends):
    window, inputs = 2, arguments()
    whole = reference.near_far_in_blocks(*inputs, NearFar(window, causal=True))
    state, stored, begin = None, 0, 0
    for end in ends:
        rows = slice(begin, end)
        keys = slice(begin - stored, end)
        q, k, v, *rest, key_bias = inputs
        out, log_weight, state = reference.near_far_in_blocks(
            q[rows],
            k[keys],
            v[keys],
            *rest,
            key_bias[keys],
            NearFar(window, causal=True, start=begin - stored),
            state=state,
        )
        assert_close(out, whole[0][rows], worst=1e-12)
        assert_close(log_weight, whole[1][rows], worst=1e-12)
        begin, stored = end, end - max((end // window - 1) * window, 0)
    for one, other in zip(state, whole[2], strict=True):
        assert_close(one, other, worst=1e-12)


@forms
@pytest.mark.parametrize("queries", [L, 3])
def test_gradients_are_those_of_finite_differences(causal, queries):
    queries = queries if causal else L
    values = [*arguments(), *random_state()]
    values[0] = values[0][:queries]
    values[6][[0, 4]] = NONE
    rng = np.random.default_rng(3)
    dout, dlog_weight = rng.normal(size=(queries, E)), rng.normal(size=queries)
    dfinal = rng.normal(size=M), rng.normal(size=(M, E))
    options = NearFar(2, causal, start=3, scale=0.6)

    def loss(*values):
        out, log_weight, final = reference.near_far_direct(*values[:7], options, state=values[7:])
        incoming = zip((out, log_weight, *final), (dout, dlog_weight, *dfinal), strict=True)
        return sum(np.sum(x * g) for x, g in incoming)

    grads = reference.near_far_gradients(
        *values[:7],
        dout,
        options,
        state=tuple(values[7:]),
        dlog_weight=dlog_weight,
        dfinal=dfinal,
    )
    for position, name in enumerate([*INPUTS, *STATE]):
        numeric = differences(loss, values, position)
        assert_close(grads[name], numeric, relative=1e-6, worst=1e-6, what=name)


def test_gradients_of_rows_that_see_nothing_are_zero_and_all_others_finite():
    inputs = arguments()
    inputs[6][[0, 1, 5]] = NONE
    inputs[1][[0, 1, 5]], inputs[2][[0, 1, 5]] = np.nan, np.nan
    options = NearFar(2, causal=True)
    grads = reference.near_far_gradients(
        *inputs, np.ones((L, E)) * np.arange(E), options, dlog_weight=np.ones(L)
    )
    for name, grad in grads.items():
        assert_finite(grad, what=name)
    assert not grads["query"][:2].any()
    for name in ("key", "value", "key_bias"):
        assert not grads[name][[0, 1, 5]].any(), name


@pytest.mark.parametrize(
    ("causal", "packed"),
    [
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        (True, True),
    ],
)
def test_heads_read_their_group_and_their_gradients_sum_over_what_they_share(causal, packed):
    x = heads_inputs(batch=1 if packed else 2, rows=5, groups=1, heads=2)
    x["query_projection"] = x["query_projection"][:1]
    x["key_bias"] = x["key_bias"][:1]
    rng = np.random.default_rng(1)
    state = rng.normal(size=(1, 1, M)), rng.normal(size=(1, 1, M, E))
    options = {"causal": causal, "offsets": [0, 1, 5] if packed else None, "exact_window": 1}
    out, log_weight, final = reference.near_far_attention(**x, initial_state=state, **options)
    rows, b = (slice(1, 5), 0) if packed else (slice(None), 1)
    alone = reference.near_far_direct(
        x["query"][b, rows, 1],
        x["key"][b, rows, 0],
        x["value"][b, rows, 0],
        x["query_projection"][0],
        x["key_projection"][0],
        x["feature_bias"][0],
        x["key_bias"][0, 0, rows],
        NearFar(1, causal),
        state=(state[0][0, 0], state[1][0, 0]),
    )
    assert_close(out[b, rows, 1], alone[0], worst=1e-12)
    assert_close(log_weight[b, rows, 1], alone[1], worst=1e-12)
    assert_close(final[0][1, 0], alone[2][0], worst=1e-12)

    incoming = [rng.normal(size=np.shape(y)) for y in (out, log_weight, *final)]

    def loss(*values):
        named = dict(zip(x, values[:7], strict=True))
        out, log_weight, final = reference.near_far_attention(
            **named, initial_state=values[7:], **options
        )
        results = zip((out, log_weight, *final), incoming, strict=True)
        return sum(np.sum(y * g) for y, g in results)

    grads = reference.near_far_attention_gradients(
        **x,
        grad_out=incoming[0],
        grad_log_weight=incoming[1],
        grad_state=incoming[2:],
        initial_state=state,
        **options,
    )
    for position, name in enumerate([*INPUTS, *STATE]):
        numeric = differences(loss, [*x.values(), *state], position)
        assert_close(grads[name], numeric, relative=1e-6, worst=1e-6, what=name)
