"""What reaches the attention layers of a model while it is called."""

from __future__ import annotations

import contextlib
import functools
import inspect

import keras

from performer.convert.decoders import arguments_of_call
from performer.convert.replacement import is_attention, layers_inside
from performer.layers import Performer

# Arguments of a call of attention that say who attends to whom.
_KNOWN = set(inspect.signature(Performer.calibrate).parameters) - {"self", "steps", "seed"}


def learned_layers(model) -> list[Performer]:
    """The `Performer` layers in a model whose features are learned, in order."""
    return [x for x in layers_inside(model) if isinstance(x, Performer) and x.learns_features]


def pairs(student, teacher) -> list[tuple[Performer, keras.layers.Layer]]:
    """The layers with learned features in `student`, each with the exact one in its place.

    Raises:
        ValueError: `student` has none, or `teacher` other layers in their places.
    """
    learned = learned_layers(student)
    if not learned:
        raise ValueError(
            "`student` must have a Performer layer with attention_method='linear' and "
            f"feature_map='learned'. Received: {student.name!r}, without one"
        )

    def attention(model):
        return [layer for layer in layers_inside(model) if is_attention(layer)]

    ours, theirs = attention(student), attention(teacher)
    found = [(a, b) for a, b in zip(ours, theirs, strict=False) if a in learned]
    wrong = [b.name for _, b in found if getattr(b, "attention_method", "quadratic") == "linear"]
    if len(ours) != len(theirs) or wrong:
        raise ValueError(
            "`teacher` must have the attention layers of `student`, exact where those learn their "
            f"features. Received: {teacher.name!r} with {len(theirs)} attention layers, "
            f"{student.name!r} with {len(ours)}"
            + (f"; linear in the teacher: {', '.join(wrong)}" if wrong else "")
        )
    return found


@contextlib.contextmanager
def before_calls(layer, react):
    """Calls `react` with the arguments of every call of `layer`, by name, before the call."""
    call = layer.call
    signature = inspect.signature(call)

    @functools.wraps(call)
    def watched(*args, **kwargs):
        react(signature.bind(*args, **kwargs).arguments)
        return call(*args, **kwargs)

    layer.call = watched
    try:
        yield
    finally:
        del layer.call


def first_heads(call, layers, react):
    """Runs `call` and gives the first call of each layer to `react`, as heads and masks.

    Args:
        call: a function without arguments that calls a model.
        layers: pairs of a `Performer` with learned features, which is asked for the heads, and the
            layer of the model in the place of which it stands (or itself).
        react: a function of a number in `layers`, heads and `FoldedMasks`.
    """
    seen = set()

    def of(number, learned, given):
        if number not in seen:
            seen.add(number)
            given = arguments_of_call(layers[number][1], given)
            given = {name: x for name, x in given.items() if name in _KNOWN}
            react(number, *learned._heads_and_masks(**given))

    with contextlib.ExitStack() as stack:
        for number, (learned, watched) in enumerate(layers):
            stack.enter_context(before_calls(watched, functools.partial(of, number, learned)))
        call()
