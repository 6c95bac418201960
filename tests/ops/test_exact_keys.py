"""`exact_keys`: the keys that are chosen, their attention beside that to the others, gradients."""

import numpy as np
import pytest
import tensorflow as tf

from performer import reference
from performer.ops import favor_attention
from performer.ops.dense import dense_attention
from performer.ops.state import ANY_DRAW
from support.attention_inputs import B, D, G, H, M, random_state, random_tensors
from support.compare import assert_close

L = 20


def expected(x, count, bias, state=None, window=None):
    """The definition, with all weights."""
    out = np.zeros((*x["query"].shape[:3], x["value"].shape[-1]))
    options, w = reference.FeatureMap(), x["projection"]
    for b, g in np.ndindex(B, G):
        heads = range(g * (H // G), (g + 1) * (H // G))
        k, v, beta = x["key"][b, :, g], x["value"][b, :, g], bias[b, g]
        k, v = reference.load(k, v, beta)
        queries = np.concatenate([x["query"][b, :, h] for h in heads]) * D**-0.25
        small = k * D**-0.25
        covariance = np.cov(queries.T, bias=True)
        score = small @ queries.mean(0) + np.sum((small @ covariance) * small, -1) / 2 + beta
        exact = np.zeros(len(k), bool)
        exact[np.argsort(-score)[:count]] = True
        near = np.broadcast_to(exact, (x["query"].shape[1], len(k)))
        if window:
            blocks = np.arange(len(k)) // window
            near = near | (np.abs(blocks[:, None] - blocks) <= 1)
        for h in heads:
            q = x["query"][b, :, h]
            a = reference.log_features(q, w, -np.log(M), options, norm=True)
            far = reference.key_log_features(k, w, beta, options)
            logs = reference.logsumexp(a[:, None] + far[None], -1)
            logs = np.where(near, q @ k.T * D**-0.5 + beta, logs)
            values = v
            if state is not None:
                logs = np.concatenate([logs, a + state.log_mass[b, g]], 1)
                values = np.concatenate([v, state.mean[b, g]])
            out[b, :, h] = reference.softmax(logs, -1) @ values
    return out


@pytest.mark.parametrize("count", [1, 5, L + 3])
@pytest.mark.parametrize("window", [None, 64])
def test_heavy_keys_are_exact_and_all_others_as_they_were(count, window):
    rows = L if window is None else 150
    x, rng = random_tensors(L=rows), np.random.default_rng(1)
    mask = rng.random((B, rows)) > 0.3
    x["key"][~mask], x["value"][~mask] = np.nan, np.nan
    bias = np.where(mask[:, None], rng.normal(size=(B, G, rows)), -np.inf)
    for state in (None, random_state(ANY_DRAW)):
        call = {**x, "key_bias": bias, "exact_window": window, "exact_keys": count}
        out = favor_attention(**call, initial_state=state)
        assert_close(out, expected(x, count, bias, state, window), worst=1e-12)
    assert_close(dense_attention(**call)[0], expected(x, count, bias, None, window), worst=1e-12)


def test_all_keys_exact_are_softmax_attention():
    x = random_tensors(L=L, S=30, H=G)
    out, weight = favor_attention(**x, exact_keys=30, return_log_weight=True)
    logits = np.einsum("blhd,bshd->bhls", x["query"], x["key"]) * D**-0.5
    exact = np.einsum("bhls,bshe->blhe", reference.softmax(logits, -1), x["value"])
    assert_close(out, exact, worst=1e-12)
    assert_close(np.transpose(weight, (0, 2, 1)), reference.logsumexp(logits, -1), worst=1e-12)


def test_gradients_are_those_of_finite_differences_to_the_second_order():
    x, rng = random_tensors(L=L), np.random.default_rng(2)
    directions = [rng.normal(size=a.shape) for a in x.values()]
    weights = tf.constant(rng.normal(size=x["query"].shape[:3]))

    def loss(step):
        moved = [tf.constant(a) + step * d for a, d in zip(x.values(), directions, strict=True)]
        out, weight = favor_attention(*moved, exact_keys=3, return_log_weight=True)
        return tf.reduce_sum(weights * weight) + tf.reduce_sum(tf.sin(out) * weights[..., None])

    step, small = tf.constant(0.0, tf.float64), 1e-6
    with tf.GradientTape() as outer:
        outer.watch(step)
        with tf.GradientTape() as inner:
            inner.watch(step)
            y = loss(step)
        first = inner.gradient(y, step)
    numeric = (loss(small) - loss(-small)) / (2 * small)
    assert abs(float(first / numeric) - 1) < 1e-6
    numeric = (loss(1e-4) - 2 * y + loss(-1e-4)) / 1e-8
    assert abs(float(outer.gradient(first, step) / numeric) - 1) < 1e-4


def test_xla_and_unknown_shapes_give_the_same():
    x = {n: tf.constant(a, tf.float32) for n, a in random_tensors(L=L).items()}
    eager = favor_attention(**x, exact_keys=4)

    def call(query, key, value):
        return favor_attention(query, key, value, x["projection"], exact_keys=4)

    arguments = [x[name] for name in ("query", "key", "value")]
    assert_close(tf.function(call, jit_compile=True, autograph=False)(*arguments), eager, rms=1e-5)
    spec = [tf.TensorSpec([None, None, *a.shape[2:]]) for a in arguments]
    unknown = tf.function(call, input_signature=spec, autograph=False)(*arguments)
    assert_close(unknown, eager, rms=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact_keys": 0}, "exact_keys must be an integer of at least 1, got 0"),
        ({"exact_keys": 2, "causal": True}, "exact_keys needs causal=False.* Got causal=True"),
        ({"exact_keys": 2, "return_state": True}, "return_state=True"),
        ({"exact_keys": 2, "segment_ids": np.zeros((B, L), int)}, "segment_ids given"),
        ({"exact_keys": 2, "feature_map": "elu"}, "nothing to make exact"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        favor_attention(**random_tensors(L=L), **options)
