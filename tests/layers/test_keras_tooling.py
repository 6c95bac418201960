"""Keras's tooling on a Performer layer: its layer test, LoRA, quantization, policies, cloning."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src import testing

import performer
from support.keras_versions import known

X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32")
OPTIONS = {"num_heads": 2, "key_dim": 4, "supports": 16, "seed": 5}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


LAYER_TESTS = {
    "plain": ({}, {"expected_num_trainable_weights": 8, "expected_num_seed_generators": 0}),
    "dropout, no bias": (
        {"dropout": 0.5, "use_bias": False, "value_dim": 3, "redraw_interval": 2},
        {"expected_num_trainable_weights": 4, "expected_num_seed_generators": 1},
    ),
    "grouped": (
        {"num_key_value_heads": 1, "feature_map": "relu"},
        {"expected_num_trainable_weights": 8, "expected_num_seed_generators": 0},
    ),
}


@pytest.mark.parametrize("case", LAYER_TESTS)
def test_layer_test_of_keras(case):
    options, expected = LAYER_TESTS[case]
    testing.TestCase().run_layer_test(
        performer.Performer,
        init_kwargs={**OPTIONS, **options},
        input_shape={"query_shape": (2, 8, 16), "value_shape": (2, 4, 16)},
        expected_output_shape=(2, 8, 16),
        expected_num_non_trainable_weights=5,  # fingerprint, projection, redraws, calls, base_seed
        expected_num_losses=0,
        supports_masking=True,
        run_training_check=False,  # its model calls the layer with a dict
        **expected,
    )


def test_layer_test_of_keras_over_two_axes():
    testing.TestCase().run_layer_test(
        performer.Performer,
        init_kwargs={**OPTIONS, "attention_axes": (2, 3), **known({"use_gate": True})},
        input_shape={"query_shape": (2, 3, 3, 4, 8), "value_shape": (2, 3, 3, 2, 8)},
        expected_output_shape=(2, 3, 3, 4, 8),
        expected_num_non_trainable_weights=5,
        supports_masking=True,
        run_training_check=False,
    )


SHAPES = {
    "value of another length": ((4, 8), (2, 8), None, None),
    "key of other channels": ((4, 8), (2, 8), (2, 3), None),
    "output shape of two axes": ((4, 8), (2, 8), None, (3, 4)),
    "key, and output shape": ((4, 8), (2, 8), (2, 3), (1, 5)),
    "three axes": ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), None),
    "three axes, two of output": ((4, 2, 3, 8), (1, 1, 5, 8), (1, 1, 5, 2), (3, 2)),
    "value of other channels": ((4, 2, 3, 8), (4, 2, 3, 7), (4, 2, 3, 8), None),
}


@pytest.mark.parametrize("case", SHAPES)
def test_output_shape_is_that_of_the_output(case):
    query, value, key, output_shape = SHAPES[case]
    layer = performer.Performer(output_shape=output_shape, **OPTIONS)
    query, value, key = (None if s is None else normal(7, *s) for s in (query, value, key))
    output = layer(query=query, value=value, key=key)
    for sequence in (tuple, list):
        shapes = [None if x is None else sequence(x.shape) for x in (query, value, key)]
        assert output.shape == layer.compute_output_shape(*shapes)


@pytest.mark.parametrize("key", [(2, 1, 7), (2, 3, 8)])
def test_keys_and_values_must_have_one_length(key):
    layer = performer.Performer(**OPTIONS)
    with pytest.raises(ValueError, match="must be equal"):
        layer.compute_output_shape((2, 4, 8), (2, 2, 8), key)
    with pytest.raises(ValueError, match="must be equal"):
        layer(normal(2, 4, 8), normal(2, 2, 8), normal(*key))


def test_sublayers_start_differently():
    layer = performer.Performer(kernel_initializer=keras.initializers.TruncatedNormal(), **OPTIONS)
    layer.build(X.shape, X.shape)
    kernels = [layer.query_dense.kernel, layer.key_dense.kernel, layer.value_dense.kernel]
    for i, one in enumerate(kernels):
        assert all(not np.array_equal(one, other) for other in kernels[:i])


def test_masks_are_used_and_no_warning_is_given():
    ids = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2], [1, 0, 0, 0, 0]])
    values = np.array([[5, 4, 0], [3, 0, 0], [2, 1, 1]])
    layer = performer.Performer(**OPTIONS)
    embedding = keras.layers.Embedding(6, 8, mask_zero=True)
    query, value = embedding(ids), embedding(values)
    for causal in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = layer(query, value, use_causal_mask=causal)
        np.testing.assert_array_equal(output._keras_mask, ids != 0)
        plain = layer(
            tf.identity(query), tf.identity(value), use_causal_mask=causal, value_mask=values != 0,
            query_mask=ids != 0,
        )  # fmt: skip
        np.testing.assert_array_equal(output, plain)


def test_lora(tmp_path):
    layer = performer.Performer(use_bias=False, **OPTIONS)
    x = keras.Input((6, 8))
    model = keras.Model(x, layer(x, x))
    before = model(X).numpy()
    for dense in (layer.query_dense, layer.key_dense, layer.value_dense):
        dense.enable_lora(2)
    assert len(layer.trainable_variables) == 7  # two for each, and the output
    np.testing.assert_array_equal(model(X), before)
    projection = layer.projection.numpy()
    model.compile("sgd", "mse")
    model.fit(X, X, verbose=0)
    assert not np.array_equal(model(X), before)
    np.testing.assert_array_equal(layer.projection, projection)
    model.save(tmp_path / "lora.keras")
    loaded = keras.models.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-6, atol=1e-6)
    # The merged kernels go to a layer without LoRA.
    merged = performer.Performer(use_bias=False, **{**OPTIONS, "seed": 5})
    performer.convert.copy_weights(layer, merged)
    np.testing.assert_allclose(merged(X, X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_int8_quantization(tmp_path):
    layer = performer.Performer(**OPTIONS)
    x = keras.Input((6, 8))
    model = keras.Model(x, layer(x, x))
    before = model(X).numpy()
    model.quantize("int8")
    assert layer.query_dense.kernel.dtype == layer.output_dense.kernel.dtype == "int8"
    assert layer.projection.dtype == "float32"
    after = model(X).numpy()
    assert 0 < np.sqrt(np.mean((after - before) ** 2)) < 0.05 * np.std(before)
    model.save_weights(tmp_path / "int8.weights.h5")
    again = keras.models.clone_model(model)
    again.quantize("int8")
    again.load_weights(tmp_path / "int8.weights.h5")
    np.testing.assert_array_equal(again(X), after)
    with pytest.raises(ValueError, match=r"quantized.*'query' in 'int8'"):
        performer.convert.copy_weights(layer, performer.Performer(**OPTIONS))


def test_policies_of_sublayers():
    policies = keras.dtype_policies.DTypePolicyMap()
    policies["attention/query"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    policies["attention/value"] = keras.dtype_policies.DTypePolicy("bfloat16")
    layer = performer.Performer(dtype=policies, name="attention", **OPTIONS)
    layer.build(X.shape, X.shape)
    assert layer.query_dense.compute_dtype == "bfloat16"
    assert layer.query_dense.variable_dtype == layer.key_dense.compute_dtype == "float32"
    assert layer.value_dense.variable_dtype == "bfloat16"
    assert layer.projection.dtype == "float32"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"])
def test_narrow_policies_in_every_form(policy):
    plain, layer = (performer.Performer(dtype=d, **OPTIONS) for d in ("float32", policy))
    plain.build(X.shape, X.shape)
    performer.convert.copy_weights(plain, layer)
    mask = np.tri(6, dtype=bool)
    for call in (
        {"use_causal_mask": True},
        {"attention_mask": mask},
        {"return_attention_scores": True},
        {"segment_ids": np.array([[1, 1, 1, 2, 2, 2]] * 2)},
        {"use_causal_mask": True, "prefix_mask": mask[:2]},
    ):
        pairs = zip(
            tf.nest.flatten(layer(X, X, **call)), tf.nest.flatten(plain(X, X, **call)), strict=True
        )
        for one, other in pairs:
            assert one.dtype == layer.compute_dtype
            error = np.sqrt(np.mean((tf.cast(one, "float32") - other) ** 2))
            assert error < (0.02 if "bf" in policy else 0.004) * np.sqrt(np.mean(other**2))
    assert layer.projection.dtype == "float32"


@pytest.mark.parametrize("method", ["linear", "quadratic"])
def test_clone_has_the_same_arguments_and_its_own_weights(method):
    x = keras.Input((6, 8))
    layer = performer.Performer(attention_method=method, num_key_value_heads=1, **OPTIONS)
    model = keras.Model(x, layer(x, x, use_causal_mask=True))
    clone = keras.models.clone_model(model)
    assert clone.layers[-1].get_config() == layer.get_config()
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(clone(X), model(X))
