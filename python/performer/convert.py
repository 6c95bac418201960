"""From models with `MultiHeadAttention` to models with `Performer`, and back.

`copy_weights` carries the weights of one attention layer to another, `replace_attention` exchanges
the attention layers of a whole model, and `calibrate` fits their features to data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

import keras
from keras.saving import deserialize_keras_object, serialize_keras_object
from keras.saving import get_registered_name as registered_name
from keras.src.models.functional import Functional

from performer.layers import Performer
from performer.layers._calibration import Calibration

_SUBLAYERS = ("query", "key", "value", "gate", "attention_output")
_EXACT = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# Models whose graph of layers is in their configuration.
_GRAPHS = (keras.Sequential, Functional)


def copy_weights(source, target) -> None:
    """Copies the dense kernels and biases of one attention layer to another.

    Between `Performer`, `MultiHeadAttention` and `GroupQueryAttention`, in any direction. They name
    and shape these weights alike. What else a layer has (the projection of a `Performer`, the state
    of a dropout) stays as it is.

    Args:
        source: Built attention layer.
        target: Attention layer with weights of the same shapes; built like `source` where it is
            not built yet.

    Raises:
        TypeError: Not one of these layers.
        ValueError: `source` is not built; a weight is missing on one side or has another shape
            there; a sublayer was quantized.

    Example:

    >>> import keras
    >>> from performer import Performer, convert
    >>> exact = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4)
    >>> exact.build((None, 10, 8), (None, 10, 8))
    >>> linear = Performer(num_heads=2, key_dim=4, supports=64)
    >>> convert.copy_weights(exact, linear)
    >>> bool((linear.query_dense.kernel.numpy() == exact.query_dense.kernel.numpy()).all())
    True
    """
    for name, layer in (("source", source), ("target", target)):
        if not isinstance(layer, _EXACT):
            raise TypeError(
                f"`{name}` must be a Performer, MultiHeadAttention or GroupQueryAttention layer. "
                f"Received: {name}={layer!r}"
            )
    if not source.built:
        raise ValueError(f"`source` must be built. Received: source={source!r}")
    if not target.built:
        target.build(**_build_shapes(source))
    given, wanted = _weights("source", source), _weights("target", target)
    for name in {**given, **wanted}:
        shapes = [
            None if w is None else tuple(w.shape) for w in (given.get(name), wanted.get(name))
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`source` and `target` must have the same weights. Of `{name}`, `source` "
                f"({source.name}) has the shape {shapes[0]}, `target` ({target.name}) {shapes[1]}"
            )
    for name, weight in wanted.items():
        weight.assign(given[name])


def _weights(argument, layer):
    """The dense weights of an attention layer, by names like "query/kernel"."""
    weights = {}
    for sublayer in _SUBLAYERS:
        attribute = {"attention_output": "output"}.get(sublayer, sublayer)
        dense = getattr(layer, f"_{attribute}_dense", None)
        if dense is None:
            continue
        if getattr(dense, "quantization_mode", None):
            raise ValueError(
                f"The weights of a quantized layer cannot be copied. Received: {argument} with "
                f"{sublayer!r} in {dense.quantization_mode!r}"
            )
        # With LoRA this is the merged kernel, and assigning it is refused by Keras.
        weights[f"{sublayer}/kernel"] = dense.kernel
        if dense.bias is not None:
            weights[f"{sublayer}/bias"] = dense.bias
    return weights


def _build_shapes(layer):
    """Keyword arguments of a layer's `build`, from those that it was built with."""
    config = layer.get_build_config()
    return config.get("shapes_dict") or config


def replace_attention(model, *, supports=None, where=None, **arguments):
    """A copy of a model with `Performer` layers in the place of exact attention.

    Replaced are layers of the types `keras.layers.MultiHeadAttention` and `GroupQueryAttention`
    (not of subclasses), wherever they are: in functional and sequential models, models inside
    models, wrappers, and layers or models of one's own. The weights of all layers come along.
    Trained softmax attention is only approximated by linear attention: train the new model on.

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
    if not any(map(choice.selects, _layers_inside(model))):
        found = sorted({type(layer).__name__ for layer in _layers_inside(model)})
        raise ValueError(
            "`model` must have a MultiHeadAttention or GroupQueryAttention layer"
            + ("" if where is None else " that `where` selects")
            + f". Received: {model.name!r}, with layers of the types {', '.join(found)}"
        )
    return _copy_of(model, choice)


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` found, printed as a table.

    Attributes:
        layers: a `Calibration` for each layer, in the order in which the model calls them.
    """

    layers: list[Calibration]

    def __str__(self):
        """A line for each layer."""
        return "\n".join(map(str, self.layers))

    def save(self, path):
        """Writes all errors and methods as JSON."""
        with open(path, "w") as file:
            json.dump([layer.as_dict() for layer in self.layers], file, indent=1)


