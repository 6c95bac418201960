"""Models that stream, and sampling from them."""

import gc
import os
import signal
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from performer import (
    PerformerDecoder,
    RotaryEmbedding,
    StreamingSequential,
    TokenAndPositionEmbedding,
    generate,
    generation,
)
from performer.generation import _sample
from support.compare import assert_close, assert_same_bits

V = 20


def make(positions="rotary", delay_keys=False, blocks=1, **options):
    keras.utils.set_random_seed(1)
    large = keras.initializers.RandomNormal(stddev=1.0)  # so that tokens differ
    decoder = {"intermediate_dim": 24, "num_heads": 2, "supports": 16, "seed": 1}
    decoder["delay_keys"] = delay_keys
    if positions == "rotary":
        decoder["rotary_embedding"] = RotaryEmbedding()
        embed = keras.layers.Embedding(V, 12, embeddings_initializer=large)
    else:
        embed = TokenAndPositionEmbedding(V, 2000, 12, embeddings_initializer=large)
    blocks = [PerformerDecoder(**decoder) for _ in range(blocks)]
    head = keras.layers.Dense(V, kernel_initializer="random_normal")
    return StreamingSequential([embed, *blocks, keras.layers.Dropout(0.5), head], **options)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape)


@pytest.fixture(scope="module")
def one_block():
    """A model whose graphs the tests share; they leave its weights as they are."""
    return make()


class Cycle:
    """A model whose logits for token t + 1 (mod V) are `margin`, and 0 for others; counts calls."""

    def __init__(self, margin=5.0):
        self.margin = margin

    def get_initial_state(self, batch_size):
        return {"seen": tf.zeros([batch_size], tf.int32)}

    def __call__(self, tokens, initial_state, return_state, training):
        assert return_state and training is False
        logits = self.margin * tf.one_hot((tokens + 1) % V, V)
        return logits, {"seen": initial_state["seen"] + tf.shape(tokens)[1]}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_model_in_parts_is_the_whole_model(positions):
    model, x = make(positions, blocks=2), tokens(2, 40)
    whole = model(x)
    state, parts = model.get_initial_state(2), []
    for part in np.split(x, [1, 2, 30], axis=1):
        part, state = model(part, initial_state=state, return_state=True)
        parts.append(part)
    assert_close(np.concatenate(parts, 1), whole, worst=2e-4)
    with pytest.raises(ValueError, match=r"must be a list of . states.*Received: a list of 9"):
        model(x, initial_state=[None] * 9)


@pytest.mark.slow
def test_models_that_stream_are_saved_and_trained(tmp_path):
    model, x = make("learned"), tokens(8, 11)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, run_eagerly=True)  # in a graph: the example of a language model
    losses = model.fit(x[:, :-1], x[:, 1:], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded(x), model(x))
    np.testing.assert_array_equal(
        generate(loaded, x[:, :3], 5, seed=1), generate(model, x[:, :3], 5, seed=1)
    )


def test_other_layers_with_states_are_left_alone():
    model = StreamingSequential([keras.layers.Embedding(V, 4), keras.layers.LSTM(3)])
    assert model(tokens(2, 5)).shape == (2, 3)
    assert model.get_initial_state(2) == []


def test_a_model_that_streams_keeps_its_configuration_and_refuses_other_states():
    model = StreamingSequential([keras.layers.Embedding(V, 4)], name="text", trainable=False)
    again = StreamingSequential.from_config(model.get_config())
    assert again.name == "text" and not again.trainable
    for bad in (5, [1]):
        with pytest.raises(ValueError, match=r"must be a list of 0 states.*Received: "):
            model(tokens(1, 3), initial_state=bad)


