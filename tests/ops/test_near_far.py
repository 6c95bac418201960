"""`favor_attention` with `exact_window`: what is near, states, streams, log weights, refusals."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from performer import reference
from performer.ops import (
    AttentionState,
    empty_state,
    favor_attention,
    merge,
    merge_outputs,
    read,
)
from performer.ops.dense import dense_attention
from performer.ops.state import ANY_DRAW
from support.attention_inputs import B, D, E, G, H, M, random_state, random_tensors
from support.compare import assert_close, assert_finite, assert_same_bits
from support.inputs import forms

W, L = 64, 200


def stream(x, cuts, state=None, **options):
    """Outputs and log weights of a causal call in parts, and the last state."""
    results = []
    for begin, end in itertools.pairwise([0, *cuts]):
        part = {name: a[:, begin:end] for name, a in x.items() if name != "projection"}
        mask = {name: options[name][:, begin:end] for name in ("key_mask",) if name in options}
        *result, state = favor_attention(
            **part,
            projection=x["projection"],
            causal=True,
            initial_state=state,
            return_state=True,
            return_log_weight=True,
            **{**options, **mask},
        )
        results.append(result)
    return *(tf.concat(parts, 1) for parts in zip(*results, strict=True)), state


@forms
def test_every_option_is_that_of_the_reference(causal):
    x, rng = random_tensors(L=L), np.random.default_rng(1)
    pair = rng.normal(size=(H, M, D)), rng.normal(size=(G, M, D))
    mask, bias = rng.random((B, L)) > 0.3, rng.normal(size=(B, G, L))
    feature_bias, far_bias = rng.normal(size=(G, M)), rng.normal(size=H)
    state = random_state(ANY_DRAW)
    options = {"scale": 0.4, "key_norm": False, "query_norm": False}
    del x["projection"]
    out, log_weight, final = favor_attention(
        **x,
        projection=pair,
        causal=causal,
        key_mask=mask,
        key_bias=bias,
        feature_bias=feature_bias,
        far_bias=far_bias,
        exact_window=W,
        initial_state=state,
        return_state=True,
        return_log_weight=True,
        **options,
    )
    expected, expected_weight, expected_final = reference.near_far_attention(
        *x.values(),
        *pair,
        feature_bias=np.repeat(feature_bias, H // G, 0) + far_bias[:, None],
        key_bias=np.where(mask[:, None], bias, -np.inf),
        initial_state=state[:2],
        causal=causal,
        exact_window=W,
        **options,
    )
    assert_close(out, expected, relative=1e-12, what="out")
    assert_close(log_weight, expected_weight, relative=1e-12, what="log_weight")
    assert_close(final.log_mass, expected_final[0], relative=1e-12, what="log_mass")
    assert_close(final.mean, expected_final[1], relative=1e-12, what="mean")


@pytest.mark.parametrize("ends", [(1, 2, 63, 64, 65, 130, 200), (127, 128, 129, 200), (200,)])
def test_streams_are_the_whole(ends):
    x = random_tensors(L=L)
    mask = np.random.default_rng(1).random((B, L)) > 0.2
    options = {"exact_window": W, "key_mask": mask, "far_bias": -1.0}
    whole = favor_attention(**x, causal=True, return_log_weight=True, return_state=True, **options)
    for start in (None, empty_state(1, G, M, E, tf.float64, exact_window=W, key_dim=D)):
        results = stream(x, ends, start, **options)
        for got, expected in zip(results[:2], whole[:2], strict=True):
            assert_close(got, expected, worst=1e-12)
        got, expected = results[2], whole[2]
        assert int(got.position) == int(expected.position) == L
        for name, got_field in got._asdict().items():
            if name in ("near_key", "near_value"):  # masked rows hold anything
                there = np.isfinite(expected.near_bias)[:, :1].transpose(0, 2, 1)[..., None]
                got_field, field = got_field * there, getattr(expected, name) * there
            else:
                field = getattr(expected, name)
            assert_close(got_field, field, worst=1e-12, what=name)


def test_single_tokens_are_the_whole_in_one_loop_of_constant_shapes():
    x = random_tensors(L=140)
    names = ("query", "key", "value")

    @tf.function(autograph=False)
    def loop():
        def body(i, state, outputs):
            token = {name: tf.constant(x[name])[:, i : i + 1] for name in names}
            out, state = favor_attention(
                **token,
                projection=x["projection"],
                causal=True,
                exact_window=W,
                initial_state=state,
                return_state=True,
            )
            return i + 1, state, outputs.write(i, out[:, 0])

        state = empty_state(B, G, M, E, tf.float64, exact_window=W, key_dim=D)
        outputs = tf.TensorArray(tf.float64, 140)
        return tf.while_loop(lambda i, *_: i < 140, body, (0, state, outputs))[2].stack()

    whole = favor_attention(**x, causal=True, exact_window=W)
    assert_close(tf.transpose(loop(), [1, 0, 2, 3]), whole, worst=1e-12)


def test_a_far_state_comes_before_a_stream_at_its_position():
    x, far = random_tensors(L=L), random_state(ANY_DRAW)._replace(position=37)
    options = {"exact_window": W}
    whole, _, _ = stream(x, (L,), far, **options)
    parts, _, state = stream(x, (30, 91, 200), far, **options)
    assert_close(parts, whole, worst=1e-12)
    assert int(state.position) == 37 + L
    expected = reference.near_far_attention(
        *x.values(), initial_state=far[:2], exact_window=W, causal=True, start=37
    )
    assert_close(whole, expected[0], relative=1e-12)


@forms
def test_segments_are_attention_of_each_run_by_itself(causal):
    x = random_tensors(L=150)
    ids = np.where(np.arange(150) < 70, 4, 9) + np.array([[0], [0]])
    ids[1] = np.where(np.arange(150) < 1, 2, 4)
    call = {"causal": causal, "exact_window": W, "return_log_weight": True}
    for maximum in (None, 2):
        out, weight = favor_attention(**x, segment_ids=ids, max_segments=maximum, **call)
        for b, begin, end in ((0, 0, 70), (0, 70, 150), (1, 0, 1), (1, 1, 150)):
            part = {n: a[b : b + 1, begin:end] for n, a in x.items() if n != "projection"}
            alone = favor_attention(**part, projection=x["projection"], **call)
            assert_close(out[b : b + 1, begin:end], alone[0], worst=1e-12)
            assert_close(weight[b : b + 1, begin:end], alone[1], worst=1e-12)


@forms
@pytest.mark.parametrize(
    ("feature_map", "window"), [("softmax", None), ("softmax", W), ("relu", None)]
)
def test_log_weights_are_those_of_the_direct_sum(causal, feature_map, window):
    x, state = random_tensors(L=70), random_state(ANY_DRAW)
    rng = np.random.default_rng(3)
    bias = np.where(rng.random((B, 1, 70)) < 0.3, -np.inf, rng.normal(size=(B, 1, 70)))
    out, log_weight = favor_attention(
        **x,
        key_bias=bias,
        initial_state=state,
        causal=causal,
        feature_map=feature_map,
        exact_window=window,
        return_log_weight=True,
    )
    options = reference.FeatureMap(feature_map)
    for b, h in itertools.product(range(B), range(H)):
        g = h // (H // G)
        q, k, v = x["query"][b, :, h], x["key"][b, :, g], x["value"][b, :, g]
        w, beta = x["projection"], bias[b, 0]
        k, v = reference.load(k, v, beta)
        if feature_map == "softmax":
            a = reference.log_features(q, w, -np.log(M), options, norm=True)
        else:
            a = reference.log_features(q, w, 0, options)
        logs = reference.logsumexp(
            a[:, None] + reference.key_log_features(k, w, beta, options)[None], -1
        )
        if window:
            blocks = np.arange(70) // window
            near = np.abs(blocks[:, None] - blocks) <= 1
            logs = np.where(near, q @ k.T * D**-0.5 + beta, logs)
        if causal:
            logs = np.where(np.tri(70, dtype=bool), logs, -np.inf)
        logs = np.concatenate([logs, a + state.log_mass[b, g]], 1)
        assert_close(log_weight[b, :, h], reference.logsumexp(logs, -1), worst=1e-12)
        values = np.concatenate([v, state.mean[b, g]])
        assert_close(out[b, :, h], reference.softmax(logs, -1) @ values, worst=1e-12)


@pytest.mark.parametrize("window", [None, W])
def test_outputs_over_disjoint_keys_join(window):
    x = random_tensors(L=140)
    mask = np.random.default_rng(1).random((B, 140)) < 0.5
    mask[0] = True  # of this row the second set has no key
    sets = (mask, ~mask)
    call = {"exact_window": window, "causal": True, "return_log_weight": True}
    whole, whole_weight = favor_attention(**x, **call)
    variables = [tf.constant(x[name]) for name in ("query", "key", "value")]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(variables)
        parts = [favor_attention(*variables, x["projection"], key_mask=m, **call) for m in sets]
        out, weight = merge_outputs(*zip(*parts, strict=True))
        whole_again, _ = favor_attention(*variables, x["projection"], **call)
        losses = [tf.reduce_sum(tf.sin(y)) for y in (out, whole_again)]
    assert_close(out, whole, worst=1e-12)
    assert_close(weight, whole_weight, worst=1e-12)
    for one, other in zip(*(tape.gradient(loss, variables) for loss in losses), strict=True):
        assert_close(one, other, relative=1e-10)


def test_merged_outputs_heed_no_result_without_weight():
    out = tf.ones([1, 2, 1, 3])
    nothing, nan = tf.fill([1, 2, 1], -np.inf), out * np.nan
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([out, nothing])
        joined, weight = merge_outputs([out, nan], [tf.zeros([1, 2, 1]), nothing])
        empty, no_weight = merge_outputs([nan, nan], [nothing, nothing])
        loss = tf.reduce_sum(joined) + tf.reduce_sum(empty)
    assert_same_bits(joined, out)
    assert_same_bits(weight, np.zeros((1, 2, 1), "float32"))
    assert_same_bits(empty, np.zeros((1, 2, 1, 3), "float32"))
    assert np.all(no_weight == -np.inf)
    for grad in tape.gradient(loss, [out, nothing]):
        assert_finite(grad)


@forms
def test_the_dense_form_has_the_weights_of_the_same_estimator(causal):
    x = random_tensors(L=150)
    mask = np.random.default_rng(1).random((B, 150)) > 0.3
    call = {"key_mask": mask, "exact_window": W, "far_bias": -0.5}
    pairs = np.tri(150, dtype=bool)[None, None] if causal else None
    out, weights = dense_attention(**x, mask=pairs, **call)
    assert_close(out, favor_attention(**x, causal=causal, **call), worst=1e-12)
    values = np.repeat(x["value"], H // G, 2)
    assert_close(np.einsum("bhls,bshe->blhe", weights, values), out, worst=1e-12)


@forms
def test_gradients_are_those_of_finite_differences_to_the_second_order(causal):
    x = random_tensors(L=130)
    rng = np.random.default_rng(2)
    directions = [rng.normal(size=a.shape) for a in x.values()]
    far_bias = tf.constant(rng.normal(size=H))
    weights = [
        tf.constant(rng.normal(size=(B, 130, H, E))),
        tf.constant(rng.normal(size=(B, 130, H))),
    ]

    def loss(step):
        moved = [tf.constant(a) + step * d for a, d in zip(x.values(), directions, strict=True)]
        results = favor_attention(
            *moved,
            causal=causal,
            exact_window=W,
            far_bias=far_bias + step,
            return_log_weight=True,
        )
        return tf.add_n([tf.reduce_sum(w * y) for w, y in zip(weights, results, strict=True)])

    def slope(step):
        step = tf.constant(step, tf.float64)
        with tf.GradientTape() as tape:
            tape.watch(step)
            y = loss(step)
        return tape.gradient(y, step)

    small = 1e-5
    numeric = (loss(small) - loss(-small)) / (2 * small)
    assert abs(float(slope(0.0) / numeric) - 1) < 1e-6
    step = tf.constant(0.0, tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(step)
        with tf.GradientTape() as inner:
            inner.watch(step)
            y = loss(step)
        first = inner.gradient(y, step)
    numeric = (slope(small) - slope(-small)) / (2 * small)
    assert abs(float(outer.gradient(first, step) / numeric) - 1) < 1e-5


def test_past_rows_have_the_same_bits_whatever_comes():
    x = {name: a.astype("float32") for name, a in random_tensors(L=200).items()}
    call = {"causal": True, "exact_window": W, "return_log_weight": True}
    clean = favor_attention(**x, **call)
    for poison in (np.nan, 1e30):
        dirty = {name: a.copy() for name, a in x.items()}
        dirty["key"][:, 150], dirty["value"][:, 140] = poison, poison
        for one, other in zip(favor_attention(**dirty, **call), clean, strict=True):
            assert_same_bits(one[:, :140], other[:, :140])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_states_keep_near_rows_in_the_type_of_the_keys(dtype):
    x = {n: tf.cast(a, dtype) for n, a in random_tensors(L=L).items()}
    out, _, state = stream(x, (70, 200), exact_window=W)
    assert out.dtype.name == state.near_key.dtype.name == state.near_value.dtype.name == dtype
    assert state.near_bias.dtype == state.log_mass.dtype == tf.float32
    assert state.near_key.shape == (B, 2 * W - 1, G, D)
    assert state.near_bias.shape == (B, G, 2 * W - 1)
    rms = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert_close(out, favor_attention(**x, causal=True, exact_window=W), rms=rms)


def test_states_without_a_window_have_the_leaves_that_they_had(tmp_path):
    x = random_tensors(L=10)
    state = favor_attention(**x, causal=True, return_state=True)[1]
    assert len(tf.nest.flatten(state)) == 4
    np.savez(tmp_path / "state.npz", **state._asdict())
    loaded = AttentionState(**np.load(tmp_path / "state.npz"))
    tf.nest.assert_same_structure(loaded, state)
    windowed = stream(x, (10,), exact_window=W)[2]
    assert len(tf.nest.flatten(windowed)) == 7
    again = AttentionState(**{name: a.numpy() for name, a in windowed._asdict().items()})
    results = [stream(x, (10,), state, exact_window=W)[0] for state in (again, windowed)]
    assert_same_bits(*results)


def test_states_join_where_one_has_no_near_rows():
    x, far = random_tensors(L=L), random_state(ANY_DRAW)
    near = stream(x, (150,), exact_window=W)[2]
    rest = {n: a[:, 150:] if n != "projection" else a for n, a in x.items()}
    joined = stream(rest, (50,), merge(near, far), exact_window=W)[0]
    again = stream(rest, (50,), merge(far, near), exact_window=W)[0]
    assert_close(joined, again, worst=1e-13)
    whole = stream(x, (L,), far, exact_window=W)[0]
    assert_close(joined, whole[:, 150:], worst=1e-12)
    with pytest.raises(ValueError, match=r"both have near rows .* Got 127 and 127"):
        merge(near, near)


REFUSED = {
    "no multiple of 64": ({"exact_window": 100}, ValueError, "multiple of 64 .* got 100"),
    "no integer": ({"exact_window": 64.0}, ValueError, "multiple of 64 .* got 64.0"),
    "0": ({"exact_window": 0}, ValueError, "multiple of 64 .* got 0"),
    "too large": ({"exact_window": 2**17}, ValueError, "to 65536, got 131072"),
    "relu": ({"exact_window": 64, "feature_map": "relu"}, ValueError, "nothing to make exact"),
    "far_bias alone": ({"far_bias": 1.0}, ValueError, "far_bias needs exact_window or exact_keys"),
    "far_bias of 3": (
        {"far_bias": [1.0] * 3, "exact_window": 64},
        ValueError,
        "far_bias must have 1 or H = 4",
    ),
    "segments": (
        {
            "exact_window": 64,
            "segment_ids": np.zeros((B, 9), int),
            "causal": True,
            "return_state": True,
        },
        ValueError,
        "return_state must be False with segment_ids",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        favor_attention(**random_tensors(), **options)


def test_near_rows_that_do_not_fit_are_refused():
    x = random_tensors(L=70)
    state = stream(x, (70,), exact_window=W)[2]
    call = {**x, "initial_state": state}
    for options, message in (
        ({"causal": True}, "exact_window must be that of the call .* 127 near rows, got None"),
        ({"causal": True, "exact_window": 128}, "must have 255 near rows .* got 127"),
        ({"exact_window": 64}, "must have no near rows without causal=True"),
    ):
        with pytest.raises(ValueError, match=message):
            favor_attention(**call, **options)
    with pytest.raises(ValueError, match=r"state must have no near rows, .* 127 of them"):
        read(x["query"], x["projection"], state)
    short = state._replace(near_bias=state.near_bias[:, :, :5])
    with pytest.raises(ValueError, match=r"near_bias must have the R of initial_state.near_key"):
        favor_attention(**{**call, "initial_state": short}, causal=True, exact_window=W)
    with pytest.raises(ValueError, match="L = S with exact_window"):
        favor_attention(**random_tensors(L=70, S=60), exact_window=W)

    @tf.function(input_signature=[tf.TensorSpec([B, None, G, D], tf.float64)])
    def unknown(key):
        value = tf.zeros([B, tf.shape(key)[1], G, E], tf.float64)
        return favor_attention(x["query"], key, value, x["projection"], causal=True, exact_window=W)

    assert unknown(x["key"]).shape == (B, 70, H, E)
    with pytest.raises(tf.errors.InvalidArgumentError, match="the same length"):
        unknown(np.concatenate([x["key"], x["key"]], 1))


@pytest.mark.parametrize(
    ("lists", "error", "message"),
    [
        (([], []), ValueError, "got 0 and 0"),
        (([tf.zeros([1, 2, 3, 4])], []), ValueError, "got 1 and 0"),
        (([tf.zeros([1, 2, 3, 4])], [tf.zeros([1, 2, 2])]), ValueError, "log_weights.0. must have"),
        (
            ([tf.zeros([1, 2, 3, 4])], [tf.zeros([1, 2, 3], tf.float64)]),
            TypeError,
            "log_weights.0. must be float32 for outputs of float32, got float64",
        ),
        (
            ([tf.zeros([1, 2, 3, 4]), tf.zeros([1, 2, 3, 5])], [tf.zeros([1, 2, 3])] * 2),
            ValueError,
            "outputs.1. must have the E of outputs.0.",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_refused(lists, error, message):
    with pytest.raises(error, match=message):
        merge_outputs(*lists)


def test_xla_compiles_calls_and_streams():
    x = {n: tf.constant(a, tf.float32) for n, a in random_tensors(L=150).items()}

    @tf.function(jit_compile=True, autograph=False)
    def call(x, state):
        return favor_attention(
            **x, causal=True, exact_window=W, initial_state=state, return_state=True
        )

    state = empty_state(B, G, M, E, exact_window=W, key_dim=D)
    expected, after = favor_attention(
        **x, causal=True, exact_window=W, initial_state=state, return_state=True
    )
    out, compiled_after = call(x, state)
    assert_close(out, expected, rms=1e-5)
    out, _ = call(x, compiled_after)
    again = favor_attention(**x, causal=True, exact_window=W, initial_state=after)
    assert_close(out, again, rms=1e-5)