def calibrate(model, data, *, steps=8, seed=0) -> CalibrationReport:
    """Fits the learned features of a model to its own queries and keys, without training.

    The model is called once on the data. Every `Performer` layer with `feature_map="learned"` is
    calibrated with the inputs and masks that reach it, see `Performer.calibrate`, and then goes
    on with the weights it has found: later layers are calibrated with what the earlier ones now
    give them. No other weight changes. A layer that is called several times is calibrated by the
    first call.

    Args:
        model: Keras model or layer, such as `replace_attention(..., feature_map="learned")` makes.
        data: Inputs of one call, arrays or tensors: 16 to 32 sequences of the length and kind
            that the model is for.
        steps, seed: As in `Performer.calibrate`.

    Returns:
        A `CalibrationReport`: errors of every head of every layer, before and after.

    Raises:
        ValueError: The model has no layer with learned features, or the call reaches none; and as
            `Performer.calibrate`.

    Example:

    >>> import keras, tensorflow as tf
    >>> from performer import convert
    >>> x = keras.Input((64, 16))
    >>> exact = keras.Model(x, keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x))
    >>> linear = convert.replace_attention(exact, supports=16, feature_map="learned", seed=1)
    >>> data = tf.random.stateless_normal([8, 64, 16], seed=[1, 2])
    >>> (layer,) = convert.calibrate(linear, data).layers
    >>> bool(layer.after.mean() < 0.8 * layer.before.mean())
    True
    """
    layers = [
        layer
        for layer in _layers_inside(model)
        if isinstance(layer, Performer) and layer.learns_features
    ]
    found: dict[int, Calibration] = {}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_calibrated_by_its_first_call(layer, found, steps, seed))
        if layers:
            model(data, training=False)
    if not found:
        raise ValueError(
            "`model` must have a Performer layer with attention_method='linear' and "
            f"feature_map='learned' that a call reaches. Received: {model.name!r}, with "
            f"{len(layers)} of them"
        )
    return CalibrationReport(list(found.values()))


@contextlib.contextmanager
def _calibrated_by_its_first_call(layer, found, steps, seed):
    """The first call of `layer` calibrates it; `found` gets the result, by the layer's id."""
    call = layer.call
    signature = inspect.signature(call)
    known = inspect.signature(layer.calibrate).parameters

    @functools.wraps(call)
    def calibrated(*args, **kwargs):
        if id(layer) not in found:
            given = signature.bind(*args, **kwargs).arguments
            given = {name: x for name, x in given.items() if name in known}
            found[id(layer)] = layer.calibrate(**given, steps=steps, seed=seed)
        return call(*args, **kwargs)

    layer.call = calibrated
    try:
        yield
    finally:
        del layer.call


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which layers are replaced (by their names), and what the new ones are given."""

    where: Callable[[str], bool]
    arguments: dict[str, Any]

    def selects(self, layer):
        return type(layer) in _EXACT and self.where(layer.name)

    def performer(self, layer):
        """The layer that takes the place of an exact one, not built."""
        config = layer.get_config()
        if isinstance(layer, keras.layers.GroupQueryAttention):
            config["key_dim"] = config.pop("head_dim")
            config["num_heads"] = config.pop("num_query_heads")
        config.update(self.arguments)
        if isinstance(config["dtype"], dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        try:
            return Performer(**config)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"The layer {layer.name!r} cannot be replaced by a Performer: {error}"
            ) from error


def _children(layer):
    """The layers that a layer tracks itself, in order."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def _layers_inside(layer):
    return list(layer._flatten_layers())


def _copy_of(model, choice):
    """A model with the weights of `model`, in which the chosen layers are replaced."""
    classes = {type(layer) for layer in _layers_inside(model)}
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
    exact = config.get("class_name") in {kind.__name__ for kind in _EXACT}
    if exact and str(config.get("module")).startswith("keras."):
        layer = deserialize_keras_object({k: v for k, v in config.items() if k != "build_config"})
        if choice.selects(layer):
            return {**config, **serialize_keras_object(choice.performer(layer))}
    return {k: _with_replacements(v, choice) for k, v in config.items()}


def _carry_weights(source, target):
    """Copies all weights from a layer to a copy of it, in which attention may be replaced."""
    if not target.built:
        target.build_from_config(source.get_build_config())
    if isinstance(target, Performer) and type(source) in _EXACT:
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
    exchanged = False
    for child in _children(holder):
        if choice.selects(child):
            new = choice.performer(child)
            copy_weights(child, new)
        elif isinstance(child, _GRAPHS) and any(map(choice.selects, _layers_inside(child))):
            new = _copy_of(child, choice)
        else:
            exchanged |= _exchange_inside(child, choice)
            continue
        _put(holder, child, new)
        exchanged = True
    if exchanged and not isinstance(holder, _GRAPHS):
        holder.get_config = functools.partial(_refuse_config, type(holder).__name__, holder.name)
    return exchanged


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
