"""Sampling from a model that streams, with memory that does not grow."""

import math
import time
import weakref
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from performer.layers._arguments import check_seed, check_size, default_seed
from performer.layers._learned import unchanged_weights

_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
# Logits are float32, so that shares of tokens are known to this relative error. A sum that misses
# `top_p` by less reaches it, on every processor.
_SHARE_SLACK = 2.0**-20
_CHUNK = 512  # tokens of a prompt that the model reads in one call
# Tokens are written in slices, and Python runs between them: Ctrl-C waits for one slice at most.
_SLICE_SECONDS = 0.25  # each costs a few milliseconds more
_FIRST_SLICE = 64  # tokens, before the time of a token is known
_INPUTS = (  # of the graph that writes a slice; the state comes after them
    tf.TensorSpec([None, None], tf.int32, "prompt"),
    tf.TensorSpec([None], tf.int32, "lengths"),
    tf.TensorSpec([], tf.int32, "first"),
    tf.TensorSpec([], tf.int32, "count"),
    tf.TensorSpec([], tf.float32, "temperature"),
    tf.TensorSpec([], tf.int32, "top_k"),
    tf.TensorSpec([], tf.float32, "top_p"),
    tf.TensorSpec([], tf.int64, "seed"),
    tf.TensorSpec([], tf.int32, "end"),
    tf.TensorSpec([None], tf.int32, "last"),
    tf.TensorSpec([None], tf.bool, "ended"),
)
_graphs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class _Graphs(NamedTuple):
    """The compiled functions of a model, and the tokens of a slice, by batch size, so far."""

    read: tf.types.experimental.PolymorphicFunction
    write: tf.types.experimental.PolymorphicFunction
    slices: dict[int, int]


