"""The TensorFlow implementations as compiled functions."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf

from performer import loader, ops
from performer.bench.cases import Case
from performer.bench.implementations import composition
from performer.bench.implementations.catalogue import IMPLEMENTATIONS


def prepare(threads: int) -> None:
    """Fixes the number of threads, before anything is computed."""
    if tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def missing(impl: str) -> str:
    """Why an implementation cannot take part, or ""."""
    if impl == "performer" and loader.ops() is None:
        return "the compiled operators are missing"
    return ""


def tensors(inputs: dict[str, np.ndarray]) -> dict:
    """The inputs as tensors."""
    return {name: tf.constant(x) for name, x in inputs.items()}


def call(impl: str, case: Case, inputs: dict):
    """A function without arguments that computes the results on `tensors` and waits for them."""
    run = _function(impl, case.causal, case.backward, case.window)
    arguments = [inputs[n] for n in ("query", "key", "value", "projection", "grad_out")]

    def call():
        results = run(*arguments)
        for x in results.values():
            x.numpy()  # waits; on the CPU it does not copy
        return results

    return call


def arrays(results: dict) -> dict[str, np.ndarray]:
    """Results as arrays: out [B, L, H, D], and gradients by the name of their input."""
    return {name: x.numpy() for name, x in results.items()}


def matrix_product(size: int):
    """A function without arguments that multiplies two float32 matrices [size, size]."""
    a, b = (tf.random.stateless_normal([size, size], [0, seed]) for seed in (0, 1))
    product = tf.function(tf.matmul, autograph=False)
    return lambda: product(a, b).numpy()


def _attention(impl, causal, window):
    if impl == "performer":
        return functools.partial(ops.favor_attention, causal=causal, exact_window=window)
    if impl.startswith("exact"):
        return lambda query, key, value, projection: keras.ops.dot_product_attention(
            query, key, value, scale=query.shape[-1] ** -0.5, is_causal=causal
        )
    form = composition.stabilised if impl.startswith("stabilised") else composition.textbook
    return functools.partial(form, causal=causal)


@functools.cache
def _function(impl, causal, backward, window):
    attention = _attention(impl, causal, window)

    def forward(query, key, value, projection, grad_out):
        return {"out": attention(query, key, value, projection)}

    def forward_and_backward(query, key, value, projection, grad_out):
        inputs = {"query": query, "key": key, "value": value, "projection": projection}
        if IMPLEMENTATIONS[impl].exact:
            del inputs["projection"]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = attention(query, key, value, projection)
        return {"out": out, **tape.gradient(out, inputs, output_gradients=grad_out)}

    return tf.function(
        forward_and_backward if backward else forward,
        autograph=False,
        jit_compile=IMPLEMENTATIONS[impl].xla or None,
    )
