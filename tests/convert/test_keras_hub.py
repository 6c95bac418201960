"""Small backbones of keras-hub, of random weights, become linear, are calibrated and distilled."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from performer import convert

pytestmark = pytest.mark.slow
WORDS, LENGTH = 50, 96
PADDING = (np.arange(LENGTH) < np.arange(36, 100, 4)[:, None]).astype("int32")
TOKENS = np.random.default_rng(0).integers(0, WORDS, [16, LENGTH]).astype("int32")
SIZES = {"vocabulary_size": WORDS, "num_layers": 2, "intermediate_dim": 32}
SHORT = {"max_sequence_length": LENGTH, "dropout": 0.0, "num_heads": 2, "hidden_dim": 16}
LLAMA = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 32}
KINDS = {
    "BertBackbone": SHORT,
    "RobertaBackbone": SHORT,
    "DistilBertBackbone": SHORT,
    "GPT2Backbone": SHORT,
    "LlamaBackbone": LLAMA,
    "Llama3Backbone": LLAMA,
}
DECODERS = ["GPT2Backbone", "LlamaBackbone", "Llama3Backbone"]


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip("keras_hub")  # `make slow` installs it


@pytest.fixture(scope="module")
def backbone(hub, tmp_path_factory):
    """A function from the name of a class to a backbone from a folder with weights."""
    made = {}

    def backbone(kind):
        if kind not in made:
            keras.utils.set_random_seed(1)
            model = getattr(hub.models, kind)(**SIZES, **KINDS[kind])
            rng = np.random.default_rng(1)
            for weight in model.trainable_weights:
                if "attention" in weight.path and "kernel" in weight.path:
                    scale = 0.8 * KINDS[kind]["hidden_dim"] ** -0.5
                    weight.assign(rng.normal(scale=scale, size=weight.shape))
            folder = tmp_path_factory.mktemp(kind)
            model.save_to_preset(str(folder))
            made[kind] = hub.models.Backbone.from_preset(str(folder))
            inputs = inputs_of(model)
            np.testing.assert_array_equal(outputs(made[kind], inputs), outputs(model, inputs))
        return made[kind]

    return backbone


def inputs_of(model, rows=16):
    given = {"token_ids": TOKENS, "padding_mask": PADDING, "segment_ids": np.zeros_like(TOKENS)}
    return {name: given[name][:rows] for name in model.input}


def outputs(model, inputs):
    found = model(inputs)
    return np.asarray(found["sequence_output"] if isinstance(found, dict) else found)


def error(one, other):
    """Of positions that exist, relative to the spread of `other`."""
    one, other, exists = np.asarray(one), np.asarray(other), PADDING[: len(one)] != 0
    return np.sqrt(np.mean((one - other)[exists] ** 2)) / np.std(other[exists])


def learned(model, **options):
    return convert.replace_attention(model, supports=16, feature_map="learned", seed=1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_more_features_come_closer_to_the_backbone_and_fits_do_with_a_few(kind, backbone):
    model = backbone(kind)
    inputs = inputs_of(model)
    wanted = outputs(model, inputs)
    few, many = (
        error(outputs(convert.replace_attention(model, supports=m, seed=1), inputs), wanted)
        for m in (16, 4096)
    )
    assert many < 0.4 * few
    calibrated = learned(model)
    report = convert.calibrate(calibrated, inputs)
    assert len({layer.layer for layer in report.layers}) == 2
    for layer in report.layers:
        assert layer.after.shape == (4 if "Llama" in kind else 2,)
        assert np.mean(layer.after) < 0.7 * np.mean(layer.before)
    distilled = learned(model)
    report = convert.distill(distilled, model, inputs, steps=40, verbose=0)
    assert report.outputs["layers"] < 0.8 * report.outputs["as it was"]


@pytest.mark.parametrize("kind", DECODERS)
def test_nothing_sees_a_later_word_or_padding(kind, backbone):
    model = backbone(kind)
    linear = convert.replace_attention(model, supports=16, seed=1)
    inputs = inputs_of(model, 4)
    before = outputs(linear, inputs)
    tokens = inputs["token_ids"]
    later = np.where(np.arange(LENGTH) >= 30, (tokens + 1) % WORDS, tokens)
    after = outputs(linear, {**inputs, "token_ids": later})
    np.testing.assert_array_equal(after[:, :30], before[:, :30])
    assert np.abs(after[:, 30:] - before[:, 30:]).max() > 1e-3
    first = inputs["padding_mask"].copy()
    first[:, :5] = 0
    hidden = np.where(np.arange(LENGTH) < 5, (tokens + 1) % WORDS, tokens)
    one, other = (
        outputs(linear, {"token_ids": t, "padding_mask": first}) for t in (tokens, hidden)
    )
    np.testing.assert_array_equal(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_forms_no_scores_or_masks_of_all_pairs(kind, backbone):
    length = 96 if kind == "GPT2Backbone" else 4096

    def shapes(model):
        spec = tf.TensorSpec([1, length], tf.int32)
        traced = tf.function(lambda t, p: model({"token_ids": t, "padding_mask": p}))
        graph = traced.get_concrete_function(spec, spec).graph
        graphs = [graph, *graph._functions.values()] if hasattr(graph, "_functions") else [graph]
        return [
            tuple(output.shape)
            for g in graphs
            for operation in getattr(g, "get_operations", list)()
            for output in operation.outputs
            if output.shape.rank is not None
        ]

    model = backbone(kind)
    linear = convert.replace_attention(model, supports=16, seed=1)
    assert any(shape.count(length) > 1 for shape in shapes(model))
    assert not any(shape.count(length) > 1 for shape in shapes(linear))


def test_a_copy_that_is_exact_and_a_window_over_all_keys_do_what_the_backbone_does(backbone):
    model = backbone("GPT2Backbone")
    inputs = inputs_of(model)
    wanted = outputs(model, inputs)
    exact = convert.replace_attention(model, attention_method="quadratic")
    assert error(outputs(exact, inputs), wanted) < 1e-5
    for kind in DECODERS:
        wide = convert.replace_attention(backbone(kind), supports=16, seed=1, exact_window=64)
        assert error(outputs(wide, inputs), outputs(backbone(kind), inputs)) < 1e-5


def test_a_backbone_inside_of_a_model_is_converted_with_it(backbone, tmp_path):
    model = backbone("GPT2Backbone")
    tokens, padding = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    hidden = model({"token_ids": tokens, "padding_mask": padding})
    whole = keras.Model([tokens, padding], keras.layers.Dense(4)(hidden))
    linear = convert.replace_attention(whole, supports=16, seed=1)
    wanted, found = whole([TOKENS, PADDING]), linear([TOKENS, PADDING])
    assert error(found, wanted) > 1e-3
    close = convert.replace_attention(whole, supports=4096, seed=1)
    assert error(close([TOKENS, PADDING]), wanted) < 0.4 * error(found, wanted)
    with pytest.raises(NotImplementedError, match=r"GPT2Backbone.*load them into"):
        linear.save(tmp_path / "model.keras")


def test_a_decoder_with_cross_attention_is_converted(hub):
    keras.utils.set_random_seed(1)
    target, source = keras.Input((None, 16)), keras.Input((None, 16))
    decoder = hub.layers.TransformerDecoder(32, 2, kernel_initializer="random_normal")
    model = keras.Model([target, source], decoder(target, source))
    x = [np.random.default_rng(n).normal(size=[2, 20 + n, 16]).astype("float32") for n in (0, 1)]
    close = convert.replace_attention(model, supports=2**14, seed=1)
    kinds = [type(layer).__name__ for layer in close._flatten_layers()]
    assert kinds.count("Performer") == 2 and "CachedMultiHeadAttention" not in kinds
    assert np.std(close(x) - model(x)) < 0.02 * np.std(model(x))


def test_a_mask_that_differs_from_query_to_query_is_kept(hub):
    initializer = keras.initializers.RandomNormal(stddev=0.1, seed=1)
    x = np.random.default_rng(0).normal(size=[2, 12, 16]).astype("float32")
    mask = (np.random.default_rng(1).uniform(size=[2, 12, 12]) < 0.5) | np.eye(12, dtype=bool)
    decoder = hub.layers.TransformerDecoder(32, 2, kernel_initializer=initializer)
    decoder(x)
    close = convert.replace_attention(decoder, supports=2**14, seed=1)
    wanted = decoder(x, decoder_attention_mask=mask)
    found = close(x, decoder_attention_mask=mask)
    assert np.std(found - wanted) < 0.02 * np.std(wanted)
    assert np.std(found - close(x)) > 10 * np.std(found - wanted)
    both_ways = close(x, use_causal_mask=False)
    assert np.std(both_ways - decoder(x, use_causal_mask=False)) < 0.02 * np.std(wanted)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_cache_of_keys_is_refused_by_name(kind, backbone):
    model = backbone(kind)
    linear = convert.replace_attention(model, supports=16, seed=1)
    cache = np.zeros([2, 2, 12, 2, 8], "float32")
    decoder = next(x for x in linear.layers if "Decoder" in type(x).__name__)
    hidden = np.zeros([2, 1, KINDS[kind]["hidden_dim"]], "float32")
    with pytest.raises(ValueError, match=r"keeps no cache of keys and values.*\(2, 2, 12, 2, 8\)"):
        decoder(hidden, self_attention_cache=cache, self_attention_cache_update_index=0)
