"""States of a layer: their position in the sequence, and the calls that may have one."""

import functools
import operator

import keras
import tensorflow as tf

from performer import checks, parallel
from performer.ops.state import AttentionState, as_position, near_rows
from performer.shapes import dims


def with_tensors(state):
    """An `AttentionState` of tensors, arrays and numbers, with tensors only; others as they are."""
    if not isinstance(state, AttentionState):
        return state
    return AttentionState(
        *(
            x if isinstance(x, keras.KerasTensor) else checks.tensor(f"`initial_state`.{name}", x)
            for name, x in state._asdict().items()
        )
    )


def position_of(state):
    """Where a call with `initial_state=state` begins: an int64 scalar, or 0 without a state.

    Raises:
        TypeError: `state` is not an `AttentionState`.
    """
    if state is None:
        return 0
    if not isinstance(state, AttentionState):
        raise TypeError(f"`initial_state` must be an AttentionState, got {type(state).__name__}")
    return as_position(state.position)


def first_position(start, x):
    """Position of the first element of folded x `[B, L, ...]` in a sequence that begins at `start`.

    In the scope of sequences in parts x is the part of this replica.
    """
    mesh = parallel.current()
    return start if mesh is None else start + tf.cast(mesh.start(dims(x)[1]), tf.int64)


def with_position(state, start, key, axes):
    """`state`, its position one past the last key.

    Args:
        state: `AttentionState` after a call.
        start: position of the first key of the call.
        key: the call's keys, of which the sizes of `axes` count.
        axes: attention axes, as `resolve_axes` returns them.
    """
    sizes, mesh = tf.shape(key, tf.int64), parallel.current()
    length = product([sizes[axis] for axis in axes])
    return state._replace(position=start + (length if mesh is None else mesh.total(length)))


def check_call(masks, shapes, axes, dense):
    """Refuses what has no state: dense form, packed sequences, causal calls of two lengths.

    Args:
        masks: the call's `Masks`.
        shapes: shapes of query and value.
        axes: attention axes, as `resolve_axes` returns them.
        dense: whether the call takes the dense form.

    Raises:
        ValueError: one of them, in a call with `initial_state` or `return_state`.
    """
    what = None
    if dense:
        what = "scores (`return_attention_scores`, a general `attention_mask`), which use no state"
    elif masks.segment_ids is not None:
        what = "`segment_ids`, whose sequences have a state each"
    elif masks.use_causal_mask:
        lengths = [[shape[axis] for axis in axes] for shape in shapes]
        if lengths[0] != lengths[1] and None not in lengths[0] + lengths[1]:
            what = f"`use_causal_mask` for {lengths[0]} queries and {lengths[1]} keys"
    if what:
        raise ValueError(f"`initial_state` and `return_state` cannot be combined with {what}.")


def refuse_near_rows(state):
    """Refuses a state with near rows in `summarize`: they end where the next keys would follow."""
    if near_rows(state):
        raise ValueError(
            "`initial_state` of `summarize` must have no near rows. A causal call continues the "
            "sequence of a state that has them. Received: a state with near rows"
        )


def product(sizes):
    """The product of integers and integer scalars; of a single one, that one itself."""
    return functools.reduce(operator.mul, sizes)
