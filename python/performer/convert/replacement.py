"""Models with `Performer` layers in the place of exact attention."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
from keras.saving import deserialize_keras_object, serialize_keras_object
from keras.saving import get_registered_name as registered_name
from keras.src.models.functional import Functional

from performer.convert.decoders import config_with, in_decoder, is_of_decoder, without_scores
from performer.convert.weights import EXACT, copy_weights
from performer.layers import Performer

# Of exact layers in configurations: Keras exports one of the classes under another name.
_NAMES = {"GroupQueryAttention", *(kind.__name__ for kind in EXACT)}
# Models whose graph of layers is in their configuration.
_GRAPHS = (keras.Sequential, Functional)


def replace_attention(model, *, supports=None, where=None, **arguments):
    """A copy of a model with `Performer` layers in the place of exact attention.

    Replaced are layers of the types `keras.layers.MultiHeadAttention` and `GroupQueryAttention`
    (not of subclasses), wherever they are: in functional and sequential models, models inside
    models, wrappers, and layers or models of one's own. The weights of all layers come along.
    Trained softmax attention is only approximated by linear attention: train the new model on.

    Likewise the attention of keras-hub's `TransformerDecoder` and of its Llama: backbones such as
    `GPT2Backbone` and `LlamaBackbone` become linear as they are, with causal and padding masks,
    rotary positions and grouped heads. Only its cache of keys and values is refused.

    Layers and models of one's own are made anew from their `get_config`. Where that does not
    contain their attention layers, because they make them themselves, the copy's are exchanged
    afterwards. Such a copy cannot be saved as a whole, since its class would make the exact layers
    again; it says so when asked to. Save its weights, and load them into
    `replace_attention(original, ...)`.

    Args:
        model: Built Keras model (or layer). It is left as it is.
        supports: Number of random features, as in `Performer`.
        where: Function from the name of an attention layer to whether to replace it. Defaults to
            all of them.
        **arguments: Other arguments of `Performer`, for every new layer, over what the old one
            says; with `attention_method="quadratic"` the copy computes what the model does.

    Returns:
        The copy, not compiled.

    Raises:
        TypeError: `model` is no Keras model or layer.
        ValueError: It is not built, has no attention layer to replace, cannot be made from its
            configuration, or an attention layer has an option that `Performer` refuses (the
            message names it).

    Example:

    >>> import keras
    >>> from performer import convert
    >>> x = keras.Input((None, 8))
    >>> model = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)(x, x))
    >>> type(convert.replace_attention(model, supports=64).layers[-1]).__name__
    'Performer'
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(f"`model` must be a Keras model or layer. Received: model={model!r}")
    if not model.built:
        raise ValueError(f"`model` must be built: call it once. Received: model={model!r}")
    choice = _Choice(where or (lambda name: True), {**arguments, "supports": supports})
    if not any(map(choice.selects, layers_inside(model))):
        found = sorted({type(layer).__name__ for layer in layers_inside(model)})
        raise ValueError(
            "`model` must have a MultiHeadAttention or GroupQueryAttention layer"
            + ("" if where is None else " that `where` selects")
            + f". Received: {model.name!r}, with layers of the types {', '.join(found)}"
        )
    return _copy_of(model, choice)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which layers are replaced (by their names), and what the new ones are given."""

    where: Callable[[str], bool]
    arguments: dict[str, Any]

    def selects(self, layer):
        return (type(layer) in EXACT or is_of_decoder(layer)) and self.where(layer.name)

    def performer(self, layer):
        """The `Performer` that takes the place of an exact layer of Keras, not built."""
        config = layer.get_config()
        if isinstance(layer, keras.layers.GroupQueryAttention):
            config["key_dim"] = config.pop("head_dim")
            config["num_heads"] = config.pop("num_query_heads")
        with _naming(layer):
            return Performer(**config_with(config, self.arguments))

    def place(self, layer):
        """What takes the place of any exact layer, with its weights."""
        if is_of_decoder(layer):
            with _naming(layer):
                return in_decoder(layer, self.arguments)
        new = self.performer(layer)
        copy_weights(layer, new)
        return new


@contextlib.contextmanager
def _naming(layer):
    """Says of which layer it was that an error came up."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The layer {layer.name!r} cannot be replaced by a Performer: {error}"
        ) from error


def is_attention(layer) -> bool:
    """Whether a layer is attention, exact or linear."""
    return isinstance(layer, EXACT) or is_of_decoder(layer)


