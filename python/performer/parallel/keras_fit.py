"""`fit`, `evaluate` and `predict` of Keras 3 over several workers."""

from __future__ import annotations

import functools

import tensorflow as tf

_replaced: list = []


def enable_fit() -> None:
    """Lets Keras 3 models train by `fit` under `tf.distribute.MultiWorkerMirroredStrategy`.

    Keras 3 (tried: 3.12.4, 3.13.2, 3.14.1, 3.15.1) fails there in two places: it reduces a whole
    structure of inputs where only their shapes are needed, to build the model, and averages scalar
    metrics over an axis that scalars do not have. This function replaces both for multi-worker
    strategies, in this process; other strategies keep what Keras does. Call it once, before `fit`.
    The change to Keras itself is in docs/keras-multi-worker-fit.patch.

    Example:

    >>> from performer import parallel
    >>> parallel.enable_fit()
    """
    from keras.src.backend.tensorflow import trainer  # exists with this backend only

    if _replaced:
        return
    original_build = trainer.TensorFlowTrainer._maybe_symbolic_build
    original_reduce = trainer.reduce_per_replica

    @functools.wraps(original_build)
    def build(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if iterator is not None and _has_workers(strategy):
            for _, _, batches in iterator:
                data_batch = tf.nest.map_structure(
                    lambda x: strategy.experimental_local_results(x)[0], next(batches)
                )
                break
            iterator = None
        return original_build(self, iterator, data_batch)

    @functools.wraps(original_reduce)
    def reduce(values, strategy, reduction):
        if reduction not in ("auto", "mean") or not _has_workers(strategy):
            return original_reduce(values, strategy, reduction)
        return tf.nest.map_structure(lambda x: strategy.reduce("MEAN", x, axis=None), values)

    _replaced.extend([original_build, original_reduce])
    trainer.TensorFlowTrainer._maybe_symbolic_build = build
    trainer.reduce_per_replica = reduce


def _has_workers(strategy) -> bool:
    """Whether a strategy is one of several workers."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and strategy.num_replicas_in_sync > 1
    )