@pytest.mark.slow
def test_models_that_stream_nest():
    inner = StreamingSequential([keras.layers.Embedding(V, 12), PerformerDecoder(16, 2)])
    model = StreamingSequential([inner, keras.layers.Dense(V)])
    x = tokens(1, 9)
    whole = model(x)
    first, state = model(x[:, :4], return_state=True)
    assert_close(tf.concat([first, model(x[:, 4:], initial_state=state)], 1), whole, worst=1e-4)
    assert generate(model, x, 4).shape == (1, 4)


@pytest.mark.parametrize(
    ("positions", "delay_keys"),
    [
        ("rotary", True),
        pytest.param("rotary", False, marks=pytest.mark.slow),
        pytest.param("learned", True, marks=pytest.mark.slow),
        pytest.param("learned", False, marks=pytest.mark.slow),
    ],
)
def test_greedy_tokens_are_those_of_full_passes(positions, delay_keys):
    model, text = make(positions, delay_keys, blocks=2), tokens(6, 3)
    new = generate(model, text, 8, temperature=0)
    for _ in range(8):
        text = np.concatenate([text, np.argmax(model(text)[:, -1:], -1)], 1)
    np.testing.assert_array_equal(new, text[:, 3:])
    assert len(np.unique(new)) > 3


def test_long_prompts_are_read_in_chunks(one_block):
    model, text = one_block, tokens(1, 1300)
    expected = np.argmax(model(text)[0, -1])
    assert generate(model, text, 1, temperature=0)[0, 0] == expected
    new, state = generate(Cycle(), text, 4, temperature=0, return_state=True)
    np.testing.assert_array_equal(new[0], (text[0, -1] + 1 + np.arange(4)) % V)
    assert state["seen"].numpy() == [1303]  # all but the last token


def test_prompts_of_different_lengths_are_continued_each_from_its_end(one_block):
    prompts = [[3], [7, 1, 4, 9], [5, 5]]
    new = generate(Cycle(), prompts, 6, temperature=0)
    for row, prompt in zip(new, prompts, strict=True):
        np.testing.assert_array_equal(row, (prompt[-1] + 1 + np.arange(6)) % V)
    np.testing.assert_array_equal(
        generate(Cycle(), tf.ragged.constant(prompts), 6, temperature=0), new
    )
    together = generate(one_block, prompts, 6, temperature=0)
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(row, generate(one_block, prompt, 6, temperature=0))


def test_sequences_end_at_their_end_token():
    new = generate(Cycle(), [[1], [4], [15]], 8, temperature=0, end_token=6)
    np.testing.assert_array_equal(
        new,
        [[2, 3, 4, 5, 6, 6, 6, 6], [5, 6, 6, 6, 6, 6, 6, 6], [16, 17, 18, 19, 0, 1, 2, 3]],
    )
    # The end token of a prompt does not end it.
    assert generate(Cycle(), [[6, 6], [6, 2]], 3, temperature=0, end_token=6)[1, 0] == 3
    longer = generate(Cycle(), [[1], [1, 6, 2]], 3, temperature=0, end_token=6)
    np.testing.assert_array_equal(longer, [[2, 3, 4], [3, 4, 5]])
    early = generate(Cycle(), [1, 6, 1], 5000, temperature=0, end_token=3)
    np.testing.assert_array_equal(early, [2] + [3] * 4999)


def test_generation_goes_on_from_a_state(one_block):
    model, text = one_block, tokens(2, 5)
    whole = generate(model, text, 9, temperature=0)
    first, state = generate(model, text, 4, temperature=0, return_state=True)
    second = generate(model, first[:, -1:], 5, temperature=0, initial_state=state)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)


def test_a_seed_gives_the_same_tokens(one_block):
    model, text = one_block, tokens(2, 5)
    one = generate(model, text, 30, seed=1)
    np.testing.assert_array_equal(generate(model, text, 30, seed=1), one)
    assert (generate(model, text, 30, seed=2) != one).any()
    keras.utils.set_random_seed(3)
    free = generate(model, text, 30)
    assert (generate(model, text, 30) != free).any()
    keras.utils.set_random_seed(3)
    np.testing.assert_array_equal(generate(model, text, 30), free)