def _children(layer):
    """The layers that a layer tracks itself, in order."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def layers_inside(layer):
    """A layer and all layers in it, in order."""
    return list(layer._flatten_layers())


def names_inside(model):
    """Names of all layers in a model by their ids, with those around them where names repeat."""
    paths = {}

    def walk(layer, path):
        for child in _children(layer):
            if id(child) not in paths:
                paths[id(child)] = (*path, child.name)
                walk(child, paths[id(child)])

    paths[id(model)] = (model.name,)
    walk(model, ())
    count = collections.Counter(path[-1] for path in paths.values())
    return {
        key: path[-1] if count[path[-1]] == 1 else "/".join(path) for key, path in paths.items()
    }


def _copy_of(model, choice):
    """A model with the weights of `model`, in which the chosen layers are replaced."""
    classes = {type(layer) for layer in layers_inside(model)}
    names = {name: c for c in classes for name in (c.__name__, registered_name(c))}
    try:
        config = _with_replacements(serialize_keras_object(model), choice)
        config.pop("compile_config", None)
        copy = deserialize_keras_object(config, custom_objects=names, safe_mode=False)
    except (NotImplementedError, TypeError) as error:
        raise ValueError(
            f"The model {model.name!r} cannot be made again from its configuration, which "
            "replacing layers needs. Give each of its own classes a `get_config`, and a "
            f"`from_config` where the constructor does not take it. {error}"
        ) from error
    _carry_weights(model, copy)
    _exchange_inside(copy, choice)
    return copy


def _with_replacements(config, choice):
    """A serialized model with every chosen attention layer in it replaced."""
    if isinstance(config, list | tuple):
        return type(config)(_with_replacements(x, choice) for x in config)
    if not isinstance(config, dict):
        return config
    exact = config.get("class_name") in _NAMES
    if exact and str(config.get("module")).startswith("keras."):
        layer = deserialize_keras_object({k: v for k, v in config.items() if k != "build_config"})
        if choice.selects(layer):
            return {**config, **serialize_keras_object(choice.performer(layer))}
    return {k: _with_replacements(v, choice) for k, v in config.items()}


def _carry_weights(source, target):
    """Copies all weights from a layer to a copy of it, in which attention may be replaced."""
    if not target.built:
        target.build_from_config(source.get_build_config())
    if isinstance(target, Performer) and type(source) in EXACT:
        copy_weights(source, target)
        return
    pairs = _children(source), _children(target)
    own = [
        _own_weights(layer, inside) for layer, inside in zip((source, target), pairs, strict=True)
    ]
    kinds = [[tuple(v.shape) for v in weights] for weights in own]
    if len(pairs[0]) != len(pairs[1]) or kinds[0] != kinds[1]:
        raise ValueError(
            f"The layer {source.name!r} cannot be made again from its configuration: its copy has "
            f"other weights. It has {len(pairs[0])} layers inside and weights of the shapes "
            f"{kinds[0]}; the copy {len(pairs[1])} and {kinds[1]}"
        )
    for value, variable in zip(*own, strict=True):
        variable.assign(value)
    for one, other in zip(*pairs, strict=True):
        _carry_weights(one, other)


def _own_weights(layer, children):
    inside = {id(v) for child in children for v in child.weights}
    return [v for v in layer.weights if id(v) not in inside]


def _exchange_inside(holder, choice):
    """Exchanges chosen attention layers that the classes of `holder` and others made themselves.

    Returns whether there were any.
    """
    exchanged, in_graph, shown = False, isinstance(holder, _GRAPHS), _shows_layers(holder)
    for child in _children(holder):
        if choice.selects(child):
            new = choice.place(child)
        elif _shows_layers(child) and any(map(choice.selects, layers_inside(child))):
            new = _copy_of(child, choice)
        else:
            exchanged |= _exchange_inside(child, choice)
            continue
        if in_graph:
            raise ValueError(
                f"The layer {child.name!r} inside {holder.name!r} cannot be replaced: the class "
                f"{type(holder).__name__} makes a graph of layers that its `get_config` does not "
                "contain"
            )
        _put(holder, child, new)
        without_scores(holder, new)
        exchanged = True
    if exchanged and not shown:
        holder.get_config = functools.partial(_refuse_config, type(holder).__name__, holder.name)
    return exchanged


def _shows_layers(model):
    """Whether it is a model whose configuration contains its layers."""
    return isinstance(model, _GRAPHS) and "layers" in model.get_config()


def _refuse_config(kind, name):
    """In the place of `get_config`."""
    raise NotImplementedError(
        f"{kind} {name!r} has attention layers that its class would not make, so it cannot be made "
        "again from a configuration. Save the weights (`save_weights`), and load them into "
        "`replace_attention` of the original model."
    )


def _put(holder, old, new):
    """Puts `new` where an attribute of `holder`, or a list or dict in one, holds `old`."""
    holder._tracker.replace_tracked_value("layers", old, new)
    places = 0
    for name, value in list(vars(holder).items()):
        if value is old:
            setattr(holder, name, new)
            places += 1
        elif isinstance(value, list | dict) and value is not holder._layers:
            for key in range(len(value)) if isinstance(value, list) else list(value):
                if value[key] is old:
                    value[key] = new
                    places += 1
    if not places:
        raise ValueError(
            f"The layer {old.name!r} inside {holder.name!r} cannot be replaced: it is in no "
            "attribute, nor in a list or dict that is one"
        )
