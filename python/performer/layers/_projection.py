"""The projection of a layer: a saved weight, the counter of its draws and their schedule."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from performer.features import feature_maps

# Joined to the layer's seed, so that projections share no random stream with dropout.
_STREAM = 0x46_41_56_4F_52
FIRST_FAR_BIAS = -4.0


class Features(NamedTuple):
    """The random features of one call.

    Attributes:
        feature_map: `performer.feature_maps.FeatureMap`, or the like.
        projection: float32 `[M, D]`, as drawn.
        draw: int64 scalar, number of the draw: how often the projection has been redrawn.
        exact_window: the layer's, or None.
        far_bias: a number, or float32 `[H]`; None for none.
        exact_keys: the layer's, or None.
    """

    feature_map: Any
    projection: tf.Tensor
    draw: tf.Tensor
    exact_window: int | None = None
    far_bias: Any = None
    exact_keys: int | None = None

    def for_keys(self):
        """The arguments of `summarize` that say how features are made."""
        return {
            "projection": self.feature_map.sides(self.projection),
            "feature_map": self.feature_map.epilogue,
            "scale": self.feature_map.scale,
            "key_norm": self.feature_map.key_norm,
            "feature_epsilon": self.feature_map.feature_epsilon,
        }

    def for_attention(self):
        """Those of `favor_attention`."""
        return {
            **self.for_keys(),
            "feature_bias": self.feature_map.feature_bias(self.projection),
        }

    @property
    def has_exact_keys(self):
        """Whether some weights are exact, with which those of features have to be comparable."""
        return self.exact_window is not None or self.exact_keys is not None

    def for_window(self):
        """What `favor_attention` is given besides, in a layer with exact keys."""
        if not self.has_exact_keys:
            return {}
        return {
            "exact_window": self.exact_window,
            "far_bias": self.far_bias,
            "exact_keys": self.exact_keys,
            "query_norm": getattr(self.feature_map, "query_norm", True),
        }

    def for_queries(self):
        """Those of `read`."""
        return {k: v for k, v in self.for_attention().items() if k != "key_norm"}


class FarBias(keras.layers.Layer):
    """Holds the log of the factor of all far weights, one for each query head, float32 `[H]`.

    It starts at -4. Early in training attention to far keys is noise, exact attention too, and near
    keys tell most; from there the weight finds its balance.
    """

    def __init__(self, heads, trainable=True):
        super().__init__(dtype="float32", autocast=False, name="far_bias", trainable=trainable)
        self._heads = heads

    def build(self):
        """Creates the weight."""
        self.bias = self.add_weight(
            name="bias",
            shape=(self._heads,),
            initializer=keras.initializers.Constant(FIRST_FAR_BIAS),
            dtype="float32",
            autocast=False,
        )


class RandomProjection(keras.layers.Layer):
    """Holds and draws the projection `[M, D]` of a `Performer` layer.

    Draw number n is a function of the saved seed and n alone. A model that is saved, restored
    (in another process, or with another `seed` in its configuration) and trained on therefore
    draws the projections that it would have drawn without the interruption, compiled by XLA or
    not.

    All state is in weights (none of them trainable, none ever cast): `projection` float32
    `[M, D]`, `draw` int64 (how often it has been redrawn), `calls` int64 (training calls since)
    and `base_seed` int64.

    Args:
        features: M, number of random features.
        dim: D, size of a query head.
        scaling: 0 draws the norm of every row, 1 sets it to sqrt(D).
        seed: integer.
        redraw_interval: number of training calls that use one draw; `None`: all.
        feature_map: name of a feature map, or an object like
            `performer.feature_maps.FeatureMap`, which draws.
    """

    def __init__(
        self,
        features,
        dim,
        *,
        scaling,
        seed,
        redraw_interval=None,
        feature_map="softmax",
        name=None,
    ):
        super().__init__(trainable=False, dtype="float32", autocast=False, name=name)
        self._features = features
        self._dim = dim
        self._scaling = scaling
        self._seed = seed
        self._redraw_interval = redraw_interval
        self._feature_map = feature_maps.get(feature_map)

    def build(self):
        """Creates the weights; the projection is draw number 0."""
        if isinstance(self._feature_map, keras.layers.Layer) and not self._feature_map.built:
            self._feature_map.build((self._features, self._dim))

        def state(name, initializer, shape=(), dtype="int64"):
            return self.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer=initializer,
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
            )

        self.projection = state(
            "projection",
            lambda shape, dtype=None: self._sample(self._seed, 0),
            shape=(self._features, self._dim),
            dtype="float32",
        )
        self.draw = state("draw", "zeros")
        self.calls = state("calls", "zeros")
        self.base_seed = state(
            "base_seed", lambda shape, dtype=None: tf.constant(self._seed, tf.int64)
        )

    @property
    def feature_map(self):
        """The feature map, an object."""
        return self._feature_map

    @property
    def features(self):
        """Number of features of a key: M, unless the feature map has more or fewer of them."""
        return self._feature_map.sides(self.projection.value)[1].shape[-2]

    def current_features(self, training):
        """The `Features` to use in this call; see `current`."""
        return Features(self._feature_map, self.current(training), self.draw.value)

    def current(self, training):
        """The projection to use in this call, float32 `[M, D]`.

        In training with a `redraw_interval`, this counts the call, and first draws the next
        projection if `redraw_interval` calls have used the present one. It works eagerly, in
        graphs, under XLA and in Keras's stateless scopes, for which the branch returns a value and
        assigns nothing.
        """
        if not training or self._redraw_interval is None:
            return self.projection.value
        calls, draw = self.calls.value, self.draw.value
        due = calls >= self._redraw_interval
        projection = tf.cond(
            due,
            lambda: self._sample(self.base_seed.value, draw + 1),
            lambda: tf.identity(self.projection.value),
        )
        self.projection.assign(projection)
        self.draw.assign(draw + tf.cast(due, tf.int64))
        self.calls.assign(tf.where(due, tf.ones_like(calls), calls + 1))
        return projection

    def redraw(self):
        """Draws the next projection now and resets the count of training calls."""
        draw = self.draw.value + 1
        self.projection.assign(self._sample(self.base_seed.value, draw))
        self.draw.assign(draw)
        self.calls.assign(tf.zeros_like(self.calls.value))

    def _sample(self, seed, draw):
        """Draw number `draw`, float32 `[M, D]`."""
        stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(_STREAM, tf.int64)])
        return self._feature_map.draw(
            self._features,
            self._dim,
            scaling=self._scaling,
            seed=tf.random.experimental.stateless_fold_in(
                stream, tf.cast(draw, tf.int64), alg="philox"
            ),
        )