def shares(count=20000, **options):
    logits = tf.math.log(tf.constant([[0.5, 0.1, 0.25, 0.15]]))
    logits = tf.repeat(logits / options.pop("temperature", 1.0), count, 0)
    options = {"greedy": False, "top_k": None, "top_p": None, **options}
    drawn = _sample(logits, tf.constant([3, 4], tf.int64), **options)
    return np.bincount(drawn, minlength=4) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.1, 0.25, 0.15]),
        ({"temperature": 0.5}, np.array([25, 1, 6.25, 2.25]) / 34.5),
        ({"top_k": 2}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 9}, [0.5, 0.1, 0.25, 0.15]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.8}, [5 / 9, 0, 2.5 / 9, 1.5 / 9]),
        ({"top_p": 1.0}, [0.5, 0.1, 0.25, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 0, 1 / 3, 0]),
        ({"greedy": True}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_shares_of_tokens(options, expected):
    """20,000 draws: 4 standard deviations are below 0.0142; what is cut off is never drawn."""
    got, expected = shares(**options), np.array(expected)
    np.testing.assert_allclose(got, expected, atol=0.0142)
    assert not got[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.75, 0.9, 1.0])
def test_no_choice_of_tokens_hangs_on_the_last_bit(top_p):
    """The same shares, rounded otherwise in every row: sums of theirs meet `top_p` exactly."""
    count = 512
    offsets = tf.random.stateless_uniform([count, 1], [5, 6], -4.0, 4.0)
    logits = tf.math.log(tf.constant([[0.5, 0.1, 0.25, 0.15]])) + offsets
    drawn = [
        _sample(logits, tf.constant([7, i], tf.int64), greedy=False, top_k=None, top_p=top_p)
        for i in range(4)
    ]
    expected = {0.5: {0}, 0.75: {0, 2}, 0.9: {0, 2, 3}, 1.0: {0, 1, 2, 3}}[top_p]
    assert set(np.concatenate(drawn)) == expected


def test_temperature_zero_takes_the_likeliest_and_low_ones_nearly_do():
    assert (generate(Cycle(0.1), [1], 30, temperature=0) == (2 + np.arange(30)) % V).all()
    assert (generate(Cycle(0.1), [1], 30, temperature=1e-46) == (2 + np.arange(30)) % V).all()
    assert (generate(Cycle(0.1), [1], 30, temperature=0.002) == (2 + np.arange(30)) % V).all()
    assert (generate(Cycle(0.1), [1], 30, seed=1) != (2 + np.arange(30)) % V).any()


class Counting(Cycle):
    """Counts the graphs that are made of it: two calls in each."""

    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_one_graph_serves_all_lengths_and_batch_sizes():
    model = Counting()
    generate(model, [1, 2], 3)
    calls = model.calls
    for shape, count, temperature in (((1, 9), 3, 0.5), ((5, 700), 7, 0.7), ((3, 1), 1, 2.0)):
        generate(model, np.ones(shape, int), count, temperature=temperature)
    assert 0 < model.calls == calls


def test_values_of_top_k_and_top_p_make_no_graphs():
    model = Counting()
    first = generate(model, [1, 2], 3, top_k=2, top_p=0.5, seed=1)
    calls = model.calls
    for i in range(1, 30):
        generate(model, [1, 2], 3, top_k=i, top_p=i / 30, temperature=0.1 * i)
    assert model.calls == calls
    np.testing.assert_array_equal(generate(model, [1, 2], 3, top_k=2, top_p=0.5, seed=1), first)
    for options in ({}, {"top_k": 3}, {"top_p": 0.3}, {"temperature": 0}):
        generate(model, [1, 2], 3, **options)
    assert model.calls == 5 * calls  # what is left out is not computed


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.6}])
def test_the_values_of_top_k_and_top_p_are_those_of_the_call(options):
    """2000 draws at once, first of all tokens, then of few; each position has its own numbers."""
    model, prompt = Cycle(1.0), np.zeros([2000, 2], int)
    for wider in ({}, {"top_k": 20, "top_p": 1.0}):
        assert len(np.unique(generate(model, prompt, 1, seed=1, **wider))) == V
    drawn = generate(model, prompt, 1, seed=1, **options)
    logits = tf.repeat(tf.one_hot([1], V), 2000, 0)
    position = tf.constant([1, 2], tf.int64)  # seed, position
    given = {"top_k": None, "top_p": None, **options}
    np.testing.assert_array_equal(drawn[:, 0], _sample(logits - 1, position, False, **given))


