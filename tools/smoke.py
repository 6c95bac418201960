"""Checks an installed package: the compiled op is there, and agrees with the plain composition."""

from __future__ import annotations

import sys

import numpy as np

import performer
from performer import loader


def main() -> int:
    """Returns 0 where the op runs and is right."""
    found = loader.status()
    print(f"performer {performer.__version__}, TensorFlow {found.running}, ops {found.state}")
    if loader.ops() is None:
        return 1
    if not gpu_kernels_are_there():
        return 1

    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(2, 100, 4, 16)).astype("float32") for _ in range(3))
    projection = random.normal(size=(1, 64, 16)).astype("float32")
    plain = composition(query, key, value, projection)
    worst = 0.0
    for causal, want in zip((False, True), plain, strict=True):
        got = performer.favor_attention(query, key, value, projection[0], causal=causal)
        worst = max(worst, float(np.max(np.abs(got - want))))
        if loader.xla_status().state == "loaded":
            same = np.array_equal(compiled(query, key, value, projection[0], causal), got)
            print(f"compiled by XLA: {'the same bits' if same else 'OTHER BITS'}")
            worst = worst if same else np.inf
        else:
            print(loader.xla_status().message)
    print(f"largest difference from the composition: {worst:.1e}")
    return 0 if worst < 1e-4 else 1


def compiled(query, key, value, projection, causal):
    """Returns attention, [B, L, H, E], compiled by XLA."""
    import tensorflow as tf

    attend = tf.function(performer.favor_attention, jit_compile=True)
    return attend(query, key, value, projection, causal=causal)


def gpu_kernels_are_there() -> bool:
    """Tells whether the ops have kernels for a GPU exactly if the build says that they have."""
    from tensorflow.python.framework import kernels

    from performer import _build_info

    built = bool(_build_info.CUDA_COMPILER)
    registered = kernels.get_registered_kernels_for_op("Performer>Causal").kernel
    print(f"GPU kernels: {_build_info.CUDA_COMPILER or _build_info.CUDA_LEFT_OUT}")
    return built == any(kernel.device_type == "GPU" for kernel in registered)


def composition(query, key, value, projection):
    """Returns bidirectional and causal attention, [B, L, H, E] each, in plain TensorFlow."""
    import tensorflow as tf

    from performer import composition

    query, key, value, projection = map(tf.constant, (query, key, value, projection))
    heads, features = query.shape[2], projection.shape[1]
    key_side = {"key": key, "value": value, "key_projection": projection}
    key_side["key_bias"] = tf.zeros((1, 1, 1))
    query_side = {"query": query, "query_projection": projection}
    query_side["feature_bias"] = tf.zeros((1, features))
    log_mass, mean = composition.summarize(**key_side)
    both = composition.read(**query_side, log_mass=log_mass, mean=mean)
    causal = composition.causal(
        **query_side,
        **key_side,
        initial_log_mass=tf.fill((1, heads, features), -np.inf),
        initial_mean=tf.zeros((1, heads, features, value.shape[3])),
    )
    return both, causal[0]


if __name__ == "__main__":
    sys.exit(main())