def generate(
    model,
    prompt,
    max_new_tokens,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    seed=None,
    end_token=None,
    initial_state=None,
    return_state=False,
):
    """Continues prompts, token by token.

    The model reads the prompt in chunks and then its own tokens one by one, in a compiled loop,
    with a state of constant size: time and memory of a token do not depend on how many came before.
    The loop runs in slices of about 0.25 s, between which Ctrl-C (`KeyboardInterrupt`) ends it. Its
    graphs serve all batch sizes, lengths and values of `temperature`, `top_k` and `top_p`.

    Args:
        model: `performer.StreamingSequential`, or anything with `get_initial_state(batch_size)`
            and a call `model(tokens, initial_state=state, return_state=True, training=False)` from
            integers `(B, L)` to logits `(B, L, V)` and the next state. It is called in a graph
            that serves all B and L, where both are unknown; states have B as their first axis, or
            do not depend on it.
        prompt: Integers `(P,)` or `(B, P)`, P at least 1; or a list of B lists (or a ragged
            tensor) of different lengths.
        max_new_tokens: Number N of tokens to add to each prompt; positions stay below 2**31.
        temperature: What logits are divided by, 0 or above; 0 always takes the likeliest token.
            Defaults to 1.
        top_k: Sample from the `top_k` likeliest tokens only (more, where logits are equal).
        top_p: Sample from the fewest likeliest tokens whose probabilities, after temperature and
            `top_k`, add up to `top_p` or more, to a relative 1e-6; in (0, 1]. (Holtzman et al.,
            https://arxiv.org/abs/1904.09751.)
        seed: Integer. The same seed gives the same tokens; `None` takes one from Python's random
            generator, which `keras.utils.set_random_seed` fixes.
        end_token: Token that ends a sequence. Generation stops when all have ended.
        initial_state: State of what came before the prompt. Defaults to the model's initial state.
        return_state: Boolean, whether to return the state, too. It has read everything but the
            last token: go on with `generate(model, tokens[:, -1:], ..., initial_state=state)`.

    Returns:
        NumPy int32 `(B, N)` (`(N,)` for a prompt `(P,)`): the new tokens; after an `end_token` only
        further ones. With `return_state` a pair of it and the state.

    Raises:
        ValueError: an argument outside its range, an empty prompt, `return_state` with prompts of
            different lengths or an `end_token`.
        TypeError: a prompt that does not hold integers.
        tf.errors.InvalidArgumentError: logits from which no token can be drawn (a NaN or +inf
            among them, or all -inf); a state that does not fit.

    Example:

    >>> import keras
    >>> from performer import PerformerDecoder, StreamingSequential, generate
    >>> model = StreamingSequential(
    ...     [keras.layers.Embedding(256, 16), PerformerDecoder(32, 2), keras.layers.Dense(256)]
    ... )
    >>> generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=7, temperature=0.8, seed=1).shape
    (2, 7)
    """
    if not callable(model) or not hasattr(model, "get_initial_state"):
        raise TypeError(
            f"`model` must have `get_initial_state`, and be callable. Received: model={model!r}"
        )
    rows, single = _rows(prompt)
    lengths = np.array([len(row) for row in rows], np.int32)
    shortest, longest = int(lengths.min()), int(lengths.max())
    count = check_size("max_new_tokens", max_new_tokens)
    if longest + count >= 2**31:
        raise ValueError(
            "`max_new_tokens` and the longest prompt must have fewer than 2**31 tokens together. "
            f"Received: max_new_tokens={count}, a prompt of {longest} tokens"
        )
    temperature = float(np.float32(_number("temperature", temperature, low=0, high=_MAX_FLOAT32)))
    top_k = None if top_k is None else check_size("top_k", top_k)
    top_p = None if top_p is None else _number("top_p", top_p, low=0, high=1)
    if top_p == 0:
        raise ValueError("`top_p` must be above 0. Received: top_p=0")
    end = -1 if end_token is None else _token("end_token", end_token)
    seed = default_seed() if seed is None else check_seed("seed", seed)
    if return_state and (end_token is not None or shortest != longest):
        raise ValueError(
            "`return_state` needs prompts of one length and no `end_token`: all rows of a state "
            f"stand at one position. Received: prompts of {shortest} to {longest} "
            f"tokens, end_token={end_token}"
        )
    tokens = np.zeros((len(rows), longest), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    if initial_state is None:
        _build(model, tokens)
        initial_state = model.get_initial_state(len(rows))
    state = tf.nest.map_structure(tf.convert_to_tensor, initial_state)
    sampling = temperature >= _MIN_FLOAT32  # what is below it, kernels may take for 0
    graphs = _graphs_of(
        model, state, len(rows), sampling, sampling and top_k is not None, sampling and bool(top_p)
    )
    for start in range(0, shortest - 1, _CHUNK):
        chunk = tokens[:, start : min(start + _CHUNK, shortest - 1)]
        state = graphs.read(tf.constant(chunk), state)

    options = {
        "temperature": tf.constant(temperature, tf.float32),
        "top_k": tf.constant(min(top_k or 1, 2**31 - 1)),
        "top_p": tf.constant(max(top_p or 1.0, _MIN_FLOAT32), tf.float32),
        "seed": tf.constant(seed, tf.int64),
    }
    new, state = _write(graphs, tokens, lengths, count, end, state, options)
    new = new[0] if single else new
    return (new, state) if return_state else new


def _write(graphs, prompt, lengths, count, end, state, options):
    """Goes on slice by slice, after what all prompts have, until all rows are full or have ended.

    Args:
        graphs: `_Graphs` of the model.
        prompt, lengths: int32 `(B, P)` and `(B,)`.
        count: number of tokens to add to each prompt.
        end: the token that ends a sequence; -1 for none.
        state: the model's, which has read all but the last token of the shortest prompt.
        options: the other inputs of `graphs.write`.

    Returns:
        int32 `(B, count)`, and the state.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    steps = longest - shortest + count
    written = np.full((len(prompt), steps), end, np.int32)
    last, ended = tf.constant(prompt[:, shortest - 1]), tf.zeros([len(prompt)], tf.bool)
    prompt = tf.constant(prompt)
    done, size = 0, graphs.slices.get(len(written), _FIRST_SLICE)
    while done < steps and not np.all(ended):
        began = time.monotonic()
        given = min(size, steps - done)
        new, last, ended, state = graphs.write(
            prompt=prompt,
            lengths=tf.constant(lengths),
            first=tf.constant(shortest + done),
            count=tf.constant(given),
            end=tf.constant(end),
            last=last,
            ended=ended,
            state=state,
            **options,
        )
        written[:, done : done + new.shape[1]] = new
        done += new.shape[1]
        pace = _SLICE_SECONDS / max(time.monotonic() - began, 1e-9)
        if given == size or pace < 1:
            size = max(1, round(given * min(max(pace, 0.5), 2.0)))
    graphs.slices[len(written)] = size
    own = (lengths - shortest)[:, np.newaxis] + np.arange(count)
    return np.take_along_axis(written, own, 1), state


def _build(model, tokens):
    """Calls a model that has not been called yet, so that its layers have weights."""
    if not getattr(model, "built", True):
        model(tf.constant(tokens[:, :1]))


def _graphs_of(model, state, batch, sampling, by_rank, by_share):
    """The compiled functions of a model, kept as long as the model lives and has these weights.

    One pair for all batch sizes: `state` and `batch` say what of a state depends on them. What else
    a pair depends on is whether tokens are sampled, and whether from the `top_k` (`by_rank`) and
    the `top_p` (`by_share`) likeliest; the numbers are inputs.
    """
    weights = tuple(id(weight) for weight in getattr(model, "weights", ()))
    kept = _graphs.setdefault(model, {})
    if weights != kept.get("weights"):
        kept.clear()
        kept["weights"] = weights

    def spec(x):
        rows = x.shape[:1] == [batch]
        return tf.TensorSpec([None, *x.shape[1:]] if rows else x.shape, x.dtype)

    states = tf.nest.map_structure(spec, state)
    key = sampling, by_rank, by_share, repr(states)
    if key not in kept:
        reference = weakref.ref(model)  # so that the graphs do not keep the model alive

        def read(tokens, state):
            return _read(reference(), tokens, state)[1]

        def write(
            prompt, lengths, first, count, temperature, top_k, top_p, seed, end, last, ended, state
        ):
            def choose(logits, position):
                if not sampling:
                    return _sample(logits, None, True, None, None)
                stream = tf.stack([seed, tf.cast(position, tf.int64)])
                kept = top_k if by_rank else None, top_p if by_share else None
                return _sample(logits / temperature, stream, False, *kept)

            return _write_slice(
                reference(), choose, prompt, lengths, first, count, end, last, ended, state
            )

        kept[key] = _Graphs(
            tf.function(read, autograph=False, input_signature=[_INPUTS[0], states]),
            tf.function(write, autograph=False, input_signature=[*_INPUTS, states]),
            {},
        )
    return kept[key]


def _read(model, tokens, before):
    """Logits of `tokens` `(B, L)`, and the state after them."""
    logits, after = model(tokens, initial_state=before, return_state=True, training=False)
    # Loops need the same shapes after every round, those of unknown sizes included.
    return logits, tf.nest.map_structure(lambda x, y: tf.ensure_shape(x, y.shape), after, before)


def _write_slice(model, choose, prompt, lengths, first, count, end, last, ended, state):
    """Goes on token by token.

    Args:
        choose: function of logits `(B, V)`, of which the largest is 0, and their position to tokens
            `(B,)`.
        prompt, lengths: int32 `(B, P)` and `(B,)`.
        first, count: position of the first token to write, and how many to write at most.
        end: the token that ends a sequence; -1 for none.
        last: int32 `(B,)`, the tokens before the first.
        ended: bool `(B,)`, which sequences have ended.
        state: the model's, which has read what is before `last`.

    Returns:
        int32 `(B, count)`, fewer where all sequences end before; then `last`, `ended` and `state`
        after them.
    """

    def step(index, last, ended, written, state):
        logits, state = _read(model, last[:, tf.newaxis], state)
        logits = tf.cast(logits[:, -1], tf.float32)
        position = first + index
        # The largest becomes 0: a small temperature makes no logit infinite. Whatever allows no
        # token makes the sum NaN.
        logits -= tf.reduce_max(logits, -1, keepdims=True)
        total = tf.reduce_sum(logits, -1)
        check = tf.debugging.Assert(
            tf.reduce_all(total == total),
            ["the model's logits are NaN, +inf or all -inf before token", position],
        )
        with tf.control_dependencies([check]):
            new = choose(tf.identity(logits), position)
        given = position < lengths  # a longer prompt says what comes here
        within = tf.minimum(position, tf.shape(prompt)[1] - 1)
        new = tf.where(given, prompt[:, within], tf.where(ended, end, new))
        ended |= ~given & (new == end)
        return index + 1, new, ended, written.write(index, new), state

    written = tf.TensorArray(tf.int32, size=0, dynamic_size=True, element_shape=last.shape)
    with unchanged_weights():
        _, last, ended, written, state = tf.while_loop(
            lambda index, _, ended, *rest: (index < count) & ~tf.reduce_all(ended),
            step,
            (tf.constant(0), last, ended, written, state),
        )
    return tf.transpose(written.stack()), last, ended, state


def _sample(logits, seed, greedy, top_k, top_p):
    """Tokens `(B,)` of logits `(B, V)`."""
    if greedy:
        return tf.argmax(logits, -1, tf.int32)
    if top_k is not None:
        kept = tf.math.top_k(logits, tf.minimum(top_k, tf.shape(logits)[-1])).values
        logits = _at_least(logits, kept[:, -1:])
    if top_p is not None:
        falling = tf.sort(logits, direction="DESCENDING")
        before = tf.cumsum(tf.nn.softmax(tf.cast(falling, tf.float64)), -1, exclusive=True)
        share = tf.cast(top_p, tf.float64)
        kept = (before * (1 + _SHARE_SLACK) < share) | (share >= 1)
        least = tf.reduce_min(tf.where(kept, falling, math.inf), -1, keepdims=True)
        logits = _at_least(logits, least)
    return tf.random.stateless_categorical(logits, 1, seed, tf.int32)[:, 0]


def _at_least(logits, least):
    return tf.where(logits < least, -math.inf, logits)


def _rows(prompt):
    """The prompts as a list of integer arrays, and whether there is only one, given without B."""
    if isinstance(prompt, tf.RaggedTensor):
        prompt = prompt.to_list()
    ragged = isinstance(prompt, list | tuple) and any(np.ndim(row) for row in prompt)
    single = not ragged and np.ndim(prompt) == 1
    if not ragged and np.ndim(prompt) == 0:
        raise ValueError(
            f"`prompt` must have shape (P,) or (B, P), or be a list of lists. Received: {prompt!r}"
        )
    rows = [np.asarray(row) for row in ([prompt] if single else prompt)]
    if not rows or any(row.ndim != 1 or not len(row) for row in rows):
        raise ValueError(
            "`prompt` must have shape (P,) or (B, P), or be a list of lists, with a token in every "
            f"row. Received: {np.shape(prompt) if not ragged else [row.shape for row in rows]}"
        )
    for row in rows:
        if not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"`prompt` must hold integers. Received: {row.dtype}")
        for token in (row.min(), row.max()):
            if not 0 <= token < 2**31:
                raise ValueError(
                    f"`prompt` must hold tokens from 0 to 2**31 - 1. Received: {token}"
                )
    return rows, single


def _number(name, value, low, high):
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or isinstance(value, np.complexfloating) or not low <= value <= high:
        raise ValueError(
            f"`{name}` must be a finite number from {low} to {high}. Received: {name}={value!r}"
        )
    return float(value)


def _token(name, value):
    if (
        isinstance(value, bool)
        or not isinstance(value, int | np.integer)
        or not (0 <= value < 2**31)
    ):
        raise ValueError(
            f"`{name}` must be a token from 0 to 2**31 - 1. Received: {name}={value!r}"
        )
    return int(value)
