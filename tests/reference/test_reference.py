"""The reference keeps what attention through features promises: three forms, closed forms."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from performer import reference
from performer.reference import NONE
from support.compare import assert_close, assert_finite, assert_same_bits
from support.reference_inputs import MAPS, D, E, L, M, arguments, heads_inputs, maps, random_state


def two_pass(q, k, v, w_q, w_k, feature_bias, key_bias, options=MAPS["softmax"], state=None):
    keys = reference.summarize(k, v, w_k, key_bias, options)
    keys = keys if state is None else reference.merge(state, keys)
    return reference.read(q, w_q, feature_bias, keys, options)


holes = st.lists(st.booleans(), min_size=L, max_size=L)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    std=st.sampled_from([0.1, 1.0, 5.0]),
    mask=holes,
    option=st.sampled_from(sorted(MAPS)),
    with_state=st.booleans(),
    chunk=st.integers(1, L + 1),
)
def test_direct_recurrent_and_chunked_forms_agree(seed, std, mask, option, with_state, chunk):
    inputs, options = arguments(seed, std=std), MAPS[option]
    inputs[-1] = np.where(mask, NONE, inputs[-1])
    state = random_state() if with_state else None
    bidirectional = reference.direct(*inputs, options, state=state)
    assert_close(two_pass(*inputs, options, state), bidirectional, worst=1e-12, what="two passes")
    out, final = reference.recurrent(*inputs, options, state=state)
    assert_close(out, bidirectional, worst=1e-12, what="recurrent")

    causal = reference.direct(*inputs, options, causal=True, state=state)
    out, recurrent_final = reference.recurrent(*inputs, options, causal=True, state=state)
    assert_close(out, causal, worst=1e-12, what="recurrent, causal")
    out, chunked_final = reference.causal(*inputs, options, state=state, chunk=chunk)
    assert_close(out, causal, worst=1e-12, what="chunked, causal")
    for i, name in enumerate(("log_mass", "mean")):
        assert_close(recurrent_final[i], final[i], worst=1e-11, what=f"recurrent {name}")
        assert_close(chunked_final[i], final[i], worst=1e-11, what=f"chunked {name}")


def test_a_cut_chunk_gives_the_same_result():
    inputs = arguments(std=1.0)
    inputs[1][4] *= 60  # far beyond the limit in nats
    inputs[-1][4] += 1000
    expected = reference.direct(*inputs, causal=True)
    assert_close(reference.causal(*inputs, chunk=16)[0], expected, worst=1e-12)


@maps
def test_constant_values_come_back(options):
    inputs = arguments()
    inputs[2] = np.full_like(inputs[2], 2.5)
    assert_close(two_pass(*inputs, options), inputs[2], worst=1e-14)
    assert_close(reference.causal(*inputs, options)[0], inputs[2], worst=1e-14)


@maps
@pytest.mark.parametrize("case", ["equal keys", "projection zero"])
def test_keys_that_cannot_be_told_apart_give_the_mean_of_the_values(options, case):
    q, k, v, w_q, w_k, feature_bias, _ = arguments()
    if case == "equal keys":
        k = np.repeat(k[:1], L, 0)
    else:
        w_q, w_k, options = 0 * w_q, 0 * w_k, options._replace(key_norm=False)
    out = two_pass(q, k, v, w_q, w_k, feature_bias, np.zeros(L), options)
    shared = np.repeat(v.mean(0)[None], L, 0)
    if (
        options.feature_epsilon == 0
    ):  # then a query without a feature in common with the keys gets 0
        shared[~np.any((q @ w_q.T > 0) & (k[0] @ w_k.T > 0), -1)] = 0
    assert_close(out, shared, worst=1e-14)


def test_one_key_gives_its_value():
    inputs = arguments(keys=1)
    assert_close(two_pass(*inputs), np.repeat(inputs[2], L, 0), worst=1e-14)


@maps
def test_a_masked_key_is_a_deleted_key_whatever_it_holds(options):
    q, k, v, w_q, w_k, feature_bias, key_bias = arguments()
    keep = np.ones(L, bool)
    keep[[0, 1, 5]] = False
    key_bias[~keep] = NONE
    k[~keep], v[~keep] = np.nan, np.inf
    dirty = [q, k, v, w_q, w_k, feature_bias, key_bias]
    deleted = two_pass(q, k[keep], v[keep], w_q, w_k, feature_bias, key_bias[keep], options)
    assert_close(two_pass(*dirty, options), deleted, worst=1e-14, what="bidirectional")
    out = reference.causal(*dirty, options, chunk=4)[0]
    clean = [x[keep] if len(x) == L else x for x in dirty]
    assert_close(out[keep], reference.causal(*clean, options)[0], worst=1e-13, what="causal")
    assert_same_bits(out[:2], np.zeros((2, E)), what="rows that see nothing")


def test_no_keys_at_all_give_zero():
    assert_same_bits(two_pass(*arguments(keys=0)), np.zeros((L, E)))
    inputs = arguments()
    inputs[-1][:] = NONE
    for out in (two_pass(*inputs), reference.direct(*inputs), reference.causal(*inputs)[0]):
        assert_same_bits(out, np.zeros((L, E)))


@maps
def test_a_duplicated_key_weighs_log_2_more(options):
    q, k, v, w_q, w_k, feature_bias, key_bias = arguments()
    doubled = [np.concatenate([x, x[3:4]]) for x in (k, v, key_bias)]
    heavier = key_bias.copy()
    heavier[3] += np.log(2)
    twice = two_pass(q, *doubled[:2], w_q, w_k, feature_bias, doubled[2], options)
    once = two_pass(q, k, v, w_q, w_k, feature_bias, heavier, options)
    assert_close(twice, once, worst=1e-14)


def test_many_features_approach_softmax_attention_which_a_shift_of_all_keys_leaves_alone():
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(L, D)) / 2, rng.normal(size=(L, D)) / 2, rng.normal(size=(L, E))
    exact = reference.softmax(q @ k.T * D**-0.5, -1) @ v
    uniform = np.abs(v.mean(0) - exact).max()
    w = rng.normal(size=(200_000, D))
    for shift in (np.zeros(D), np.full(D, 0.2)):
        # A shift changes every estimate: only its limit stays.
        out = two_pass(q, k + shift, v, w, w, np.zeros(len(w)), np.zeros(L))
        assert_close(out, exact, worst=uniform / 20, what=f"shift {shift[0]}")


def test_a_shift_that_the_key_side_undoes_changes_nothing():
    # The centred map: w + c on the key side and -w.c in the feature bias use the norm of k - c.
    q, k, v, w_q, _, _, key_bias = arguments()
    c = np.full(D, 0.3)
    root = D**-0.25
    plain = two_pass(q, k - c, v, w_q, w_q, np.zeros(M), key_bias)
    centred = two_pass(q, k, v, w_q, w_q + root * c, -root * (w_q @ c), key_bias)
    assert_close(centred, plain, worst=1e-13)


def test_the_future_cannot_change_a_bit_of_the_past():
    inputs = arguments(rows=40, keys=40)
    past = reference.causal(*inputs, chunk=16)[0]
    for poison in (np.nan, np.inf, 1e30):
        changed = [x.copy() for x in inputs]
        changed[1][20:], changed[2][25:] = poison, poison
        with np.errstate(all="ignore"):
            out = reference.causal(*changed, chunk=16)[0]
        assert_same_bits(out[:20], past[:20], what=f"rows before {poison}")


def test_a_nan_in_an_unmasked_value_shows_in_the_rows_that_see_it():
    inputs = arguments()
    inputs[2][4] = np.nan
    out = reference.causal(*inputs)[0]
    assert_finite(out[:4])
    assert np.isnan(out[4:]).all()
    assert np.isnan(two_pass(*inputs)).all()


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_heads_read_their_group_their_projection_and_their_bias(causal):
    x = heads_inputs()
    out, (log_mass, mean) = reference.attention(**x, causal=causal)
    b, h, g = 1, 3, 1  # query heads 2 and 3 read group 1
    arguments = [
        x["query"][b, :, h],
        x["key"][b, :, g],
        x["value"][b, :, g],
        x["query_projection"][h],
        x["key_projection"][g],
        x["feature_bias"][g],
        x["key_bias"][b, 0],
    ]
    assert_close(out[b, :, h], reference.direct(*arguments, causal=causal), worst=1e-13)
    one = reference.summarize(*arguments[1:3], arguments[4], arguments[6])
    assert_close(log_mass[b, g], one[0], worst=1e-13)
    assert_close(mean[b, g], one[1], worst=1e-13)
    state = reference.summarize_heads(x["key"], x["value"], x["key_projection"], x["key_bias"])
    read = reference.read_heads(x["query"], x["query_projection"], *state, x["feature_bias"])
    if not causal:
        assert_close(read, out, worst=1e-13)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_packed_sequences_do_not_see_each_other(causal):
    x = heads_inputs(batch=1)
    offsets = [0, 3, 3, 7]
    out, (log_mass, _) = reference.attention(**x, causal=causal, offsets=offsets)
    for begin, end in ((0, 3), (3, 7)):
        part = {name: x[name][:, begin:end] for name in ("query", "key", "value")}
        part["key_bias"] = x["key_bias"][:, :, begin:end]
        alone = reference.attention(**{**x, **part}, causal=causal)[0]
        assert_close(out[:, begin:end], alone, worst=1e-14)
    assert np.all(log_mass[1] == NONE)
