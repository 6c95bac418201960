"""Attention under XLA: the fused kernels, the same bits as without it."""

import numpy as np
import pytest
import tensorflow as tf

from kit.raw_ops import needs_library
from performer import favor_attention, library

pytestmark = [
    needs_library,
    pytest.mark.skipif(
        library.xla_status().state != "loaded", reason=library.xla_status().message or "loaded"
    ),
]


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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_attention_and_gradients_are_the_same_bits(dtype, causal):
    def attend(query, key, value, projection):
        inputs = [query, key, value, projection]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = favor_attention(*inputs, causal=causal)
        return out, tape.gradient(out, inputs)

    query = normal(2, 70, 4, 8, dtype=dtype)
    key, value = (normal(2, 70, 2, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    assert_same_bits(attend, query, key, value, normal(24, 8, seed=3))