def test_an_interrupt_ends_it_soon():
    model = Cycle()
    generate(model, [1], 1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which others may ignore
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, [1], 300_000)
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(generate(model, [1], 3, temperature=0), [2, 3, 4])


@pytest.mark.slow
def test_slices_of_any_size_write_the_same_tokens(monkeypatch):
    model, prompts = make(), [[3, 1], [7, 1, 4, 9, 2, 2, 8, 1, 1, 0], [5, 5]]
    one = generate(model, prompts, 40, seed=1, top_k=5)
    for size, seconds in ((1, 1e-9), (7, 1e9)):
        generation._graphs.clear()
        monkeypatch.setattr(generation, "_FIRST_SLICE", size)
        monkeypatch.setattr(generation, "_SLICE_SECONDS", seconds)
        np.testing.assert_array_equal(generate(model, prompts, 40, seed=1, top_k=5), one)


def test_one_graph_of_a_deep_model_serves_all_batch_sizes(one_block, monkeypatch):
    model, text = one_block, tokens(3, 5)
    together = generate(model, text, 8, temperature=0)
    monkeypatch.setattr(
        StreamingSequential, "call", lambda *args, **kwargs: pytest.fail("traced anew")
    )
    for rows in (text[:1], text[1:]):
        new = generate(model, rows, 8, temperature=0)
        np.testing.assert_array_equal(new, together[: len(new)] if len(new) == 1 else together[1:])


def test_states_that_do_not_start_with_the_batch_are_served_too():
    class Sideways(Counting):
        def get_initial_state(self, batch_size):
            return tf.zeros([7, batch_size]), tf.zeros([], tf.int64)

        def __call__(self, tokens, initial_state, return_state, training):
            table, count = initial_state
            logits, _ = super().__call__(tokens, {"seen": 0}, return_state, training)
            return logits, (table + 1, count + 1)

    model = Sideways()
    for batch in (1, 2, 7, 3, 2):
        new = generate(model, np.full((batch, 2), 3), 3, temperature=0)
        np.testing.assert_array_equal(new, [[4, 5, 6]] * batch)


