"""The projection of a layer: a saved weight, its fingerprint, and the schedule of its redraws."""

import itertools
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from performer.features import feature_maps
from performer.ops.fingerprint import fingerprint

# Joined to the layer's seed, so that projections share no random stream with dropout.
_STREAM = 0x46_41_56_4F_52
FIRST_FAR_BIAS = -4.0
_mutex_numbers = itertools.count()


def seed_of_draw(seed, draw):
    """The seed, int64 `[2]`, of draw number `draw` of a layer with this seed."""
    stream = tf.stack([tf.cast(seed, tf.int64), tf.constant(_STREAM, tf.int64)])
    return tf.random.experimental.stateless_fold_in(stream, tf.cast(draw, tf.int64), alg="philox")


class Features(NamedTuple):
    """The random features of one call.

    Attributes:
        feature_map: `performer.feature_maps.FeatureMap`, or the like.
        projection: float32 `[M, D]`, as drawn; of learned features, their weights (see
            `performer.feature_maps.Learned`).
        draw: int64 scalar, the projection's fingerprint, which states carry; None in calls of
            learned features that take and return no state.
        exact_window: the layer's, or None.
        far_bias: a number, or float32 `[H]`; None for none.
        exact_keys: the layer's, or None.
    """

    feature_map: Any
    projection: Any
    draw: tf.Tensor | None
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


class _Projection(keras.Variable):
    """The variable of a projection, which keeps another one, its fingerprint, true to it.

    Whatever replaces the values replaces the fingerprint: `assign`, and so Keras's files and
    `set_weights`, and TensorFlow's checkpoints.
    """

    def __init__(self, *args, fingerprint_variable, **kwargs):
        super().__init__(*args, **kwargs)
        self._fingerprint_variable = fingerprint_variable

    def assign(self, value):
        """Sets the values."""
        value = super().assign(value)
        self._fingerprint_variable.assign(fingerprint(value))
        return value

    def assign_with(self, value, fingerprint_of_value):
        """Sets the values, whose fingerprint is known."""
        super().assign(value)
        self._fingerprint_variable.assign(fingerprint_of_value)

    def _restore_from_tensors(self, restored_tensors):
        result = super()._restore_from_tensors(restored_tensors)
        self._fingerprint_variable.assign(fingerprint(self.value))
        return result


