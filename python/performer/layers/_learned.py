"""The projections of a layer whose features are learned: weights of every head, and their draw."""

import contextlib
import contextvars

import keras
import tensorflow as tf

from performer.features import feature_maps
from performer.features.projections import orthogonal_projection
from performer.layers._projection import Features, seed_of_draw
from performer.ops.fingerprint import fingerprint

_graph_of_numbers: contextvars.ContextVar = contextvars.ContextVar("graph", default=None)


@contextlib.contextmanager
def unchanged_weights():
    """Where no weight changes: numbers of learned features are computed in the graph in force here.

    A loop that is built within has them computed once, not in every step.
    """
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    token = _graph_of_numbers.set(graph)
    try:
        yield
    finally:
        _graph_of_numbers.reset(token)


class LearnedProjection(keras.layers.Layer):
    """Holds what the features of a `Performer` with `feature_map="learned"` are made of.

    The weights are float32 under every dtype policy, trained by the optimizer and never cast:
    `query_projection` `[H, M, D]`, `key_projection` `[G, M, D]` and `query_bias` `[H, M]`. They
    begin as FAVOR+: every key/value head has a block-orthogonal draw of its own, the query heads
    that read it have the same one, and the bias is 0.

    Args:
        features: M, number of random features.
        dim: D, size of a query head.
        heads: H, the query heads.
        groups: G, the key/value heads.
        scaling: 0 draws the norm of every row, 1 sets it to sqrt(D).
        seed: integer.
        regularizer: of both projections; `None` for none.
    """

    def __init__(self, features, dim, heads, groups, *, scaling, seed, regularizer=None, name=None):
        super().__init__(dtype="float32", autocast=False, name=name)
        self._sizes = features, dim, heads, groups
        self._scaling = scaling
        self._seed = seed
        self._regularizer = regularizer
        self.feature_map = feature_maps.get(feature_maps.LEARNED)

    def build(self):
        """Creates the weights."""
        features, dim, heads, groups = self._sizes

        def draw(repeats):
            drawn = orthogonal_projection(
                features, dim, scaling=self._scaling, seed=seed_of_draw(self._seed, 0), heads=groups
            )
            return tf.repeat(drawn, repeats, 0)

        def projection(name, heads):
            return self.add_weight(
                name=name,
                shape=(heads, features, dim),
                initializer=lambda shape, dtype=None: draw(heads // groups),
                regularizer=self._regularizer,
                dtype="float32",
                autocast=False,
            )

        self.query_projection = projection("query_projection", heads)
        self.key_projection = projection("key_projection", groups)
        self.query_bias = self.add_weight(
            name="query_bias",
            shape=(heads, features),
            initializer="zeros",
            dtype="float32",
            autocast=False,
        )

    @property
    def features(self):
        """M, the number of features of a key."""
        return self._sizes[0]

    def current_features(self, training, with_draw=True):
        """The `Features` to use in this call; their `draw` is None without `with_draw`."""
        del training
        weights = (self.query_projection, self.key_projection, self.query_bias)
        return Features(
            self.feature_map,
            tuple(weight.value for weight in weights),
            self.draw_number() if with_draw else None,
        )

    def draw_number(self):
        """The number that states carry, int64: the `fingerprint` of all weights as they are now.

        The query side counts, bias and all: a state read by other queries says something else.
        """
        graph = _graph_of_numbers.get()
        with contextlib.nullcontext() if graph is None else graph.as_default():
            query = (self.query_projection.value, self.query_bias.value[..., tf.newaxis])
            return fingerprint((tf.concat(query, -1), self.key_projection.value))
