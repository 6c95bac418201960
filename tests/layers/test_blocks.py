"""Encoder and decoder blocks: what they compute, their masks, their state, saving."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import performer
from performer import PerformerDecoder, PerformerEncoder, RotaryEmbedding
from support.compare import assert_close, assert_same_bits

WORST = 5e-5  # of a block's outputs, which are of order 1


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def make(kind, **options):
    return kind(
        **{
            "intermediate_dim": 32,
            "num_heads": 4,
            "supports": 16,
            "seed": 3,
            "bias_initializer": "random_normal",
            **options,
        }
    )


def normalized(x, layer):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.epsilon)
    return x * layer.gamma.numpy() + layer.beta.numpy()


@pytest.mark.parametrize("first", [False, True], ids=["post-norm", "pre-norm"])
def test_a_block_is_attention_and_feed_forward_with_residuals(first):
    """Written out in NumPy, but for the attention layers, which have tests of their own."""
    block = make(PerformerDecoder, normalize_first=first, layer_norm_epsilon=1e-3)
    x, encoded = normal(2, 7, 16), normal(2, 5, 12, seed=1)
    output = block(x, encoded)

    def residual(x, norm, branch):
        if first:
            return x + np.asarray(branch(normalized(x, norm)))
        return normalized(x + np.asarray(branch(x)), norm)

    def feed_forward(y):
        inner, outer = (
            block._feedforward_intermediate_dense,
            block._feedforward_output_dense,
        )
        y = np.maximum(y @ inner.kernel.numpy() + inner.bias.numpy(), 0)
        return y @ outer.kernel.numpy() + outer.bias.numpy()

    attend, cross = block._self_attention_layer, block._cross_attention_layer
    expected = residual(
        x, block._self_attention_layer_norm, lambda y: attend(y, y, use_causal_mask=True)
    )
    expected = residual(expected, block._cross_attention_layer_norm, lambda y: cross(y, encoded))
    expected = residual(expected, block._feedforward_layer_norm, feed_forward)
    assert_close(output, expected, worst=WORST)


def test_weights_are_named_as_in_keras_hub():
    encoder, decoder = make(PerformerEncoder), make(PerformerDecoder)
    encoder(normal(1, 4, 16)), decoder(normal(1, 4, 16), normal(1, 3, 16))
    heads = [f"{head}/{x}" for head in ("query", "key", "value", "attention_output") for x in "kb"]

    def attention(name):
        return [f"{name}/{w.replace('/k', '/kernel').replace('/b', '/bias')}" for w in heads]

    def norm(name):
        return [f"{name}_layer_norm/{weight}" for weight in ("gamma", "beta")]

    dense = [
        f"feedforward_{name}_dense/{weight}"
        for name in ("intermediate", "output")
        for weight in ("kernel", "bias")
    ]
    for block, expected in (
        (
            encoder,
            [
                *attention("self_attention_layer"),
                *norm("self_attention"),
                *norm("feedforward"),
                *dense,
            ],
        ),
        (
            decoder,
            [
                *attention("self_attention"),
                *norm("self_attention"),
                *attention("cross_attention"),
                *norm("cross_attention"),
                *dense,
                *norm("feedforward"),
            ],
        ),
    ):
        names = [w.path.split("/", 1)[1] for w in block.trainable_weights]
        assert names == expected


@pytest.mark.parametrize("attached", [False, True])
def test_padding_is_as_if_it_were_not_there(attached):
    x, encoded = normal(2, 7, 16), normal(2, 5, 16, seed=1)
    there, encoded_there = np.arange(7) < [[7], [4]], np.arange(5) < [[2], [5]]
    masks = {
        "decoder_padding_mask": tf.constant(there),
        "encoder_padding_mask": tf.constant(encoded_there),
    }
    garbage = tf.constant(np.where(there[..., None], x, np.nan))
    other = tf.constant(np.where(encoded_there[..., None], encoded, np.nan))
    if attached:
        garbage._keras_mask, other._keras_mask = masks.values()
        masks = {}
    encoder, decoder = make(PerformerEncoder), make(PerformerDecoder)
    decoded = decoder(garbage, other, **masks).numpy()
    encoded_x = encoder(garbage, **({} if attached else {"padding_mask": there})).numpy()
    assert_close(encoded_x[1:, :4], encoder(x[1:, :4]), worst=WORST)
    assert_close(decoded[1:, :4], decoder(x[1:, :4], encoded[1:]), worst=WORST)
    assert_close(decoded[:1], decoder(x[:1], encoded[:1, :2]), worst=WORST)


@pytest.mark.parametrize("there", ["0011111", "1100111", "0101101", "1111000"])
def test_delayed_keys_pass_over_padding(there):
    there = np.array([[c == "1" for c in there], [True] * 7])
    x = normal(2, 7, 16)
    garbage = tf.constant(np.where(there[..., None], x, np.nan))
    block = make(PerformerDecoder, delay_keys=True)
    mask = {"decoder_padding_mask": there}
    output, state = block(garbage, return_state=True, **mask)
    kept = x[:1, there[0]]
    expected, state_of_kept = block(kept, return_state=True)
    assert_close(output.numpy()[:1, there[0]], expected, worst=WORST)
    assert_close(output[1:], block(x[1:]), worst=WORST)
    # And so in parts, wherever they end.
    assert_close(state["last"][:1], state_of_kept["last"], worst=WORST)
    for cut in range(1, 7):
        state, parts = None, []
        for part in (slice(0, cut), slice(cut, 7)):
            y, state = block(
                garbage[:, part],
                initial_state=state,
                return_state=True,
                decoder_padding_mask=there[:, part],
            )
            parts.append(y)
        whole = tf.concat(parts, 1).numpy()
        assert_close(whole[there], output.numpy()[there], worst=WORST)


def test_delayed_keys_of_packed_sequences_pass_over_padding():
    x, there = normal(1, 8, 16), np.array([[1, 1, 0, 1, 0, 1, 0, 1]], bool)
    block = make(PerformerDecoder, delay_keys=True)
    garbage = tf.constant(np.where(there[..., None], x, np.nan))
    ids = [[7, 7, 7, 7, 8, 8, 8, 8]]
    output = block(garbage, segment_ids=ids, decoder_padding_mask=there).numpy()
    for part in (slice(0, 4), slice(4, 8)):
        alone = block(garbage[:, part], decoder_padding_mask=there[:, part]).numpy()
        assert_close(output[:, part][there[:, part]], alone[there[:, part]], worst=WORST)


def test_states_have_the_type_of_the_sums():
    for dtype, expected in (("float64", tf.float64), ("mixed_bfloat16", tf.float32)):
        block = make(PerformerDecoder, delay_keys=True, dtype=dtype)
        x = tf.cast(normal(1, 6, 16), block.compute_dtype)
        _, state = block(x, return_state=True)
        types = {t.dtype for t in tf.nest.flatten((state, block.get_initial_state(1)))}
        assert types == {expected, tf.int64}
    block, x = make(PerformerDecoder, delay_keys=True, dtype="float64"), tf.cast(x, tf.float64)
    first, state = block(x[:, :3], return_state=True)
    parts = tf.concat([first, block(x[:, 3:], initial_state=state)], 1)
    np.testing.assert_allclose(parts, block(x), rtol=1e-12, atol=1e-13)


def test_sublayers_of_one_seed_drop_different_entries():
    block = make(PerformerDecoder, dropout=0.5, seed=3)
    x = tf.ones([1, 40, 16])
    block(x, x)
    drops = (
        block._self_attention_dropout, block._cross_attention_dropout, block._feedforward_dropout,
    )  # fmt: skip
    kept = {(drop(x, training=True).numpy() != 0).tobytes() for drop in drops}
    assert len(kept) == 3
    again = make(PerformerDecoder, dropout=0.5, seed=3)
    assert again(x, x, training=True).shape == x.shape


def test_masks_of_pairs_and_scores():
    x = normal(2, 6, 16)
    block = make(PerformerEncoder)
    causal = np.tri(6, dtype=bool)[None]
    decoder = make(PerformerDecoder)
    whole = decoder(x)
    decoder_mask = decoder(x, decoder_attention_mask=causal, use_causal_mask=False)
    assert_close(decoder_mask, whole, worst=WORST)
    output, scores = block(x, attention_mask=causal, return_attention_scores=True)
    assert scores.shape == (2, 4, 6, 6)
    assert not np.triu(scores, 1).any()
    assert_close(np.sum(scores, -1), np.ones((2, 4, 6)), worst=1e-5)
    assert_close(output, block(x, attention_mask=causal), worst=WORST)


def test_causal_is_the_default_of_the_decoder_only():
    x = normal(1, 6, 16)
    changed = np.concatenate([x[:, :4], normal(1, 2, 16, seed=1)], 1)
    decoder, encoder = make(PerformerDecoder), make(PerformerEncoder)
    assert_same_bits(decoder(x)[:, :4], decoder(changed)[:, :4])
    for both in (encoder, lambda x: decoder(x, use_causal_mask=False)):
        assert np.abs(both(x)[:, :4] - both(changed)[:, :4]).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"rotary_embedding": RotaryEmbedding()}])
def test_packed_sequences_are_separate_ones(options):
    x = normal(1, 9, 16)
    ids = np.array([[0] * 4 + [1] * 5])
    for block in (
        make(PerformerEncoder, **options),
        make(PerformerDecoder, delay_keys=True, **options),
    ):
        packed = block(x, segment_ids=ids)
        assert_close(packed[:, :4], block(x[:, :4]), worst=WORST)
        assert_close(packed[:, 4:], block(x[:, 4:]), worst=WORST)


VARIANTS = {
    "plain": {},
    "pre-norm": {"normalize_first": True},
    "rotary": {"rotary_embedding": RotaryEmbedding()},
    "delayed keys": {"delay_keys": True, "normalize_first": True},
    "grouped": {"attention_options": {"num_key_value_heads": 2}},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("cross", [False, True], ids=["alone", "with an encoder"])
def test_the_decoder_streams(options, cross):
    block = make(PerformerDecoder, **options)
    x, encoded = normal(2, 30, 16), normal(2, 9, 12, seed=1)
    there = np.arange(9) < [[9], [4]]
    given = {"encoder_sequence": encoded, "encoder_padding_mask": there} if cross else {}
    whole = block(x, **given)
    state, outputs = block.get_initial_state(2, **given), []
    for part in np.split(x, [1, 2, 17, 18], axis=1):
        output, state = block(part, initial_state=state, return_state=True)
        outputs.append(output)
    assert_close(np.concatenate(outputs, 1), whole, worst=WORST)
    first, later = block(x[:, :8], return_state=True, **given)  # the encoder comes with the call
    second = block(x[:, 8:], initial_state=later)
    assert_close(np.concatenate([first, second], 1), whole, worst=WORST)
    tf.nest.assert_same_structure(later, state)
    for tensor in tf.nest.flatten(state):
        assert tensor.dtype in (tf.float32, tf.int64)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_states_stay_float32_under_mixed_precision(policy):
    block = make(PerformerDecoder, dtype=policy, delay_keys=True)
    x, encoded = normal(2, 12, 16), normal(2, 9, 16, seed=1)
    whole = block(x, encoded)
    assert whole.dtype == block.compute_dtype
    first, state = block(x[:, :5], encoded, return_state=True)
    second = block(x[:, 5:], initial_state=state)
    for tensor in tf.nest.flatten(state):
        assert tensor.dtype in (tf.float32, tf.int64)
    assert_close(tf.concat([first, second], 1), whole, rms=0.03)


def test_keys_are_one_position_late():
    block = make(PerformerDecoder, delay_keys=True)
    x = normal(1, 6, 16)
    block(x)
    attend = block._self_attention_layer
    late = np.concatenate([np.zeros((1, 1, 16), "float32"), x[:, :-1]], 1)
    expected = attend(x, x, key=late, use_causal_mask=True)
    block._self_attention_layer_norm.gamma.assign(np.zeros(16))
    seen = []
    block._self_attention_dropout.call = lambda y, training=None: seen.append(y) or y
    block(x)
    assert_close(seen[0], expected, worst=WORST)


@pytest.mark.slow
def test_blocks_are_saved_and_trained_further(tmp_path):
    tokens = keras.Input((None,), dtype="int32")
    encoded_tokens = keras.Input((None,), dtype="int32")
    embed = performer.TokenAndPositionEmbedding(30, 20, 16, mask_zero=True)
    options = {
        "dropout": 0.1,
        "activation": "gelu",
        "kernel_regularizer": "l2",
        "attention_options": {
            "feature_map": "relu",
            "kernel_initializer": keras.initializers.RandomNormal(stddev=0.3),
        },
        "rotary_embedding": RotaryEmbedding(100),
    }
    encoded = make(PerformerEncoder, **options)(embed(encoded_tokens))
    decoded = make(PerformerDecoder, delay_keys=True, **options)(embed(tokens), encoded)
    model = keras.Model([encoded_tokens, tokens], keras.layers.Dense(30)(decoded))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).integers(1, 30, (8, 10))
    history = model.fit([x, x], x, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded([x, x]), model([x, x]))
    blocks = [
        [layer.get_config() for layer in m.layers if "performer" in layer.name]
        for m in (loaded, model)
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2
    loaded.run_eagerly = True  # a graph was traced above, and takes its time
    assert np.isfinite(loaded.fit([x, x], x, verbose=0).history["loss"][0])


def test_exact_attention_in_the_same_block():
    block = make(PerformerDecoder, attention_method="quadratic")
    x = normal(1, 6, 16)
    assert block(x).shape == x.shape and block.supports_jit
    with pytest.raises(ValueError, match="`return_state` needs attention_method='linear'"):
        block(x, return_state=True)
    with pytest.raises(ValueError, match="needs a built layer with attention_method='linear'"):
        block.get_initial_state(1)


def test_wrong_arguments_are_refused_at_once():
    with pytest.raises(ValueError, match=r"`supports` must be a positive integer.*supports=0"):
        PerformerEncoder(32, 4, supports=0)
    with pytest.raises(ValueError, match="`scaling` must be one of"):
        PerformerEncoder(32, 4, attention_options={"scaling": 3})
    with pytest.raises(ValueError, match=r"`attention_options` must not hold.*rotary_embedding$"):
        PerformerEncoder(32, 4, attention_options={"rotary_embedding": RotaryEmbedding()})
    with pytest.raises(ValueError, match=r"`num_heads` channels.*num_heads=4.*\(1, 3, 2\)"):
        PerformerEncoder(32, 4)(normal(1, 3, 2))


def test_a_decoder_needs_the_encoder_that_it_was_built_with():
    x, encoded = normal(1, 6, 16), normal(1, 5, 16)
    alone, both = make(PerformerDecoder), make(PerformerDecoder)
    with pytest.raises(ValueError, match="`get_initial_state` needs a built layer"):
        alone.get_initial_state(1)
    alone(x), both(x, encoded)
    for call in (lambda: alone(x, encoded), lambda: alone.get_initial_state(1, encoded)):
        with pytest.raises(ValueError, match="no cross-attention"):
            call()
    for state in (None, both.get_initial_state(1)):
        with pytest.raises(ValueError, match="needs `encoder_sequence`, or the state of one"):
            both(x, initial_state=state)
    state = both.get_initial_state(1, encoded)
    for name, mask in (("padding", [1, 5]), ("attention", [1, 6, 5])):
        with pytest.raises(ValueError, match="need `encoder_sequence`"):
            both(x, initial_state=state, **{f"encoder_{name}_mask": np.zeros(mask, bool)})
    with pytest.raises(ValueError, match="cannot be combined with `encoder_attention_mask`"):
        both(x, encoded, encoder_attention_mask=np.ones((1, 6, 5), bool), return_state=True)


def test_only_a_state_of_the_block_is_taken_for_one():
    block, x = make(PerformerDecoder, delay_keys=True), normal(1, 4, 16)
    _, state = block(x, return_state=True)
    incomplete = {"self_attention": state["self_attention"]}
    for bad in ({}, incomplete, {**state, "more": state["last"]}):
        with pytest.raises(ValueError, match=r"must have the entries \['last', 'self_attention'\]"):
            block(x, initial_state=bad)
    with pytest.raises(TypeError, match=r"`initial_state` must be a dict.*AttentionState"):
        block(x, initial_state=state["self_attention"])
