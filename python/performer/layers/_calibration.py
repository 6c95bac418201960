"""Calibration of a layer with learned features on the queries and keys of a call."""

import dataclasses

import numpy as np
import tensorflow as tf

from performer.composition.packed_blocks import run_starts
from performer.features import fitting
from performer.features.projections import orthogonal_projection
from performer.layers.rotary_embedding import positions_in_runs
from performer.ops.chosen_keys import is_chosen, of_largest_weight

# Sequences that are looked at, and every how many of them one is for measuring only.
_SEQUENCES = 20
_HELD_OUT = 5
# Keys of a sequence to which its queries are fitted: what features fit is exp(x.y) of single pairs.
_KEYS = 256
AS_IT_WAS = "as it was"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What a fit of a layer's features found.

    Errors are those of the outputs of heads on held-out rows, relative to what attention adds to
    the mean of the values: 0 is exact, and at 1 one might as well not look.

    Attributes:
        layer: the layer's name.
        methods: of every key/value head, what gave its weights: "as it was", one of "centred",
            "scaled" and "dense", "fitted, 6 steps" (or another number of them), or "distilled".
        before, after: float64 `[H]`: errors of every query head.
        candidates: errors `[H]` of every candidate by its name.
    """

    layer: str
    methods: list[str]
    before: np.ndarray
    after: np.ndarray
    candidates: dict[str, np.ndarray]

    def as_dict(self):
        """All of it as strings, lists and numbers."""
        return {
            "layer": self.layer,
            "methods": list(self.methods),
            "before": self.before.tolist(),
            "after": self.after.tolist(),
            "candidates": {name: error.tolist() for name, error in self.candidates.items()},
        }

    @classmethod
    def from_dict(cls, saved):
        """The report that `as_dict` described."""
        errors = {name: np.array(saved[name]) for name in ("before", "after")}
        candidates = {name: np.array(error) for name, error in saved["candidates"].items()}
        return cls(saved["layer"], saved["methods"], **errors, candidates=candidates)

    def __str__(self):
        """One line."""
        return (
            f"{self.layer}: error {self.before.mean():.3f} -> {self.after.mean():.3f} "
            f"(heads {self.after.min():.2f} to {self.after.max():.2f})"
        )


def calibrate(name, projection, features, heads, masks, *, steps, seed):
    """Assigns to a `LearnedProjection` the weights that serve best.

    Args:
        name: the layer's, for the report.
        projection: the `LearnedProjection`.
        features: its `Features`.
        heads: query `[B', T, H, D]`, key `[B', S, G, D]`, value `[B', S, G, E]`, eager tensors.
        masks: the call's `FoldedMasks`.
        steps: most steps of the fit.
        seed: of what is sampled and drawn.

    Returns:
        The `LayerReport`.
    """
    random = np.random.default_rng(seed)
    query, key, value = (np.asarray(tf.cast(x, tf.float32)) for x in heads)
    scale = query.shape[-1] ** -0.25
    samples = Samples(query * scale, key * scale, value, masks, features)
    fitted = _Fitted(samples, projection, features, random)
    weights, methods, errors = fitted.best(steps, seed)
    # Assigned at the end: an interrupt leaves the layer as it was.
    groups, repeats, count, width = weights.query.shape
    query_side = np.reshape(weights.query, (groups * repeats, count, width))
    projection.query_projection.assign(query_side[..., :-1])
    projection.query_bias.assign(query_side[..., -1])
    projection.key_projection.assign(weights.key)
    after = errors.pop("after")
    return LayerReport(name, methods, errors[AS_IT_WAS], after, errors)


class Samples:
    """Rows of the queries of a call, by sequence; sizes as in `fitting.Rows`."""

    def __init__(self, query, key, value, masks, features):
        self.query, self.key, self.value = query, key, value
        self.heads, self.groups = query.shape[2], key.shape[2]
        batch, length, keys = query.shape[0], query.shape[1], key.shape[1]

        def given(mask, size):
            return np.ones((batch, size), bool) if mask is None else np.asarray(mask)

        self.queries_exist, self.keys_exist = given(masks.queries, length), given(masks.keys, keys)
        self.prefix = np.zeros((batch, keys), bool) if masks.prefix is None else masks.prefix
        self.prefix = np.asarray(self.prefix)
        self.causal = masks.causal
        ids = masks.segment_ids
        self.run = np.zeros((batch, keys), int)
        self.position = np.broadcast_to(np.arange(keys), (batch, keys))
        if ids is not None:
            self.run = np.cumsum(np.asarray(run_starts(ids)), 1)
            self.position = np.asarray(positions_in_runs(ids))
        self.packed = ids is not None
        self.window, self.exact_keys = features.exact_window, features.exact_keys
        exists = self.keys_exist[:, :, None, None]
        # What a masked position holds must not matter, NaN included.
        self.key, self.value = np.where(exists, key, 0), np.where(exists, value, 0)
        self.query = np.where(self.queries_exist[:, :, None, None], query, 0)

    def moments(self, group):
        """Means and covariances of queries and keys of one key head."""
        repeats = self.heads // self.groups
        result = []
        for x, exists, heads in (
            (self.query, self.queries_exist, slice(group * repeats, (group + 1) * repeats)),
            (self.key, self.keys_exist, slice(group, group + 1)),
        ):
            rows = x[:, :, heads][exists].reshape(-1, x.shape[-1]).astype(np.float64)
            mean = rows.mean(0)
            rows -= mean
            # TensorFlow's product: the threads of NumPy's take seconds where others are at work.
            result += [mean, tf.matmul(rows, rows, transpose_a=True).numpy() / len(rows)]
        return result

    def seen(self, batch, at):
        """Bool `[n, S]`: the keys to which the queries `at` of one sequence attend."""
        seen = self.keys_exist[batch] & np.ones((len(at), 1), bool)
        places = np.arange(self.key.shape[1])
        if self.causal:
            seen &= (places <= at[:, None]) | self.prefix[batch]
        if self.packed:
            seen &= self.run[batch] == self.run[batch][at][:, None]
        return seen & self.queries_exist[batch][at][:, None]

    def rows(self, batch, at, keys=slice(None), count=None):
        """`fitting.Rows` of the queries `at` of one sequence, and of all its keys or some.

        Up to `count` rows, if it is given, queries are added that see nothing.
        """
        repeats = self.heads // self.groups
        exist = np.arange(count or len(at)) < len(at)
        at = np.resize(at, len(exist))
        seen = self.seen(batch, at) & exist[:, None]
        near = np.zeros_like(seen)
        if self.window is not None:
            block = self.position[batch] // self.window
            near = np.abs(block - block[at][:, None]) <= 1
        near = np.broadcast_to(near, (self.groups, *near.shape))
        if self.exact_keys is not None:
            near = near | self._chosen(batch)[:, None]
        near = near & seen
        far = seen & ~near
        if self.exact_keys is None:
            far, near = far[:1], near[:1]
        parts = (
            self._by_group(batch, at),
            self.key[batch][keys].transpose(1, 0, 2),
            self.value[batch][keys].transpose(1, 0, 2),
            np.tile(far[..., keys], (1, repeats, 1)),
            np.tile(near[..., keys], (1, repeats, 1)),
        )
        return fitting.Rows(*(np.asarray(x, np.float32)[None] for x in parts))

    def outputs(self, batch, at, scale):
        """Outputs of exact attention and of uniform weights, `[n, H, E]`, of one sequence."""
        repeats = self.heads // self.groups
        key, value = (x[batch].transpose(1, 0, 2) for x in (self.key, self.value))
        seen = np.tile(self.seen(batch, at).astype(np.float32), (repeats, 1))
        query = self._by_group(batch, at) * np.float32(scale)
        logits = tf.matmul(query, key, transpose_b=True)
        for x in (logits, tf.zeros_like(logits)):
            out = np.asarray(fitting.attend(x, seen, value))
            out = out.reshape(self.heads, len(at), -1)
            yield out.transpose(1, 0, 2)

    def _by_group(self, batch, at):
        """The queries `at` of one sequence, `[G, R n, D]`."""
        query = self.query[batch][at].transpose(1, 0, 2)
        return query.reshape(self.groups, -1, query.shape[-1])

    def _chosen(self, batch):
        """Bool `[G, S]`: the keys that `exact_keys` chooses."""
        query, key = (x[batch].transpose(1, 0, 2) for x in (self.query, self.key))
        bias = np.where(self.keys_exist[batch], np.float32(0), np.float32(-np.inf))
        chosen = of_largest_weight(
            query.reshape(1, self.groups, -1, query.shape[-1]),
            key[None],
            np.broadcast_to(bias, (1, self.groups, len(bias))),
            1.0,
            self.exact_keys,
        )
        return np.asarray(is_chosen(chosen, len(bias)))[0]


class _Fitted:
    """The candidates for the weights of a layer, and the best of them for every key head."""

    def __init__(self, samples, projection, features, random):
        self.samples = samples
        query_side = [projection.query_projection.numpy(), projection.query_bias.numpy()]
        heads, count, _ = query_side[0].shape
        groups = samples.groups
        joined = np.concatenate([query_side[0], query_side[1][..., None]], -1)
        self.now = fitting.Weights(
            tf.constant(joined.reshape(groups, heads // groups, count, -1)),
            tf.constant(projection.key_projection.numpy()),
        )
        offset = np.zeros(heads, np.float32)
        norm = 0.0  # it cancels where all keys are far
        if features.has_exact_keys:
            offset -= np.log(count)
            if features.far_bias is not None:
                offset += np.asarray(features.far_bias, np.float32)
            norm = float(features.for_window()["query_norm"])
        self.levels = fitting.Levels(
            tf.constant(offset.reshape(groups, -1)), tf.constant(norm, tf.float32)
        )
        self.far_bias = 0.0 if features.far_bias is None else np.asarray(features.far_bias)
        self.train, self.held_out = self._split(count, random)

    def _split(self, count, random):
        """`Rows` to fit and `Rows` to measure by: other sequences, or other rows of one."""
        samples = self.samples
        batch = len(samples.query)
        chosen = random.permutation(batch)[: _SEQUENCES + _SEQUENCES // _HELD_OUT]
        held_out = set(chosen[::_HELD_OUT]) if batch > 1 else set()
        fitted = max(len(chosen) - len(held_out), 1)
        each = -(-min(max(8 * count, 512), 2048) // fitted)
        train, measured = [], []
        (of_keys,) = random.spawn(1)
        for b in chosen:
            exists = np.flatnonzero(samples.queries_exist[b])
            if not len(exists) or not samples.keys_exist[b].any():
                continue
            at = random.permutation(exists)
            some_keys = np.sort(of_keys.permutation(samples.key.shape[1])[:_KEYS])
            fit = at
            if batch == 1:
                fit = at[: max(3 * len(at) // 4, 1)]
                measured.append(samples.rows(b, np.sort(at[len(fit) :][:256])))
            elif b in held_out:
                measured.append(samples.rows(b, np.sort(at[:64]), count=64))
                continue
            train.append(samples.rows(b, np.sort(fit[:each]), some_keys, count=each))
        train, measured = train or measured, measured or train
        if not train:
            raise ValueError("`calibrate` needs a position that exists. Received: all are masked")
        heads = samples.heads // samples.groups
        return [
            [fitting.with_targets(x, self.levels) for x in fitting.together(part, heads, count)]
            for part in (train, measured)
        ]

    def best(self, steps, seed):
        """The weights that serve best, the names of what gave them `[G]`, and errors by name.

        Returns:
            `fitting.Weights` of arrays; names; a dict of float64 `[H]`, "after" among them.
        """
        candidates = {AS_IT_WAS: self.now, **self._proposals(seed)}
        errors = {name: self._measured(weights) for name, weights in candidates.items()}
        begin, _ = _choose(candidates, errors)
        for number, weights in enumerate(fitting.fit(begin, self.train, self.levels, steps), 1):
            if number == steps // 2 or number == steps:
                name = f"fitted, {number} steps"
                candidates[name], errors[name] = weights, self._measured(weights)
        weights, methods = _choose(candidates, errors)
        errors["after"] = np.stack([errors[m][g] for g, m in enumerate(methods)])
        by_head = {name: error.ravel() for name, error in errors.items()}
        return fitting.Weights(*map(np.asarray, weights)), methods, by_head

    def _measured(self, weights):
        """Errors `[G, R]`; inf where they are no numbers."""
        errors = fitting.errors(weights, self.held_out, self.levels)
        return np.where(np.isfinite(errors), errors, np.inf)

    def _proposals(self, seed):
        """The candidates of `fitting.PROPOSALS`, by name."""
        groups, repeats, count, width = self.now.query.shape
        draws = orthogonal_projection(count, width - 1, seed=seed, heads=groups).numpy()
        moments = [self.samples.moments(g) for g in range(groups)]
        result = {}
        for name in fitting.PROPOSALS:
            key_side = np.empty((groups, count, width - 1), np.float32)
            bias = np.empty((groups, count), np.float32)
            for g in range(groups):
                key_side[g], bias[g] = fitting.proposal(name, draws[g], *moments[g])
            query_side = np.concatenate([key_side, bias[..., None]], -1)
            query_side = np.repeat(query_side[:, None], repeats, 1)
            if np.any(self.far_bias):
                # The estimate is of the weights as they are: what the layer adds is taken off.
                far = np.broadcast_to(self.far_bias, groups * repeats).reshape(groups, repeats)
                query_side[..., -1] -= far[..., None]
            result[name] = fitting.Weights(tf.constant(query_side), tf.constant(key_side))
        return result


def _choose(candidates, errors):
    """Of every key head the candidate of the least error: weights, and the names `[G]`."""
    names = list(candidates)
    which = np.argmin([np.mean(errors[name] ** 2, 1) for name in names], 0)
    methods = [names[w] for w in which]
    parts = (
        np.stack([np.asarray(candidates[name][part][g]) for g, name in enumerate(methods)])
        for part in (0, 1)
    )
    return fitting.Weights(*map(tf.constant, parts)), methods
