"""Queries, keys and values of attention layers, kept in files, and what exact attention makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tensorflow as tf

from performer.convert.calls import first_heads
from performer.layers._calibration import Samples
from performer.layers._masks import FoldedMasks

# Queries whose scores are in memory at a time.
_QUERIES = 512
_HELD_OUT = 5  # every how many batches, or sequences of one batch, one is for measuring only


def held_out_batches(count) -> set[int]:
    """Which of `count` batches are for measuring only; none if there is only one."""
    return set(range(0, count, _HELD_OUT)) if count > 1 else set()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some sequences of one call of a layer.

    Attributes:
        heads: query `[B, T, H, D]`, key `[B, S, G, D]`, value `[B, S, G, E]`, float32.
        masks: `FoldedMasks` of them.
        exact: outputs of exact attention, `[B, T, H, E]`, 0 where a query sees nothing.
        uniform: the means of the values that queries see, likewise.
    """

    heads: tuple
    masks: FoldedMasks
    exact: tf.Tensor
    uniform: tf.Tensor


def record(folder, layers, model, batches) -> None:
    """Calls the model on all batches and writes what reaches the layers.

    Args:
        folder: a path; it holds one folder for each layer when done.
        layers: pairs, as `calls.first_heads` takes them.
        model: the model that holds the layers.
        batches: inputs of its calls.
    """
    for place, batch in enumerate(batches):

        def keep(number, heads, masks, place=place):
            _write(
                Path(folder) / f"layer_{number}" / f"batch_{place}", layers[number][0], heads, masks
            )

        first_heads(lambda batch=batch: model(batch, training=False), layers, keep)


def _write(folder, layer, heads, masks):
    folder.mkdir(parents=True, exist_ok=True)
    query, key, value = (np.asarray(tf.cast(x, tf.float32)) for x in heads)
    samples = Samples(query, key, value, masks, layer.random_features())
    scale = query.shape[-1] ** -0.5
    exact = np.zeros((*query.shape[:3], value.shape[-1]), np.float32)
    uniform = np.zeros_like(exact)
    for b in range(len(query)):
        for start in range(0, query.shape[1], _QUERIES):
            at = np.arange(start, min(start + _QUERIES, query.shape[1]))
            for out, x in zip((exact, uniform), samples.outputs(b, at, scale), strict=True):
                out[b, at] = x
    arrays = {
        "query": samples.query,
        "key": samples.key,
        "value": samples.value,
        "exact": exact,
        "uniform": uniform,
        "queries": masks.queries,
        "keys": masks.keys,
        "prefix": masks.prefix,
        "segment_ids": masks.segment_ids,
    }
    for name, x in arrays.items():
        if x is not None:
            np.save(folder / f"{name}.npy", np.asarray(x))
    np.save(folder / "causal.npy", bool(masks.causal))


class Recording:
    """Reads what `record` wrote for one layer, a few sequences at a time."""

    def __init__(self, folder, number):
        found = Path(folder, f"layer_{number}").glob("batch_*")
        folders = sorted(found, key=lambda x: int(x.name.rpartition("_")[2]))
        self._files = [
            {x.stem: np.load(x, mmap_mode="r") for x in folder.glob("*.npy")} for folder in folders
        ]
        self.fitted = [(b, list(range(len(file["query"])))) for b, file in enumerate(self._files)]
        held_out = held_out_batches(len(self.fitted))
        self.held_out = [self.fitted[b] for b in sorted(held_out)]
        self.fitted = [x for b, x in enumerate(self.fitted) if b not in held_out]
        if not held_out:
            ((_, rows),) = self.fitted
            self.held_out = [(0, rows[::_HELD_OUT])]
            self.fitted = [(0, [i for i in rows if i % _HELD_OUT] or rows)]

    def read(self, batch, rows) -> Batch:
        """Sequences of a batch."""
        file = self._files[batch]
        arrays = {
            name: tf.constant(
                x[rows] if len(x) > 1 or len(file["query"]) == 1 else x[[0] * len(rows)]
            )
            for name, x in file.items()
            if name != "causal"
        }
        masks = FoldedMasks(
            **{name: arrays.get(name) for name in ("queries", "keys", "prefix", "segment_ids")},
            causal=bool(file["causal"]),
        )
        heads = tuple(arrays[name] for name in ("query", "key", "value"))
        return Batch(heads, masks, arrays["exact"], arrays["uniform"])

    def some(self, random, positions) -> Batch:
        """Sequences to fit to, chosen at random from one batch: about so many positions."""
        sizes = [len(rows) for _, rows in self.fitted]
        batch, rows = self.fitted[random.choice(len(sizes), p=np.divide(sizes, sum(sizes)))]
        count = max(1, positions // self._files[batch]["query"].shape[1])
        return self.read(batch, sorted(random.permutation(rows)[:count].tolist()))

    def sequences(self, count) -> Batch:
        """Up to so many sequences to fit to, of one shape, in order."""
        shape = self._files[self.fitted[0][0]]["query"].shape[1:]
        parts, left = [], count
        for batch, rows in self.fitted:
            if self._files[batch]["query"].shape[1:] == shape and left > 0:
                parts.append(self.read(batch, rows[:left]))
                left -= len(rows[:left])

        def joined(*x):
            return None if x[0] is None else tf.concat(x, 0)

        names = ("queries", "keys", "prefix", "segment_ids")
        masks = parts[0].masks._replace(
            **{name: joined(*(getattr(part.masks, name) for part in parts)) for name in names}
        )
        heads = tuple(joined(*x) for x in zip(*(part.heads for part in parts), strict=True))
        return Batch(
            heads, masks, *(joined(*(getattr(p, n) for p in parts)) for n in ("exact", "uniform"))
        )
