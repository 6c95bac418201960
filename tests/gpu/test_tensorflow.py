"""End to end inside TensorFlow on a GPU: op, gradient and layer on /GPU:0 against /CPU:0.

    PERFORMER_REQUIRE_GPU=1 python -m pytest tests/gpu/test_tensorflow.py

Needs TensorFlow with a GPU and the ops built with the GPU kernels.
"""

import os
from functools import partial

import numpy as np
import pytest
import tensorflow as tf

from performer import favor_attention, loader, orthogonal_projection
from performer.features.tolerances import tolerances
from performer.layers import Performer
from support import operator_calls
from support.cases import GPU_CASES, cases, gpu_dtypes
from support.compare import assert_close, assert_same_bits
from support.inputs import cotangents, forms, make


def why_not() -> str:
    """Why TensorFlow cannot run the kernels here, or ""."""
    if loader.ops() is None:
        return f"the ops are not loaded: {loader.status().message}"
    if not tf.config.list_physical_devices("GPU"):
        return f"TensorFlow {tf.__version__} sees no GPU"
    if not operator_calls.has_gpu_kernel("Summarize"):
        return "the ops are built without the GPU kernels"
    return ""


if os.environ.get("PERFORMER_REQUIRE_GPU") and why_not():
    raise RuntimeError(why_not())
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a GPU")

DTYPES = ["float32", "bfloat16", "float16"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
NAMES = [
    "less than a chunk, holes, a projection for each head",
    "packed, with empty sequences",
    "narrow, 256 features",
    "wide, two blocks of features",
]


def case_named(name, causal):
    return {**cases(causal), **GPU_CASES}[name]


def on(device, op, x, **options):
    """Skips the test where the GPU has no room for heads of this width."""
    try:
        with tf.device(device):
            return operator_calls.call(op, x, **options)
    except tf.errors.FailedPreconditionError as error:
        if "heads of this width" in error.message:
            pytest.skip(error.message)
        raise


def assert_near(actual, expected, rms, what):
    assert "GPU:0" in actual.device
    assert "CPU:0" in expected.device
    wide = [tf.cast(x, tf.float64).numpy() for x in (actual, expected)]
    assert_close(*wide, rms=rms, what=what)


@forms
@dtypes
@pytest.mark.parametrize("name", NAMES)
def test_every_op_agrees_with_the_cpu(name, dtype, causal):
    case = case_named(name, causal)
    if dtype not in gpu_dtypes(case):
        pytest.skip("no kernel takes heads of this width in float32")
    bound = tolerances(dtype, causal=causal)
    x = {**make(case, dtype), **cotangents(case, dtype)}
    ops = ("Causal", "CausalGrad") if causal else ("Summarize", "Read", "ReadGrad", "SummarizeGrad")
    for op in ops:
        cpu, gpu = (on(device, op, x, **case.options) for device in ("/CPU:0", "/GPU:0"))
        for output, result in gpu.items():
            rms = 2 * (bound.gradient_rms if op.endswith("Grad") else bound.rms)
            assert_near(result, cpu[output], rms, f"{op}: {output}")
        x.update({n: t.numpy() for n, t in cpu.items() if not n.startswith("grad_")})


def attend(device, causal, dtype, function=lambda f: f):
    rng = np.random.default_rng(0)
    with tf.device(device):
        query, key, value, weight = (
            tf.cast(rng.normal(size=(2, 300, 4, 64)), dtype) for _ in range(4)
        )
        projection = tf.constant(orthogonal_projection(128, 64, seed=1))

        @function
        def loss_and_gradients():
            with tf.GradientTape() as tape:
                inputs = [query, key, value, projection]
                tape.watch(inputs)
                out = favor_attention(query, key, value, projection, causal=causal)
                loss = tf.reduce_sum(out * weight)
            return out, tape.gradient(loss, inputs)

        return loss_and_gradients()


@forms
@dtypes
@pytest.mark.parametrize(
    "function",
    [lambda f: f, tf.function, partial(tf.function, jit_compile=True)],
    ids=["eager", "tf.function", "jit_compile"],
)
def test_gradients_agree_with_the_cpu(causal, dtype, function):
    rms = 2 * tolerances(dtype, causal=causal).gradient_rms
    out, gradients = attend("/GPU:0", causal, dtype, function)
    wanted, expected = attend("/CPU:0", causal, dtype)
    assert_near(out, wanted, rms, "out")
    for name, x, y in zip(
        ["query", "key", "value", "projection"], gradients, expected, strict=True
    ):
        assert_near(x, y, rms, name)


@forms
def test_runs_give_the_same_bits(causal):
    first = attend("/GPU:0", causal, "bfloat16")
    for _ in range(20):
        again = attend("/GPU:0", causal, "bfloat16")
        assert_same_bits(tf.cast(again[0], tf.float32), tf.cast(first[0], tf.float32))
        for x, y in zip(again[1], first[1], strict=True):
            assert_same_bits(tf.cast(x, tf.float32), tf.cast(y, tf.float32))


@forms
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_the_layer_agrees_with_the_cpu_and_trains(causal, policy):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 200, 64)).astype(np.float32)
    with tf.device("/CPU:0"):
        layer = Performer(num_heads=4, key_dim=64, supports=128, seed=1, dtype=policy)
        wanted = layer(x, x, use_causal_mask=causal)
    weights = layer.get_weights()
    with tf.device("/GPU:0"):
        same = Performer(num_heads=4, key_dim=64, supports=128, seed=1, dtype=policy)
        same(x, x)
        same.set_weights(weights)
        out = same(x, x, use_causal_mask=causal)
        before = same.get_weights()
        optimizer = tf.keras.optimizers.Adam(1e-3)
        losses = []
        for _ in range(5):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(tf.cast(same(x, x), tf.float32) - x))
            gradients = tape.gradient(loss, same.trainable_variables)
            optimizer.apply_gradients(zip(gradients, same.trainable_variables, strict=True))
            losses.append(float(loss))
    assert_near(out, wanted, 2e-2 if policy.startswith("mixed") else 1e-4, "the layer's output")
    assert losses[-1] < losses[0]
    assert any(np.any(a != b) for a, b in zip(before, same.get_weights(), strict=True))


def test_float64_runs_on_the_cpu():
    tf.config.set_soft_device_placement(True)
    case = case_named("narrow, 256 features", False)
    assert "CPU:0" in operator_calls.call("Summarize", make(case, "float64"))["mean"].device


def test_what_the_gpu_does_not_take_is_refused_and_the_next_call_works():
    case = case_named("narrow, 256 features", False)
    x = make(case)
    wide = {**x, "key": np.zeros((1, 130, 1, 129), np.float32)}
    wide["key_projection"] = np.zeros((1, 256, 129), np.float32)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"key dimension D .*129"):
        on("/GPU:0", "Summarize", wide)
    offsets = {**x, "offsets": np.array([0, 70, 60, 130])}
    with pytest.raises(tf.errors.InvalidArgumentError, match="offsets"):
        on("/GPU:0", "Summarize", offsets, packed=True)
    assert "GPU:0" in on("/GPU:0", "Summarize", x)["mean"].device
