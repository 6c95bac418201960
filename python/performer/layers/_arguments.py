"""Arguments of layers and their rules, first those that `Performer` adds to the parent's."""

import dataclasses
import math
import numbers
import random
from typing import Any

import keras

from performer.checks import exact_window
from performer.features import feature_maps
from performer.features.feature_maps import LEARNED

METHODS = ("linear", "quadratic")
SCALINGS = (0, 1)
# Scores, T * S, of the dense form: 2048 * 2048, 32 MiB in float64 for one head and batch row.
DENSE_LIMIT = 2**22


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments that `Performer` adds to those of `MultiHeadAttention`, under the same names.

    The arguments of the parent are here for the rules only: `num_heads`, and `sliding_window`,
    which linear attention refuses.

    Raises:
        RuntimeError: linear attention without `supports`.
        ValueError: a value outside its range; a sliding window in linear attention.
    """

    attention_method: str
    supports: int | None
    scaling: int
    feature_map: Any
    feature_regularizer: Any
    redraw_interval: int | None
    num_key_value_heads: int | None
    max_segments: int | None
    dense_limit: int
    rotary_embedding: Any
    exact_window: int | None
    far_bias: Any
    exact_keys: int | None
    num_heads: dataclasses.InitVar[int]
    sliding_window: dataclasses.InitVar[int | None] = None

    def __post_init__(self, num_heads, sliding_window):
        _check_choice("attention_method", self.attention_method, METHODS)
        if self.linear and self.supports is None:
            raise RuntimeError("must have numbers of supports specified")
        if self.linear and sliding_window is not None:
            raise ValueError(
                "`sliding_window` must be None with attention_method='linear', which sums features "
                "over all keys, and cannot leave out those beyond a window. Use "
                "attention_method='quadratic'. "
                f"Received: sliding_window={sliding_window!r}"
            )
        _check_choice("scaling", self.scaling, SCALINGS)
        feature_maps.get(self.feature_map)
        self._check_learned()
        sizes = (
            "supports",
            "redraw_interval",
            "num_key_value_heads",
            "max_segments",
            "exact_keys",
            "dense_limit",
        )
        for name in sizes:
            value = getattr(self, name)
            if value is None and name != "dense_limit":
                continue
            limit = 2**63 if name in ("redraw_interval", "dense_limit") else 2**31
            object.__setattr__(self, name, check_size(name, value, limit))
        if self.rotary_embedding is not None and not callable(self.rotary_embedding):
            raise ValueError(
                "`rotary_embedding` must be None or a layer like `performer.RotaryEmbedding()`. "
                f"Received: rotary_embedding={self.rotary_embedding!r}"
            )
        if self.rotary_embedding is not None and not self.linear:
            raise ValueError(
                "`rotary_embedding` must be None with attention_method='quadratic', which is "
                "`keras.layers.MultiHeadAttention` and has no such argument. "
                f"Received: rotary_embedding={self.rotary_embedding!r}"
            )
        self._check_window()
        groups = self.num_key_value_heads
        if groups is not None and num_heads % groups:
            raise ValueError(
                "`num_key_value_heads` must divide `num_heads`. Received: "
                f"num_heads={num_heads}, num_key_value_heads={groups}"
            )

    def _check_learned(self):
        """The rules of `feature_regularizer`, and of what learned features do not have."""
        if self.feature_regularizer is not None:
            regularizer = keras.regularizers.get(self.feature_regularizer)
            object.__setattr__(self, "feature_regularizer", regularizer)
            if not self.learned:
                raise ValueError(
                    "`feature_regularizer` needs attention_method='linear' and "
                    "feature_map='learned': other features have no weights that train. Received: "
                    f"feature_regularizer={self.feature_regularizer!r}, "
                    f"attention_method={self.attention_method!r}, feature_map={self.feature_map!r}"
                )
        if self.learned and self.redraw_interval is not None:
            raise ValueError(
                "`redraw_interval` must be None with feature_map='learned', whose projections are "
                f"trained and never drawn again. Received: redraw_interval={self.redraw_interval!r}"
            )

    def _check_window(self):
        """The rules of `exact_window`, `exact_keys` and `far_bias`."""
        given = {name: getattr(self, name) for name in ("exact_window", "exact_keys")}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            if self.far_bias is not None:
                raise ValueError(
                    "`far_bias` needs `exact_window` or `exact_keys`: where every key is far it "
                    f"cancels. Received: far_bias={self.far_bias!r}"
                )
            return
        if not self.linear or feature_maps.get(self.feature_map).epilogue != "softmax":
            raise ValueError(
                f"`{next(iter(given))}` needs attention_method='linear' and a feature map of "
                "softmax, which estimates the weights that near keys have exactly. ('quadratic' "
                "is exact, and other maps are their kernel: there is nothing to make exact.) "
                f"Received: attention_method={self.attention_method!r}, "
                f"feature_map={self.feature_map!r}"
            )
        if self.exact_window is not None:
            object.__setattr__(self, "exact_window", _check_exact_window(self.exact_window))
        learned = isinstance(self.far_bias, str) and self.far_bias == LEARNED
        if self.far_bias is not None and not learned:
            object.__setattr__(self, "far_bias", check_number("far_bias", self.far_bias))

    @property
    def linear(self):
        """Whether attention is linear."""
        return self.attention_method == "linear"

    @property
    def learned(self):
        """Whether the projections of the features are weights that train."""
        named = isinstance(self.feature_map, str) and self.feature_map == LEARNED
        return self.linear and named

    def config(self):
        """The fields, as a layer's config holds them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rotary = self.rotary_embedding
        return {
            **values,
            "feature_regularizer": self.feature_regularizer
            and keras.regularizers.serialize(self.feature_regularizer),
            "feature_map": feature_maps.serialize(self.feature_map),
            "rotary_embedding": rotary and keras.saving.serialize_keras_object(rotary),
        }