def test_a_model_is_not_kept_alive():
    model = Cycle()
    generate(model, [1], 2)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_new_weights_are_used(one_block):
    model, text = one_block, tokens(1, 5)
    before = generate(model, text, 20, temperature=0)
    model.layers[0].set_weights([w[::-1] for w in model.layers[0].get_weights()])
    after = generate(model, text, 20, temperature=0)
    model.layers[0].set_weights([w[::-1] for w in model.layers[0].get_weights()])
    assert (before != after).any()
    np.testing.assert_array_equal(generate(model, text, 20, temperature=0), before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": []}, ValueError, r"`prompt` must have shape"),
        ({"prompt": [[1], []]}, ValueError, r"`prompt` must.*\(0,\)"),
        ({"prompt": np.ones((1, 2, 3), int)}, ValueError, r"`prompt` must.*\(1, 2, 3\)"),
        ({"prompt": [1.5]}, TypeError, "must hold integers. Received: float64"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be a positive integer"),
        ({"max_new_tokens": 2**31 - 2}, ValueError, "`max_new_tokens`.*2147483646, a prompt of 2"),
        ({"temperature": -1}, ValueError, r"`temperature` must.*temperature=-1"),
        ({"temperature": float("nan")}, ValueError, r"`temperature` must.*nan"),
        ({"top_k": 0}, ValueError, "`top_k` must be a positive integer"),
        ({"top_p": 0}, ValueError, "`top_p` must be above 0"),
        ({"top_p": 1.1}, ValueError, r"`top_p` must.*top_p=1\.1"),
        ({"seed": 1.5}, ValueError, "`seed` must be"),
        ({"end_token": -1}, ValueError, "`end_token` must be a token"),
        ({"end_token": 2**31}, ValueError, "`end_token` must be a token.*2147483648"),
        ({"prompt": [2**32 + 3]}, ValueError, "`prompt` must hold tokens.*Received: 4294967299"),
        ({"prompt": [[3], [2, -1]]}, ValueError, "`prompt` must hold tokens.*Received: -1"),
        ({"temperature": 1e40}, ValueError, r"`temperature` must.*1e\+40"),
        ({"prompt": [[1], [1, 2]], "return_state": True}, ValueError, "of 1 to 2 tokens"),
        ({"end_token": 3, "return_state": True}, ValueError, "end_token=3"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        generate(Cycle(), **{"prompt": [1, 2], "max_new_tokens": 3, **change})


class Fixed(Cycle):
    """A model whose logits are the same always."""

    def __init__(self, *logits):
        self.logits = tf.constant([logits])

    def __call__(self, tokens, initial_state, return_state, training):
        rows = tf.repeat(self.logits, tf.shape(tokens)[0], 0)
        return tf.repeat(rows[:, tf.newaxis], tf.shape(tokens)[1], 1), initial_state


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(
    "logits", [(NAN, NAN), (NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, INF), (-INF, -INF)]
)
def test_logits_that_allow_no_token_are_refused(logits, temperature):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"logits are NaN, \+inf or all -inf"):
        generate(Fixed(*logits), [0], 2, temperature=temperature)


@pytest.mark.parametrize("temperature", [0, 1e-40, 1e-38, 1e-20, 1, 1e38])
def test_large_logits_and_impossible_tokens_are_sampled_rightly(temperature):
    drawn = generate(Fixed(-INF, 5e37, -5e37), [0], 50, temperature=temperature, seed=1)
    assert 0 not in drawn
    assert (drawn == 1).all() == (temperature < 1e38)


def test_excluded_tokens_are_not_sampled_even_at_the_lowest_temperatures():
    class Excluding(Cycle):
        def __call__(self, *args, **kwargs):
            logits, state = super().__call__(*args, **kwargs)
            return tf.where(tf.range(V) == 4, 3.0, -np.inf) + 0 * logits, state

    for temperature in (0, 1e-44, 1e-30, 1, 1e38):
        assert (generate(Excluding(), [1, 2], 5, temperature=temperature) == 4).all()


def test_the_number_of_learned_features_is_computed_before_the_loop_and_after_every_training():
    learned = {"feature_map": "learned"}
    embed = keras.layers.Embedding(V, 12)
    block = PerformerDecoder(24, 2, supports=16, attention_options=learned)
    model = StreamingSequential([embed, block, keras.layers.Dense(V)])
    _, state = generate(model, tokens(2, 5), 3, return_state=True, seed=1)
    (graphs,) = (x for x in generation._graphs[model].values() if hasattr(x, "write"))
    library = graphs.write.get_concrete_function().graph.as_graph_def().library.function
    bodies = [f for f in library if "body" in f.signature.name]
    assert bodies
    assert "Bitcast" not in {node.op for body in bodies for node in body.node_def}
    for weight in block._self_attention_layer.learned_projection.trainable_weights:
        weight.assign(weight * 1.01)
    with pytest.raises(tf.errors.InvalidArgumentError, match="same draw of the projection"):
        generate(model, tokens(2, 5), 3, initial_state=state, seed=1)
