"""Callbacks for training models with `Performer` layers: redraws, and how good the features are."""

from __future__ import annotations

import contextlib
import functools
import inspect

import keras
import tensorflow as tf

from performer.features.diagnostics import approximation_error
from performer.layers import Performer
from performer.layers._arguments import check_size
from performer.layers._masks import fold_segments
from performer.layers._state import position_of

_SCALAR = 1  # DATA_CLASS_SCALAR of TensorFlow's summary.proto


def linear_layers(model) -> list[Performer]:
    """The `Performer` layers in a model that attend linearly, in the model's order.

    Args:
        model: a `keras.Model`, or any layer that holds layers.

    Example:

    >>> import keras
    >>> from performer import PerformerEncoder, callbacks
    >>> inputs = keras.Input((10, 8))
    >>> model = keras.Model(inputs, PerformerEncoder(16, num_heads=2)(inputs))
    >>> [layer.name for layer in callbacks.linear_layers(model)]
    ['self_attention_layer']
    """
    return [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, Performer) and layer.attention_method == "linear"
    ]


class RedrawProjections(keras.callbacks.Callback):
    """Redraws the projections of all linear `Performer` layers of the model while it trains.

    Layers with learned features have no projection that is drawn, and stay as they are.

    An alternative to the layers' own `redraw_interval`, for whole epochs or a schedule of one's
    own. Draw number n of a layer is a function of its seed and n, whatever redraws it.

    Args:
        every: After how many batches or epochs, or a function from the number of batches or
            epochs so far (1 after the first) to whether to redraw.
        unit: "batch" or "epoch".

    Raises:
        ValueError: `every` is no positive integer or function, `unit` another one.

    Example:

    >>> from performer.callbacks import RedrawProjections
    >>> early_and_rarely = RedrawProjections(lambda epoch: epoch in (1, 2, 4, 8), unit="epoch")
    """

    def __init__(self, every=1, unit="epoch"):
        super().__init__()
        if not isinstance(unit, str) or unit not in ("batch", "epoch"):
            raise ValueError(f"`unit` must be 'batch' or 'epoch'. Received: unit={unit!r}")
        self._every = every if callable(every) else check_size("every", every)
        self._unit = unit
        self._count = 0

    def on_train_begin(self, logs=None):
        """Starts to count."""
        self._count = 0

    def on_train_batch_end(self, batch, logs=None):
        """Counts a batch."""
        self._step("batch")

    def on_epoch_end(self, epoch, logs=None):
        """Counts an epoch."""
        self._step("epoch")

    def _step(self, unit):
        if unit != self._unit:
            return
        self._count += 1
        every = self._every
        if every(self._count) if callable(every) else self._count % every == 0:
            for layer in linear_layers(self.model):
                if layer.learned_projection is None:
                    layer.redraw()


class LogApproximation(keras.callbacks.Callback):
    """Writes to TensorBoard how well random features approximate softmax on a sample.

    After every epoch, for every linear `Performer` layer of the model, as scalars:

    - `performer/<layer>/error`: distance of the estimated attention weights to those of softmax,
      relative to the distance of uniform weights: 0 is exact, 1 is no better than not to look.
    - `performer/<layer>/redraws`: how often its projection has been redrawn; 0 where it is learned.

    The weights are those of the queries and keys that the layer gets when the model is called on
    the sample, without masks; see `performer.diagnostics.approximation_error`. The call is one of
    inference: it redraws nothing.

    Args:
        log_dir: Directory of the TensorBoard files.
        sample: Inputs that the model is called with; a few rows do.
        rows: How many rows of the sample to use.
        positions: At most how many queries and keys of each row, evenly spread.

    Raises:
        ValueError: `rows` or `positions` is no positive integer.

    Example:

    >>> import tempfile, keras, tensorflow as tf
    >>> from performer import Performer
    >>> from performer.callbacks import LogApproximation
    >>> x = keras.Input((16, 8))
    >>> model = keras.Model(x, Performer(num_heads=2, key_dim=4, supports=32)(x, x))
    >>> model.compile("sgd", "mse")
    >>> data = tf.random.normal([4, 16, 8])
    >>> logger = LogApproximation(tempfile.mkdtemp(), data)
    >>> _ = model.fit(data, data, verbose=0, callbacks=[logger])
    """

    def __init__(self, log_dir, sample, *, rows=4, positions=256):
        super().__init__()
        self._log_dir = str(log_dir)
        self._rows = check_size("rows", rows)
        self._positions = check_size("positions", positions)
        self._sample = tf.nest.map_structure(lambda x: x[: self._rows], sample)
        self._writer = tf.summary.create_noop_writer()

    def on_train_begin(self, logs=None):
        """Opens the file."""
        self._writer = tf.summary.create_file_writer(self._log_dir)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the scalars of an epoch."""
        with self._writer.as_default(step=epoch):
            for name, error, redraws in self.measure():
                _write_scalar(f"performer/{name}/error", error)
                _write_scalar(f"performer/{name}/redraws", redraws)
        self._writer.flush()

    def measure(self) -> list[tuple[str, float, int]]:
        """Name, error and redraws of every linear layer that the model calls, as it is now."""
        found: list[tuple] = []
        with contextlib.ExitStack() as stack:
            for layer in linear_layers(self.model):
                stack.enter_context(_heads_of_calls(layer, self._positions, found))
            self.model(self._sample, training=False)
        return [
            (layer.name, _error(layer, query, key), _redraws(layer)) for layer, query, key in found
        ]

    def on_train_end(self, logs=None):
        """Closes the file."""
        self._writer.close()


def _write_scalar(name, value):
    """`tf.summary.scalar`, which needs TensorBoard where it only writes."""
    metadata = tf.compat.v1.SummaryMetadata(data_class=_SCALAR)
    metadata.plugin_data.plugin_name = "scalars"
    tf.summary.write(name, tf.cast(value, tf.float32), metadata=metadata)


@contextlib.contextmanager
def _heads_of_calls(layer, positions, found):
    """Adds (layer, query heads, key heads), thinned out, to `found` at every call of `layer`."""
    call = layer.call

    def thin(x):
        length = tf.shape(x)[1]
        kept = tf.linspace(0.0, tf.cast(length - 1, tf.float32), tf.minimum(length, positions))
        return tf.gather(x, tf.cast(tf.round(kept), tf.int32), axis=1)

    signature = inspect.signature(call)

    @functools.wraps(call)
    def recorded(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        query, value, key = given["query"], given["value"], given.get("key")
        key = value if key is None else key
        segment_ids = given.get("segment_ids")
        if segment_ids is not None:
            segment_ids = fold_segments(segment_ids, key, layer.attention_axes)
        start = position_of(given.get("initial_state"))
        heads = layer._heads(query, key, value, start, segment_ids)
        found.append((layer, *map(thin, heads[:2])))
        return call(*args, **kwargs)

    layer.call = recorded
    try:
        yield
    finally:
        del layer.call


def _redraws(layer):
    return 0 if layer.redraws is None else int(layer.redraws)


def _error(layer, query, key):
    features = layer.random_features()
    options = {**features.for_attention(), "key_bias": features.feature_map.key_bias(key)}
    return float(approximation_error(query, key, **options))
