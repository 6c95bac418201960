"""Feature maps: what turns a projection into the random features of linear attention.

A map says how a projection is drawn, which projection each side uses, which biases are added to
the log-features, and the function that makes the features:

    a[i, m] = f(sqrt(scale) w_query[m] . query[i]) + feature_bias[m]
    b[j, m] = f(sqrt(scale) w_key[m] . key[j]) + norm of key[j] + key_bias[j]

Attention weights are sum_m exp(a[i, m] + b[j, m]). With f one of "softmax", "relu" and "elu" the
compiled operators do the work, whatever the projections and biases are; with a function of its own
a map runs as plain TensorFlow: same memory and time per feature as any composition, slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from performer.checks import FEATURE_MAPS
from performer.features.projections import orthogonal_projection

LEARNED = "learned"


@keras.saving.register_keras_serializable(package="performer")
class FeatureMap:
    """A feature map; this one is FAVOR+, and the base of others.

    Attributes that differ are given by name, as in `FeatureMap(query_norm=False)`, and saved with
    a model. Of a map of your own override what differs. One with arguments returns them from
    `get_config`, and is registered with `keras.saving.register_keras_serializable`. A map
    with weights is a `keras.layers.Layer` as well: a Performer layer builds it with the shape
    (M, D) and tracks it after its own weights.

    Attributes:
        epilogue: "softmax" (f(u) = u, and the key norm), "relu" (f(u) = log(max(u, 0) +
            feature_epsilon)), "elu" (f(u) = log(elu(u) + 1)), or a function f of a floating tensor
            [..., M] to log-features of the same shape, made of TensorFlow operations.
        scale: factor of query . key, or None: D**-0.5 for "softmax", 1 otherwise.
        key_norm: whether "softmax" adds -scale |key|^2 / 2 to b; without it `key_bias` may hold
            another norm.
        feature_epsilon: of "relu".
        query_norm: whether, with `exact_window`, "softmax" subtracts scale |query|^2 / 2 from a.
            There, sum_m exp(a + b) / M has to be an estimate of exp(scale query . key) with all of
            its factors, also those that are the same for all keys or all features and cancel
            otherwise: put them into `feature_bias`. A map with a norm of its own in `key_bias`
            cannot have a window, because biases of keys count in the exact part too.

    Example: the map of hyperbolic features, of lower variance for the same number of draws.

    >>> import tensorflow as tf
    >>> from performer import Performer
    >>> from performer.feature_maps import FeatureMap
    >>> class Hyperbolic(FeatureMap):
    ...     def sides(self, projection):
    ...         both = tf.concat([projection, -projection], 0)
    ...         return both, both
    >>> layer = Performer(num_heads=2, key_dim=4, supports=8, feature_map=Hyperbolic())
    >>> layer(tf.zeros([1, 5, 6]), tf.zeros([1, 5, 6])).shape
    TensorShape([1, 5, 6])
    """

    epilogue: str | Callable[[tf.Tensor], tf.Tensor] = "softmax"
    scale: float | None = None
    key_norm: bool = True
    feature_epsilon: float = 1e-3
    query_norm: bool = True

    def __init__(self, **attributes):
        known = FeatureMap.__annotations__
        own = {name: attributes.pop(name) for name in known if name in attributes}
        if attributes and not isinstance(self, keras.layers.Layer):
            name, value = next(iter(attributes.items()))
            raise TypeError(
                f"FeatureMap takes the attributes {', '.join(known)}; got {name}={value!r}"
            )
        super().__init__(**attributes)
        for name, value in own.items():
            setattr(self, name, value)

    def draw(self, features, dim, *, scaling, seed) -> tf.Tensor:
        """Draws the projection, which a layer keeps as a weight.

        Args:
            features: M, the layer's `supports`.
            dim: D, the layer's `key_dim`.
            scaling: 0 or 1, as the layer's.
            seed: integer tensor [2]; the same seed must give the same projection.

        Returns:
            float32 [M, D].
        """
        return orthogonal_projection(features, dim, scaling=scaling, seed=seed)

    def sides(self, projection) -> tuple[tf.Tensor, tf.Tensor]:
        """The projections of both sides.

        Args:
            projection: float32 [M, D], as drawn.

        Returns:
            Those of query and key: [F, D] each, or [H, F, D] and [G, F, D] for different ones in
            each of the H query heads and G key/value heads; any number F of features.
        """
        return projection, projection

    def feature_bias(self, projection) -> tf.Tensor | None:
        """Bias of the query log-features, [F] or [H, F]; None for none."""
        del projection
        return None

    def key_bias(self, key) -> tf.Tensor | None:
        """Bias of the key log-features, [B, S] or [B, G, S], of key [B, S, G, D]; None for none."""
        del key
        return None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor: of this class, the attributes that were set."""
        return {name: x for name, x in vars(self).items() if name in FeatureMap.__annotations__}

    @classmethod
    def from_config(cls, config):
        """The map that `get_config` describes."""
        return cls(**config)


class Learned(FeatureMap):
    """The map of features whose projections and bias are weights: `feature_map="learned"`.

    A layer with it has, in the place of one projection, a tuple of three weights: the projections
    of queries `[H, M, D]` and of keys `[G, M, D]`, and the bias of queries `[H, M]`. They begin as
    FAVOR+, with the norm of the keys, and with a window with that of the queries.
    """

    def sides(self, projection):
        """The first two of the weights."""
        return projection[0], projection[1]

    def feature_bias(self, projection):
        """The last of the weights."""
        return projection[2]


class _Named(FeatureMap):
    """A map that differs from FAVOR+ by its function only."""

    def __init__(self, epilogue):
        super().__init__(epilogue=epilogue)


def get(identifier) -> FeatureMap:
    """The map that a layer's `feature_map` argument means.

    Args:
        identifier: "softmax", "relu", "elu", "learned"; an object with the attributes and methods
            of `FeatureMap`; or its serialized form.

    Returns:
        The object itself, or one with the named epilogue.

    Raises:
        ValueError: another string; an object without one of them, or with another epilogue.

    Example:

    >>> from performer import feature_maps
    >>> feature_maps.get("elu").epilogue
    'elu'
    """
    if isinstance(identifier, str) and identifier in FEATURE_MAPS:
        return _Named(identifier)
    if isinstance(identifier, str) and identifier == LEARNED:
        return Learned()
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    names = [n for n in vars(FeatureMap) if not n.startswith("_") and n != "query_norm"]
    missing = (
        [] if isinstance(identifier, str) else [n for n in names if not hasattr(identifier, n)]
    )
    if isinstance(identifier, type | str) or missing:
        raise ValueError(
            "`feature_map` must be one of 'softmax', 'relu', 'elu', 'learned', or an object with "
            "the attributes and methods of performer.feature_maps.FeatureMap. "
            f"Received: feature_map={identifier!r}"
            + (f", without {', '.join(missing)}" if missing else "")
        )
    epilogue = identifier.epilogue
    if not callable(epilogue) and epilogue not in FEATURE_MAPS:
        raise ValueError(
            "`feature_map.epilogue` must be one of 'softmax', 'relu', 'elu', or a function. "
            f"Received: feature_map.epilogue={epilogue!r}"
        )
    return identifier


def serialize(identifier):
    """The argument `feature_map` of a layer, in the form that a configuration holds.

    Args:
        identifier: what `get` takes.

    Returns:
        A string as it is, or the dict that Keras makes of an object.

    Example:

    >>> from performer import feature_maps
    >>> feature_maps.serialize("relu")
    'relu'
    """
    if isinstance(identifier, str | dict):
        return identifier
    return keras.saving.serialize_keras_object(identifier)