def check_size(name, value, limit=2**31):
    """Returns `value`, an integer of at least 1 and below `limit`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    if value >= limit:
        power = limit.bit_length() - 1
        raise ValueError(f"`{name}` must be below 2**{power}. Received: {name}={value!r}")
    return int(value)


def check_number(name, value):
    """Returns `value`, a finite number, as a float; ValueError otherwise."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        result = float(value) if number else math.nan
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(
            f"`{name}` must be None, 'learned' or a finite number. Received: {name}={value!r}"
        )
    return result


def _check_exact_window(value):
    """Returns a window; ValueError in the words of layers otherwise."""
    try:
        return exact_window(value)
    except ValueError as error:
        raise ValueError(f"`exact_window`: {error}") from error


def check_rate(name, value):
    """Returns `value` as a float in [0, 1); ValueError otherwise."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be a number in [0, 1). Received: {name}={value!r}")
    return float(value)


def check_seed(name, value):
    """Returns `value`, an integer of 64 bits or None; ValueError otherwise."""
    if value is None:
        return None
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not -(2**63) <= value < 2**63:
        raise ValueError(
            f"`{name}` must be None or an integer of 64 bits. Received: {name}={value!r}"
        )
    return int(value)


def default_seed():
    """A seed from Python's generator, as Keras takes it: `keras.utils.set_random_seed` fixes it."""
    return random.randint(1, 10**9)


def clone_initializer(initializer):
    """Another initializer of the same configuration: without a seed its numbers differ."""
    return initializer.__class__.from_config(initializer.get_config())


def split_list(inputs):
    """`[query, value]` or `[query, value, key]` of a list call; ValueError for other lengths."""
    if len(inputs) not in (2, 3):
        raise ValueError(
            "A list of inputs must be [query, value] or [query, value, key]. "
            f"Received a list of {len(inputs)}"
        )
    return inputs[0], inputs[1:]


def _check_choice(name, value, choices):
    scalar = isinstance(value, str | numbers.Integral) and not isinstance(value, bool)
    if not scalar or value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {allowed}. Received: {name}={value!r}")