class RandomProjection(keras.layers.Layer):
    """Holds and draws the projection `[M, D]` of a `Performer` layer.

    Draw number n is a function of the saved seed and n alone. A model that is saved, restored
    (in another process, or with another `seed` in its configuration) and trained on therefore
    draws the projections that it would have drawn without the interruption, compiled by XLA or
    not.

    All state is in weights (none of them trainable, none ever cast): `projection` float32
    `[M, D]`, `redraws` int64 (how often it has been redrawn), `calls` int64 (training calls since)
    and `base_seed` int64. A fifth one, `fingerprint` int64, follows from the projection: no file
    holds it. It is a weight so that a call need not compute it.

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
        # Eagerly one draw serves both variables; in a graph each one has its own initializer.
        drawn = self._sample(self._seed, 0) if tf.executing_eagerly() else None
        # The number, not the name of an object, which differs from process to process.
        self._mutex = f"performer_redraw_{next(_mutex_numbers)}"

        def first():
            return self._sample(self._seed, 0) if drawn is None else drawn

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

        # Before the projection: `set_weights` then ends with the fingerprint of what it assigned.
        self.fingerprint = state("fingerprint", lambda shape, dtype=None: fingerprint(first()))
        with keras.name_scope(self.name, caller=self):
            self.projection = _Projection(
                lambda shape, dtype=None: first(),
                shape=(self._features, self._dim),
                dtype="float32",
                trainable=False,
                autocast=False,
                aggregation="only_first_replica",
                name="projection",
                fingerprint_variable=self.fingerprint,
            )
        self.redraws = state("redraws", "zeros")
        self._track_trackable(self.redraws, "draw")  # its name in checkpoints of version 0.1.0
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

    def current_features(self, training, with_draw=True):
        """The `Features` to use in this call; see `current`. `with_draw` costs nothing here."""
        del with_draw
        return Features(self._feature_map, *self.current(training))

    def draw_number(self):
        """The number that states carry, int64: the projection's `fingerprint`."""
        return self.fingerprint.value

    def current(self, training):
        """The projection to use in this call, float32 `[M, D]`, and its fingerprint.

        In training with a `redraw_interval`, this counts the call, and first draws the next
        projection if `redraw_interval` calls have used the present one. It works eagerly, in
        graphs, under XLA and in Keras's stateless scopes, for which the branch returns a value and
        assigns nothing. Calls of several threads count one after another.
        """
        if not training or self._redraw_interval is None:
            return self.projection.value, self.fingerprint.value
        return self._one_at_a_time(self._count_call)

    def redraw(self):
        """Draws the next projection now and resets the count of training calls."""

        def draw_next():
            redraws = self.redraws.value + 1
            self.projection.assign(self._sample(self.base_seed.value, redraws))
            self.redraws.assign(redraws)
            self.calls.assign(tf.zeros_like(self.calls.value))

        self._one_at_a_time(draw_next)

    def _count_call(self):
        """Counts a training call, and draws where it is due; returns as `current`."""
        calls, redraws = self.calls.value, self.redraws.value
        due = calls >= self._redraw_interval

        def draw_next():
            projection = self._sample(self.base_seed.value, redraws + 1)
            return projection, fingerprint(projection)

        projection, number = tf.cond(
            due,
            draw_next,
            lambda: (tf.identity(self.projection.value), tf.identity(self.fingerprint.value)),
        )
        self.projection.assign_with(projection, number)
        self.redraws.assign(redraws + tf.cast(due, tf.int64))
        self.calls.assign(tf.where(due, tf.ones_like(calls), calls + 1))
        return projection, number

    def _one_at_a_time(self, change):
        """Calls `change`, which reads and assigns weights, while no other thread does.

        XLA knows no mutex, and needs none: a compiled program holds the variables that it assigns.
        Replicas wait for each other where they assign, and so must not wait here.
        """
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        in_xla = graph is not None and control_flow_util.GraphOrParentsInXlaContext(graph)
        if in_xla or tf.distribute.has_strategy():
            return change()
        with tf.device("/CPU:0"):
            # Made by name wherever it runs: a variable of this kind could not be exported.
            mutex = tf.raw_ops.MutexV2(container="", shared_name=self._mutex)
            lock = tf.raw_ops.MutexLock(mutex=mutex)
        with tf.control_dependencies([lock]):
            result = change()
            # In a graph these reads come after the assignments.
            changed = [
                tf.identity(weight.value)
                for weight in (self.projection, self.fingerprint, self.redraws, self.calls)
            ]
        with tf.control_dependencies(changed):
            tf.raw_ops.ConsumeMutexLock(mutex_lock=lock)
        return result

    def save_own_variables(self, store):
        """Writes the weights of which the others follow, as version 0.1.0 did."""
        for place, weight in enumerate(self._saved()):
            store[str(place)] = weight

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote; the fingerprint follows."""
        saved = self._saved()
        if len(store.keys()) != len(saved):
            raise ValueError(
                f"Layer '{self.name}' expected {len(saved)} variables, but the file has "
                f"{len(store.keys())}"
            )
        for place, weight in enumerate(saved):
            weight.assign(store[str(place)])

    def _saved(self):
        return self.projection, self.redraws, self.calls, self.base_seed

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "checkpoint":
            return {name: x for name, x in children.items() if x is not self.fingerprint}
        return children

    def _sample(self, seed, draw):
        """Draw number `draw`, float32 `[M, D]`."""
        return self._feature_map.draw(
            self._features, self._dim, scaling=self._scaling, seed=seed_of_draw(seed, draw)
        )
