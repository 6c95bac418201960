"""Sampling from a model that streams, with memory that does not grow."""

import math
import weakref

import numpy as np
import tensorflow as tf

from performer.layers._arguments import check_seed, check_size, default_seed

_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_CHUNK = 512  # tokens of a prompt that the model reads in one call
_INPUTS = (  # of the loop; the state comes after them
    tf.TensorSpec([None, None], tf.int32, "prompt"),
    tf.TensorSpec([None], tf.int32, "lengths"),
    tf.TensorSpec([], tf.int32, "count"),
    tf.TensorSpec([], tf.float32, "temperature"),
    tf.TensorSpec([], tf.int64, "seed"),
    tf.TensorSpec([], tf.int32, "end"),
)
_loops: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


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

    The model reads the prompt in chunks and then its own tokens one by one, all in one compiled
    graph, with a state of constant size: time and memory of a token do not depend on how many came
    before.

    Args:
        model: `performer.StreamingSequential`, or anything with `get_initial_state(batch_size)`
            and a call `model(tokens, initial_state=state, return_state=True, training=False)` from
            integers `(B, L)` to logits `(B, L, V)` and the next state. It is called in a graph
            that serves all B and L, where both are unknown; states have B as their first axis, or
            do not depend on it.
        prompt: Integers `(P,)` or `(B, P)`, P at least 1; or a list of B lists (or a ragged
            tensor) of different lengths.
        max_new_tokens: Number N of tokens to add to each prompt.
        temperature: What logits are divided by, 0 or above; 0 always takes the likeliest token.
            Defaults to 1.
        top_k: Sample from the `top_k` likeliest tokens only (more, where logits are equal).
        top_p: Sample from the fewest likeliest tokens whose probabilities, after temperature and
            `top_k`, add up to `top_p` or more; in (0, 1]. (Holtzman et al.,
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
        tf.errors.InvalidArgumentError: the model's logits are NaN, or +inf, or -inf for all tokens
            (-inf for some excludes these); a state that does not fit.

    Example:

    >>> import keras
    >>> from performer import PerformerDecoder, StreamingSequential, generate
    >>> model = StreamingSequential(
    ...     [keras.layers.Embedding(256, 16), PerformerDecoder(32, 2), keras.layers.Dense(256)]
    ... )
    >>> generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=7, temperature=0.8, seed=1).shape
    (2, 7)
    """
    rows, single = _rows(prompt)
    lengths = np.array([len(row) for row in rows], np.int32)
    count = check_size("max_new_tokens", max_new_tokens)
    if count + lengths.max() >= 2**31:
        raise ValueError(
            "`max_new_tokens` and the longest prompt must have fewer than 2**31 tokens together. "
            f"Received: max_new_tokens={count} and a prompt of {lengths.max()}"
        )
    temperature = float(np.float32(_number("temperature", temperature, low=0, high=_MAX_FLOAT32)))
    top_k = None if top_k is None else check_size("top_k", top_k)
    top_p = None if top_p is None else _number("top_p", top_p, low=0, high=1)
    if top_p == 0:
        raise ValueError("`top_p` must be above 0. Received: top_p=0")
    end = -1 if end_token is None else _token("end_token", end_token)
    seed = default_seed() if seed is None else check_seed("seed", seed)
    if return_state and (end_token is not None or lengths.min() != lengths.max()):
        raise ValueError(
            "`return_state` needs prompts of one length and no `end_token`: all rows of a state "
            f"stand at one position. Received: prompts of {lengths.min()} to {lengths.max()} "
            f"tokens, end_token={end_token}"
        )
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    if initial_state is None:
        _build(model, tokens)
        initial_state = model.get_initial_state(len(rows))
    initial_state = tf.nest.map_structure(tf.convert_to_tensor, initial_state)
    loop = _loop(model, initial_state, len(rows), temperature == 0, top_k, top_p)
    new, state = loop(
        tf.constant(tokens),
        tf.constant(lengths),
        tf.constant(count),
        tf.constant(temperature, tf.float32),
        tf.constant(seed, tf.int64),
        tf.constant(end),
        initial_state,
    )
    new = new.numpy()[0] if single else new.numpy()
    return (new, state) if return_state else new


def _build(model, tokens):
    """Calls a model that has not been called yet, so that its layers have weights."""
    if not getattr(model, "built", True):
        model(tf.constant(tokens[:, :1]))


def _loop(model, state, batch, greedy, top_k, top_p):
    """The compiled loop of a model, kept as long as the model lives and has these weights.

    One for all batch sizes: `state` and `batch` say what of a state depends on them.
    """
    weights = tuple(id(weight) for weight in getattr(model, "weights", ()))
    loops = _loops.setdefault(model, {})
    if weights != loops.get("weights"):
        loops.clear()
        loops["weights"] = weights

    def spec(x):
        rows = x.shape[:1] == [batch]
        return tf.TensorSpec([None, *x.shape[1:]] if rows else x.shape, x.dtype)

    states = tf.nest.map_structure(spec, state)
    key = greedy, top_k, top_p, repr(states)
    if key not in loops:
        reference = weakref.ref(model)  # so that the loop does not keep the model alive

        def sample(logits, seed):
            return _sample(logits, seed, greedy, top_k, top_p)

        def run(*given):
            return _run(reference(), sample, *given)

        loops[key] = tf.function(run, autograph=False, input_signature=[*_INPUTS, states])
    return loops[key]


def _run(model, sample, prompt, lengths, count, temperature, seed, end, state):
    """Reads what all prompts have, then goes on token by token.

    Args:
        sample: function of logits `(B, V)` and a seed `(2,)` to tokens `(B,)`.
        prompt, lengths: int32 `(B, P)` and `(B,)`.
        count, temperature, seed, end: scalars; `end` is -1 for none.
        state: the model's, before the prompt.

    Returns:
        int32 `(B, count)`, and the state.
    """
    shortest, longest = tf.reduce_min(lengths), tf.reduce_max(lengths)
    steps = longest - shortest + count  # tokens that come after what all prompts have

    def read(tokens, before):
        logits, after = model(tokens, initial_state=before, return_state=True, training=False)
        # Loops need the same shapes after every round, those of unknown sizes included.
        return logits, tf.nest.map_structure(
            lambda x, y: tf.ensure_shape(x, y.shape), after, before
        )

    def read_chunk(position, state):
        chunk = prompt[:, position : tf.minimum(position + _CHUNK, shortest - 1)]
        return position + tf.shape(chunk)[1], read(chunk, state)[1]

    def step(index, last, ended, written, state):
        logits, state = read(last[:, tf.newaxis], state)
        logits = tf.cast(logits[:, -1], tf.float32)
        position = shortest + index
        largest = tf.reduce_max(logits, -1, keepdims=True)  # NaN if one of them is
        check = tf.debugging.Assert(
            tf.reduce_all(tf.math.is_finite(largest)) & tf.reduce_all(logits == logits),
            [
                "the model's logits are NaN or infinite (a -inf excludes a token, but not all of "
                "them) before token",
                position,
            ],
        )
        with tf.control_dependencies([check]):
            # The likeliest token stays at 0, where a low temperature would make an infinity of it.
            scaled = (logits - largest) / tf.where(temperature > 0, temperature, 1.0)
        new = sample(scaled, tf.stack([seed, tf.cast(position, tf.int64)]))
        given = position < lengths  # a longer prompt says what comes here
        new = tf.where(
            given, prompt[:, tf.minimum(position, longest - 1)], tf.where(ended, end, new)
        )
        ended |= ~given & (new == end)
        return index + 1, new, ended, written.write(index, new), state

    _, state = tf.while_loop(
        lambda position, _: position < shortest - 1, read_chunk, (tf.constant(0), state)
    )
    written = tf.TensorArray(tf.int32, size=0, dynamic_size=True, element_shape=prompt.shape[:1])
    index, _, _, written, state = tf.while_loop(
        lambda index, _, ended, *rest: (index < steps) & ~tf.reduce_all(ended),
        step,
        (
            tf.constant(0),
            prompt[:, shortest - 1],
            tf.zeros_like(lengths, tf.bool),
            written,
            state,
        ),
    )
    tokens = tf.pad(
        tf.transpose(written.stack()), [[0, 0], [0, steps - index]], constant_values=end
    )
    rows = (lengths - shortest)[:, tf.newaxis] + tf.range(count)
    return tf.gather(tokens, rows, batch_dims=1), state


def _sample(logits, seed, greedy, top_k, top_p):
    """Tokens `(B,)` of logits `(B, V)`."""
    if greedy:
        return tf.argmax(logits, -1, tf.int32)
    if top_k is not None:
        kept = tf.math.top_k(logits, tf.minimum(top_k, tf.shape(logits)[-1])).values
        logits = _at_least(logits, kept[:, -1:])
    if top_p is not None:
        falling = tf.sort(logits, direction="DESCENDING")
        before = tf.cumsum(tf.nn.softmax(falling), -1, exclusive=True)
        kept = tf.where(before < top_p, falling, math.inf)
        logits = _at_least(logits, tf.reduce_min(kept, -1, keepdims=True))
    return tf.random.stateless_categorical(logits, 1, seed, tf.int32)[:, 0]


def _at_least(logits, least):
    return tf.where(logits < least, -math.inf, logits)


def _rows(prompt):
    """The prompts as a list of integer arrays, and whether there is only one, given without B."""
    if isinstance(prompt, tf.RaggedTensor):
        prompt = prompt.to_list()
    ragged = isinstance(prompt, list | tuple) and any(np.ndim(row) for row in prompt)
    single = not ragged and np.ndim(prompt) == 1
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
    if not number or not (math.isfinite(value) and low <= value <= high):
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
