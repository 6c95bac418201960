"""Performer: Keras's MultiHeadAttention with linear attention."""

import dataclasses
import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from performer import checks, loader, parallel
from performer.checks import accumulator
from performer.composition.packed_blocks import run_starts
from performer.layers._arguments import (
    DENSE_LIMIT,
    LEARNED,
    Options,
    check_rate,
    check_seed,
    check_size,
    default_seed,
    split_list,
)
from performer.layers._attention import attend, hide_queries, summarize_keys
from performer.layers._axes import fold, resolve_axes, unfold
from performer.layers._calibration import calibrate
from performer.layers._dense import ScoreShape, attend_densely
from performer.layers._learned import LearnedProjection
from performer.layers._masks import Masks, mask_of
from performer.layers._projection import FarBias, RandomProjection
from performer.layers._state import (
    check_call,
    first_position,
    position_of,
    product,
    refuse_near_rows,
    with_position,
    with_tensors,
)
from performer.layers.rotary_embedding import positions_in_runs
from performer.ops import AttentionState, empty_state, merge
from performer.ops import read as read_state
from performer.ops.state import checked_state, stored_rows
from performer.parallel.neighbours import rows_before_runs
from performer.shapes import dims

# Call arguments that `keras.layers.MultiHeadAttention` does not have.
ADDED_CALL_ARGUMENTS = ("segment_ids", "prefix_mask", "initial_state", "return_state")


@keras.saving.register_keras_serializable(package="performer")
class Performer(keras.layers.MultiHeadAttention):
    """Multi-head attention whose time and memory grow linearly with the sequence.

    A `keras.layers.MultiHeadAttention` in which `softmax(query . key)` is replaced by the FAVOR+
    estimator of [Choromanski et al., 2020](https://arxiv.org/abs/2009.14794) with `supports`
    random features. Dense layers, weights and shapes are those of `MultiHeadAttention`.

    All heads share one projection: each head has its own learned query and key kernels, so that
    its features differ from those of the others, and one `[M, D]` matrix stays in the processor's
    cache. The projection is a saved weight that no optimizer trains, float32 under every dtype
    policy. With `feature_map="learned"` each head has weights of its own instead, which train.

    Args:
        num_heads: Number of attention heads.
        key_dim: Size D of each attention head for query and key.
        value_dim: Size E of each attention head for value. Defaults to `key_dim`.
        dropout: Probability, in [0, 1), of dropping a key, for one head and all queries of a
            batch row, in training; the remaining keys are normalised among themselves. Defaults
            to 0.
        use_bias: Boolean, whether the dense layers use biases. Defaults to `True`.
        output_shape: Shape of an output besides batch and sequence. Defaults to the last
            dimension of `query`.
        attention_axes: Axes over which the attention is applied, in the order in which they
            form the sequence. `None` means all axes but batch and channels.
        attention_method: `"linear"` (default), or `"quadratic"`: exact softmax, by the parent.
        supports: Number M of random features. Required for linear attention.
        scaling: 0 (default) draws the norm of every row of the projection like that of a normal
            vector, which makes the estimator unbiased; 1 sets all norms to sqrt(D).
        feature_map: `"softmax"` (default, FAVOR+), `"relu"` or `"elu"` (the generalised
            attention of the same paper, which does not approximate softmax), `"learned"`, or an
            object like `performer.feature_maps.FeatureMap`. With `"learned"` the features begin
            as FAVOR+, and train: every head has a projection of its own for its queries, one for
            its keys, and a bias of the queries' log-features; see `learned_projection`.
        feature_regularizer: Regularizer of both projections, with `feature_map="learned"`. Defaults
            to `None`.
        redraw_interval: Number of training calls that use one projection before the next call
            draws another. Defaults to `None`: all calls use the first one. Inference never draws.
            `performer.callbacks.RedrawProjections` redraws by epochs or batches instead.
        num_key_value_heads: Number G of heads of key and value, a divisor of `num_heads`; head h
            of the query uses head h // (num_heads / G). Defaults to `num_heads`.
        rotary_embedding: `performer.RotaryEmbedding`, or a layer that is called like it: rotates
            queries and keys by their positions. Linear attention only. Defaults to `None`.
        exact_window: Number W, a multiple of 64: a query attends exactly, by softmax, to the keys
            of its own block of W positions and of the blocks beside it, and to all others through
            the random features, in one softmax. Blocks are counted from the start of the sequence
            (several attention axes make one sequence, in their order, and near is what is near in
            that). Linear attention with a feature map of softmax, and query and value of the same
            length. 64 is a good choice. Defaults to `None`: all keys through features.
        far_bias: Log of a factor of all weights through features, with `exact_window` or
            `exact_keys`: `None` (default) for 0,
            a number, or `"learned"`: a weight for each query head, float32, which starts at -4 and
            is trained. Learn it in models that are trained from scratch, where the far part is
            noise at first.
        exact_keys: Number of keys of each head to which every query attends exactly, those of the
            largest expected weight (see `performer.favor_attention`). Neither with a causal mask,
            nor with segments, nor with `return_state`. Defaults to `None`.
        max_segments: Largest number of sequences in a row of `segment_ids`. It changes no output.
            Set it where XLA compiles the layer: XLA cannot count the sequences, and without it
            reserves memory for S of them in each row. Defaults to `None`.
        dense_limit: Largest T * S for which scores may be formed, in calls that need them (a
            general `attention_mask`, `return_attention_scores`). Defaults to 2048 * 2048.
        seed: Integer that seeds projection and dropout, or `None`: taken from Python's random
            generator, which `keras.utils.set_random_seed` fixes.
        flash_attention: As in `MultiHeadAttention`, for quadratic attention; ignored in linear.
        **kwargs: Initializers, regularizers, constraints, `use_gate` and (for quadratic attention
            only) `sliding_window`, as far as this version of Keras's `MultiHeadAttention` has
            them; arguments of `keras.layers.Layer`.

    Call arguments:
        query: Tensor `(B, T, dim)`, or `(B, d1, ..., dn, dim)`. Or a list `[query, value]` or
            `[query, value, key]`, instead of separate arguments.
        value: Tensor `(B, S, dim)`; axes without attention as in `query`.
        key: Tensor `(B, S, dim)`. Defaults to `value`.
        query_mask, value_mask, key_mask: Boolean `(B, T)`, `(B, S)`, `(B, S)`, or all axes but
            the channels; `True` where a position exists. Default to the masks that Keras attached.
            No query attends to a masked key; a masked query attends to no key.
        attention_mask: Boolean `(B, T, S)`, `True` where a query may attend to a key; batch may be
            missing, and any axis 1; `(B, H, T, S)` for a mask of every head. `(B, 1, S)`, the same
            for every query, stays linear. Any other takes the dense form: the same estimator
            through `T * S` scores, in float64, for up to `dense_limit` of them.
        return_attention_scores: Boolean, whether to return the normalised scores of the estimator
            too: dense form.
        training: Python boolean: whether to drop keys and to follow `redraw_interval`.
        use_causal_mask: Boolean, whether a query attends only to its own and earlier positions
            (in row-major order of the attention axes).
        segment_ids: Integers `(B, S)`, T = S: a row holds several sequences, runs of equal ids,
            and a query attends within its own. Linear attention only.
        prefix_mask: Boolean `(B, S)`, T = S, with `use_causal_mask`: `True` for keys to which
            every query attends, also earlier queries. Linear attention only.
        initial_state: State of keys that come before those of the call, to which every query
            attends: what `get_initial_state`, `summarize` or a call with `return_state` returned.
            Linear attention only, and neither with scores, nor with `segment_ids`, nor with a
            causal mask for T other than S. With several attention axes, a call holds a part of
            the first of them.
        return_state: Boolean, whether to return the state after all keys, too. With `exact_window`
            and a causal mask it has the last 2 W - 1 keys and values.

    Returns:
        Tensor of the shape of `query`, the last axis replaced by `output_shape` if given, in the
        compute dtype. With `return_attention_scores` a pair of it and the scores `(B, H, T, S)`,
        before dropout; with `return_state` a pair of it and the `performer.AttentionState`.
        The attention of a query that attends to no key (it is masked, or all keys are) is 0, so
        that its output is the bias of the output layer, as `MultiHeadAttention` documents it. (For
        3-D inputs without dropout that layer in fact returns the mean of all values.)

    Raises:
        RuntimeError: `'must have numbers of supports specified'`: linear without `supports`.
        ValueError: an argument outside its range; shapes, axes or masks that do not fit; in
            linear attention, a sliding window, or more scores than `dense_limit`.
        TypeError: `initial_state` is no `AttentionState`, or one of another type.
        tf.errors.InvalidArgumentError: the last, where sizes are known only when the graph runs.

    Numerics:
        No epsilon and no clamp: sums are taken relative to their largest term, in float32 (or
        float64, under that policy). The rms error to exact softmax falls as `supports`**-0.5 and
        grows exponentially with the norms of query and key. Causal outputs do not depend on later
        inputs by a single bit. A single position (one step of a stream) is rounded otherwise than
        the same position in a longer input, in its last bits.

    Example:

    >>> import keras
    >>> from performer import Performer
    >>> layer = Performer(num_heads=2, key_dim=2, supports=2)
    >>> layer(keras.Input(shape=[8, 16]), keras.Input(shape=[4, 16])).shape
    (None, 8, 16)
    """

    # One of both once the layer is built, if it is linear: a `RandomProjection`, or with learned
    # features a `LearnedProjection`.
    _random_projection: Any = None
    _learned_projection: Any = None
    # A `FarBias` once the layer is built, if it learns one.
    _far_bias: Any = None

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        *,
        attention_method="linear",
        supports=None,
        scaling=0,
        feature_map="softmax",
        feature_regularizer=None,
        redraw_interval=None,
        num_key_value_heads=None,
        rotary_embedding=None,
        exact_window=None,
        far_bias=None,
        exact_keys=None,
        max_segments=None,
        dense_limit=DENSE_LIMIT,
        seed=None,
        flash_attention=None,
        **kwargs,
    ):
        num_heads = check_size("num_heads", num_heads)
        if isinstance(rotary_embedding, dict):
            rotary_embedding = keras.saving.deserialize_keras_object(rotary_embedding)
        options = Options(
            attention_method=attention_method,
            supports=supports,
            scaling=scaling,
            feature_map=feature_map,
            feature_regularizer=feature_regularizer,
            redraw_interval=redraw_interval,
            num_key_value_heads=num_key_value_heads,
            max_segments=max_segments,
            dense_limit=dense_limit,
            rotary_embedding=rotary_embedding,
            exact_window=exact_window,
            far_bias=far_bias,
            exact_keys=exact_keys,
            num_heads=num_heads,
            sliding_window=kwargs.get("sliding_window"),
        )
        super().__init__(
            num_heads=num_heads,
            key_dim=check_size("key_dim", key_dim),
            value_dim=None if value_dim is None else check_size("value_dim", value_dim),
            dropout=check_rate("dropout", dropout),
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            flash_attention=None if options.linear else flash_attention,
            seed=check_seed("seed", seed),
            **kwargs,
        )
        self._options = options
        self._rotary_embedding = rotary_embedding
        self._requested_flash_attention = flash_attention
        if options.linear:
            self.supports_jit = loader.supports_jit()
            # `__call__` converts the inputs: Keras would also cast masks and states.
            self._convert_input_args = False

    @property
    def attention_method(self):
        """`"linear"` or `"quadratic"`."""
        return self._options.attention_method

    @property
    def supports(self):
        """Number M of random features, or None."""
        return self._options.supports

    @property
    def learns_features(self):
        """Whether the features have weights that train: `feature_map="learned"`."""
        return self._options.learned

    @property
    def projection(self):
        """The weight that holds the projection, float32 `[M, D]`; None if there is none (yet).

        None with learned features, too: see `learned_projection`.
        """
        return self._random_projection and self._random_projection.projection

    @property
    def learned_projection(self):
        """The sublayer with the weights of learned features; None if there is none (yet).

        Its attributes are the weights `query_projection` `[H, M, D]`, `key_projection` `[G, M, D]`
        and `query_bias` `[H, M]`.
        """
        return self._learned_projection

    @property
    def draw(self):
        """The weight that identifies the projection in states: its `performer.ops.fingerprint`.

        int64; None if there is none (yet). It follows whatever replaces the projection. With
        learned features a tensor instead: the number of all their weights, as they are now. So a
        state fits as long as no weight of the features has changed.
        """
        if self._learned_projection is not None:
            return self._learned_projection.draw_number()
        return self._random_projection and self._random_projection.fingerprint

    @property
    def redraws(self):
        """The weight that counts redraws, int64; None if there is none (yet, or ever: learned)."""
        return self._random_projection and self._random_projection.redraws

    def __call__(self, query, *args, **kwargs):
        """Calls the layer; `query` may be a list `[query, value]` or `[query, value, key]`."""
        if isinstance(query, list | tuple) and not args and "value" not in kwargs:
            query, args = split_list(query)
        if self._options.linear:
            query = self._converted("query", query)
            names = ("value", "key")
            args = (*map(self._converted, names, args), *args[len(names) :])
            kwargs.update((k, self._converted(k, kwargs[k])) for k in names if k in kwargs)
            if kwargs.get("initial_state") is not None:
                kwargs["initial_state"] = with_tensors(kwargs["initial_state"])
        return super().__call__(query, *args, **kwargs)

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the weights for inputs of these shapes."""
        if self._options.linear:
            Masks().check(query_shape, value_shape, self._attention_axes)
        self._input_rank = len(query_shape)
        groups = self._options.num_key_value_heads
        if groups is None or groups == self._num_heads:
            super().build(query_shape, value_shape, key_shape)
        else:
            self._build_grouped(
                query_shape, value_shape, value_shape if key_shape is None else key_shape, groups
            )
        if self._options.linear:
            # After the parent's weights, which keep their places in `weights`.
            self._build_projection()
            if self._options.far_bias == LEARNED:
                self._far_bias = FarBias(self._num_heads)
                self._far_bias.build()

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        segment_ids=None,
        prefix_mask=None,
        initial_state=None,
        return_state=False,
    ):
        """Attention of `query` to `key` and `value`; see the class."""
        given = {
            "query_mask": query_mask,
            "value_mask": value_mask,
            "key_mask": key_mask,
            "attention_mask": attention_mask,
            "use_causal_mask": use_causal_mask,
        }
        added = {"segment_ids": segment_ids, "prefix_mask": prefix_mask}
        if not self._options.linear:
            _refuse_in_quadratic(**added, initial_state=initial_state, return_state=return_state)
            _refuse_in_parts("attention_method='quadratic'", True)
            # The parent takes attached masks off its inputs: not off the tensors of the caller.
            mask = mask_of(query)
            query, value = tf.identity(query), tf.identity(value)
            key = None if key is None else tf.identity(key)
            if mask is not None:
                query._keras_mask = mask
            return super().call(
                query,
                value,
                key=key,
                return_attention_scores=return_attention_scores,
                training=training,
                **given,
            )
        masks = Masks(**given, **added)
        key = value if key is None else key
        axes = masks.check(query.shape, value.shape, self._attention_axes, key.shape)
        general = masks.is_general(axes)
        dense = general or return_attention_scores
        _refuse_in_parts("`return_attention_scores` and a general `attention_mask`", dense)
        _refuse_in_parts("`prefix_mask`", prefix_mask is not None)
        with_state = initial_state is not None or return_state
        if with_state:
            check_call(masks, (query.shape, value.shape), axes, dense)
        # The dense layers support no masks, and would warn that they lose one. `tf.identity` gives
        # a tensor without the attached mask, and leaves the caller's tensor as it is.
        with tf.control_dependencies(masks.check_when_run(query, value, key, axes)):
            query, value, key = (tf.identity(x) for x in (query, value, key))
        folded, start = masks.fold(query, key, axes), position_of(initial_state)
        heads = self._heads(query, key, value, start, folded.segment_ids)
        dropout = None
        if training and self._dropout:
            dropout = self._dropout, self._dropout_layer.seed_generator
        options = {
            "features": self._features(training, with_draw=with_state),
            "masks": folded,
            "dropout": dropout,
        }
        scores, state = None, None
        if dense:
            output, scores = attend_densely(
                *heads,
                **options,
                score_shape=ScoreShape.of(dims(query), dims(key), axes, self._num_heads),
                limit=self._options.dense_limit,
                attention_mask=masks.attention_mask if general else None,
            )
        else:
            output, state = attend(
                *heads,
                **options,
                initial_state=initial_state,
                return_state=return_state,
                max_segments=self._options.max_segments,
            )
        output = self._output(output, query, axes)
        if return_state:
            return output, with_position(state, start, key, axes)
        return (output, scores) if return_attention_scores else output

    def get_initial_state(self, batch_size):
        """The state before the first key, for `initial_state` of a call.

        Args:
            batch_size: B, an integer or an integer scalar; for inputs with axes over which there
                is no attention, the list of B and their sizes.

        Returns:
            `performer.AttentionState`, empty, N the product of `batch_size`: float32 (float64
            under that policy), near rows of `exact_window` in the compute dtype. Its size does not
            depend on the length of the sequence.

        Raises:
            ValueError: the layer is quadratic, or not built.

        Example:

        >>> import tensorflow as tf
        >>> from performer import Performer
        >>> layer, x = Performer(2, 4, supports=16), tf.random.normal([3, 10, 8])
        >>> whole = layer(x, x, use_causal_mask=True)
        >>> state, parts = layer.get_initial_state(3), []
        >>> for part in tf.split(x, 5, axis=1):
        ...     part, state = layer(
        ...         part, part, use_causal_mask=True, initial_state=state, return_state=True
        ...     )
        ...     parts.append(part)
        >>> bool(tf.reduce_max(abs(tf.concat(parts, 1) - whole)) < 1e-5)
        True
        """
        self._check_streams("get_initial_state")
        sizes = batch_size if isinstance(batch_size, list | tuple) else [batch_size]
        for size in sizes or [batch_size]:
            checks.size_tensor("batch_size", size, least=0)
        return self._empty_state(
            product(sizes),
            exact_window=self._options.exact_window,
            key_dim=self._key_dim,
            key_dtype=tf.as_dtype(self.compute_dtype),
        )

    def summarize(self, value, key=None, *, value_mask=None, key_mask=None, initial_state=None):
        """The state of keys and values, such as an encoder's, which `read` may use many times.

        With `exact_window` all of them are far from every query that reads the state.

        Args:
            value, key, value_mask, key_mask: As in a call. `key` defaults to `value`.
            initial_state: State of keys that come before, without near rows. Defaults to none.

        Returns:
            `performer.AttentionState` of all of them. `performer.merge` joins such states.

        Raises:
            ValueError: the layer is quadratic, or not built; states of different draws.

        Example:

        >>> import tensorflow as tf
        >>> from performer import Performer
        >>> layer = Performer(2, 4, supports=16)
        >>> query, value = tf.random.normal([3, 7, 8]), tf.random.normal([3, 1000, 8])
        >>> whole = layer(query, value)
        >>> state = layer.summarize(value)
        >>> steps = [layer.read(query[:, i : i + 1], state) for i in range(7)]
        >>> bool(tf.reduce_max(abs(tf.concat(steps, 1) - whole)) < 1e-5)
        True
        """
        self._check_streams("summarize")
        value = checks.tensor("`value`", self._converted("value", value))
        key = value if key is None else self._converted("key", key)
        masks = Masks(
            value_mask=mask_of(value) if value_mask is None else value_mask,
            key_mask=mask_of(key) if key_mask is None else key_mask,
        )
        value, key = tf.identity(value), tf.identity(key)
        self._check_rank(value=value, key=key)
        state = self._empty_state(1)
        if initial_state is not None:
            state = checked_state("`initial_state`", initial_state, state.log_mass.dtype)
        axes = resolve_axes(self._attention_axes, len(value.shape))
        start = position_of(state)
        refuse_near_rows(state)
        features = self._features(training=False)
        keys = self._rotated(fold(self._key_dense(key), axes), start_index=start)
        after = summarize_keys(
            keys,
            fold(self._value_dense(value), axes),
            features,
            masks.fold_keys(key, axes),
            features.feature_map.key_bias(keys),
        )
        return with_position(merge(state, after), start, key, axes)

    def read(self, query, state, *, query_mask=None, start_index=0):
        """The layer's output for queries that attend to all keys of a state, and to no others.

        Args:
            query, query_mask: As in a call.
            state: What `summarize`, or a call with `return_state`, returned.
            start_index: Position of the first query, for rotary positions.

        Returns:
            As a call.

        Raises:
            ValueError: the layer is quadratic, or not built; a state that does not fit, or that
                comes from another draw of the projection.
            tf.errors.InvalidArgumentError: another draw, known only when the graph runs.

        Example: see `summarize`.
        """
        self._check_streams("read")
        query = checks.tensor("`query`", self._converted("query", query))
        masks = Masks(query_mask=mask_of(query) if query_mask is None else query_mask)
        query = tf.identity(query)
        self._check_rank(query=query)
        axes = resolve_axes(self._attention_axes, len(query.shape))
        features = self._features(training=False)
        output = read_state(
            self._rotated(fold(self._query_dense(query), axes), start_index=start_index),
            state=state,
            draw=features.draw,
            **features.for_queries(),
        )
        output = hide_queries(output, masks.fold_queries(query, axes))
        return self._output(output, query, axes)

    def calibrate(
        self,
        query,
        value=None,
        key=None,
        *,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        use_causal_mask=False,
        segment_ids=None,
        prefix_mask=None,
        steps=8,
        seed=0,
    ):
        """Fits learned features to softmax attention of given inputs, without training.

        Only the weights of `learned_projection` change, and only to what has a smaller error on
        rows that were held out, for each key/value head by itself. Candidates are three proposals
        in closed form from means and covariances of queries and keys ("centred", "scaled", "dense")
        and `steps` steps of EM from the best of them; `performer.features.fitting` has all
        equations. They count `exact_window`, `exact_keys`, `far_bias` and masks as calls do.

        Args:
            query, value, key, query_mask, value_mask, key_mask, attention_mask, use_causal_mask,
                segment_ids, prefix_mask: As in a call; `value` defaults to `query`. Some thousand
                positions are enough. Looked at are up to 24 sequences, and for the fit some queries
                and 256 keys of each, chosen at random. Masks that differ from query to query are
                refused.
            steps: Most steps of EM; 0 for the proposals only.
            seed: Integer, of draws and samples.

        Returns:
            `performer.convert.LayerReport`: errors of every head before and after, and what gave
            its weights.

        Raises:
            ValueError: the features are not learned; `steps` below 0; a general `attention_mask`;
                no position that exists.

        Numerics: eager, float32 (errors in float64), the same result for the same seed. Memory for
            features and scores of the chosen queries and keys, sequences together up to arrays of
            64 MiB.

        Example:

        >>> import tensorflow as tf
        >>> from performer import Performer
        >>> layer = Performer(2, 8, supports=16, feature_map="learned", seed=1)
        >>> x = tf.random.stateless_normal([8, 64, 16], seed=[1, 2])
        >>> found = layer.calibrate(x)
        >>> bool(found.after.mean() < 0.8 * found.before.mean())
        True
        """
        if steps != 0:
            steps = check_size("steps", steps)
        heads, masks = self._heads_and_masks(
            query,
            value,
            key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            segment_ids=segment_ids,
            prefix_mask=prefix_mask,
        )
        return self._fit_features(heads, masks, steps, check_seed("seed", seed) or 0)

    def _heads_and_masks(self, query, value=None, key=None, **masks: Any):
        """Query, key and value of all heads and the `FoldedMasks` of a call, to fit features to.

        Args:
            query, value, key, **masks: as `calibrate`.
        """
        if not self._options.learned:
            raise ValueError(
                "`calibrate` needs attention_method='linear' and feature_map='learned', whose "
                "weights it sets. Received: "
                f"attention_method={self._options.attention_method!r}, "
                f"feature_map={self._options.feature_map!r}"
            )
        query = self._converted("query", query)
        value = query if value is None else self._converted("value", value)
        key = value if key is None else self._converted("key", key)
        attached = {"query_mask": query, "value_mask": value, "key_mask": key}
        for name, x in attached.items():
            if masks.get(name) is None:
                masks[name] = mask_of(x)
        given = Masks(**masks)
        axes = given.check(query.shape, value.shape, self._attention_axes, key.shape)
        if given.is_general(axes):
            raise ValueError(
                "`attention_mask` of `calibrate` must be the same for every query. Received: "
                f"attention_mask.shape={tuple(given.attention_mask.shape)}"
            )
        query, value, key = (tf.identity(x) for x in (query, value, key))
        if not self.built:
            self.build(query.shape, value.shape, key.shape)
        folded = given.fold(query, key, axes)
        return self._heads(query, key, value, 0, folded.segment_ids), folded

    def _fit_features(self, heads, masks, steps, seed):
        """Fits the features to what `_heads_and_masks` returned; a `LayerReport`."""
        features = self._features(training=False)
        return calibrate(
            self.name, self._learned_projection, features, heads, masks, steps=steps, seed=seed
        )

    def redraw(self):
        """Replaces the projection by the next one of its seed, and counts that in `redraws`.

        Raises:
            ValueError: the layer has no projection: it is quadratic, or not built, or its features
                are learned.
        """
        if self._random_projection is None:
            raise ValueError(
                "`redraw` needs a projection that is drawn: a built layer with "
                "attention_method='linear' and another feature_map than 'learned'. Received: "
                f"attention_method={self._options.attention_method!r}, built={self.built}, "
                f"feature_map={self._options.feature_map!r}"
            )
        self._random_projection.redraw()

    def random_features(self):
        """The `Features` that inference uses now, for diagnostics; the layer must be built."""
        return self._features(training=False)

    def compute_output_spec(self, *args, **kwargs):
        """Shapes and dtypes of what a symbolic call returns, without running `call`."""
        given = inspect.signature(self.call).bind(*args, **kwargs).arguments
        added = {name: given.pop(name) for name in ADDED_CALL_ARGUMENTS if name in given}
        if not self._options.linear:
            _refuse_in_quadratic(**added)
            with_scores = given.pop("return_attention_scores", False)
            output = super().compute_output_spec(**given)
            if not with_scores:
                return output
            # The parent gives scores a shape (B, H, T, T), whatever S and the axes are.
            shapes = given["query"].shape, given["value"].shape
            axes = resolve_axes(self._attention_axes, len(shapes[0]))
            sizes = ScoreShape.of(*shapes, axes, self._num_heads).sizes()
            return output, keras.KerasTensor(tuple(sizes), self.compute_dtype)
        fields = {field.name for field in dataclasses.fields(Masks)}
        masks = Masks(**{k: v for k, v in {**given, **added}.items() if k in fields})
        shapes = given["query"].shape, given["value"].shape
        axes = masks.check(*shapes, self._attention_axes)
        with_scores = given.pop("return_attention_scores", False)
        output = super().compute_output_spec(**given)
        dense = with_scores or masks.is_general(axes)
        scores = ScoreShape.of(*shapes, axes, self._num_heads)
        if dense:
            scores.check(self._options.dense_limit)
        if added.get("initial_state") is not None or added.get("return_state"):
            check_call(masks, shapes, axes, dense)
        if added.get("return_state"):
            return output, self._state_spec(shapes[0], axes, masks.use_causal_mask)
        if with_scores:
            return output, keras.KerasTensor(tuple(scores.sizes()), self.compute_dtype)
        return output

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            **self._options.config(),
            "flash_attention": self._requested_flash_attention,
        }

    def _build_projection(self):
        """Creates what features are made of."""
        options = self._options
        sizes = options.supports, self._key_dim
        drawn = {
            "scaling": options.scaling,
            "seed": default_seed() if self.seed is None else self.seed,
        }
        if options.learned:
            self._learned_projection = LearnedProjection(
                *sizes,
                self._num_heads,
                options.num_key_value_heads or self._num_heads,
                regularizer=options.feature_regularizer,
                name="learned_projection",
                **drawn,
            )
            self._learned_projection.build()
            return
        self._random_projection = RandomProjection(
            *sizes,
            redraw_interval=options.redraw_interval,
            feature_map=options.feature_map,
            name="random_projection",
            **drawn,
        )
        self._random_projection.build()

    @property
    def _projection_layer(self):
        """The sublayer with what features are made of, of a built linear layer."""
        return self._random_projection or self._learned_projection

    def _features(self, training, with_draw=True):
        """The `Features` of a call; without `with_draw` they may have none."""
        far_bias = self._options.far_bias
        return self._projection_layer.current_features(training, with_draw)._replace(
            exact_window=self._options.exact_window,
            exact_keys=self._options.exact_keys,
            far_bias=far_bias if self._far_bias is None else self._far_bias.bias.value,
        )

    def _empty_state(self, batch, **window):
        """The state of no key for `batch` rows; with near rows for the arguments of a `window`."""
        return empty_state(
            *self._state_sizes(batch),
            accumulator(tf.as_dtype(self.compute_dtype)),
            draw=self._projection_layer.draw_number(),
            **window,
        )

    def _converted(self, name, x):
        """An input as a tensor of the compute dtype, with the mask that Keras attached to it."""
        mask = mask_of(x)
        if x is None:
            return None
        if not hasattr(x, "shape") or isinstance(x, np.ndarray):
            x = checks.tensor(f"`{name}`", x)
        x = self.dtype_policy.convert_input(x, self.autocast, self.input_dtype)
        if mask is not None:
            x._keras_mask = mask
        return x

    def _build_grouped(self, query_shape, value_shape, key_shape, groups):
        """`MultiHeadAttention.build` for `groups` heads of key and value: the same sublayers."""
        # Quadratic attention is the parent's, which needs as many heads of key as of query.
        repeats = 1 if self._options.linear else self._num_heads // groups
        self._query_dense = self._dense("query", query_shape, self._num_heads, self._key_dim)
        self._key_dense = self._dense("key", key_shape, groups, self._key_dim, repeats)
        if getattr(self, "_use_gate", False):
            self._gate_dense = self._dense(
                "gate", query_shape, self._num_heads, self._value_dim, activation="sigmoid"
            )
        self._value_dense = self._dense("value", value_shape, groups, self._value_dim, repeats)
        self._build_attention(len(value_shape) + 1)
        self._output_dense = self._make_output_dense(
            query_shape, self._get_common_kwargs_for_sublayer(), "attention_output"
        )
        self._output_dense.build((*query_shape[:-1], self._num_heads, self._value_dim))

    def _dense(self, name, shape, heads, dim, repeats=1, activation=None):
        """A built sublayer from `[B, ..., channels]` (its `shape`) to `[B, ..., heads, dim]`."""
        axes = "abcdefghijklmnopqrstuvw"[: len(shape) - 1]
        kind = keras.layers.EinsumDense if repeats == 1 else _RepeatedHeads
        dense = kind(
            f"{axes}x,xyz->{axes}yz",
            output_shape=[None] * (len(shape) - 2) + [heads, dim],
            bias_axes="yz" if self._use_bias else None,
            activation=activation,
            name=name,
            **self._get_common_kwargs_for_sublayer(),
            **({} if repeats == 1 else {"repeats": repeats}),
        )
        dense.build(shape)
        return dense

    def _heads(self, query, key, value, start, segment_ids):
        """Query, key and value of all heads, folded and with rotary positions.

        Args:
            query, key, value: the layer's inputs.
            start: position of the first element of the sequence.
            segment_ids: folded, or None: positions start again with every run of equal ones.

        Returns:
            `[B', T, H, D]`, `[B', S, G, D]` and `[B', S, G, E]`.
        """
        denses = (self._query_dense, self._key_dense, self._value_dense)
        query, key, value = (
            fold(dense(x), self._attention_axes)
            for dense, x in zip(denses, (query, key, value), strict=True)
        )
        if self._rotary_embedding is None:
            return query, key, value
        if segment_ids is None:
            where = [{"start_index": first_position(start, x)} for x in (query, key)]
        else:
            where = [{"positions": _positions_of(segment_ids)}] * 2
        return self._rotated(query, **where[0]), self._rotated(key, **where[1]), value

    def _rotated(self, x, **where):
        """A query or key `[B', L, H, D]`, rotated by its positions if the layer has rotary ones."""
        if self._rotary_embedding is None:
            return x
        return tf.cast(self._rotary_embedding(x, **where), x.dtype)

    def _output(self, output, query, axes):
        """The layer's output, from its input `query` and the attention of its heads.

        Args:
            output: `[B', T, H, E]`.
            query: `[B, q1, ..., qn, channels]`.
            axes: attention axes, as `resolve_axes` returns them.
        """
        output = unfold(output, axes, like=query)
        if getattr(self, "_use_gate", False):  # not every version of Keras has it
            output = output * self._gate_dense(query)
        return self._output_dense(output)

    def _check_streams(self, method):
        """Refuses `method` where there is no state: quadratic attention, or a layer not built."""
        if not self._options.linear or not self.built:
            raise ValueError(
                f"`{method}` needs a built layer with attention_method='linear'. Received: "
                f"attention_method={self._options.attention_method!r}, built={self.built}"
            )

    def _check_rank(self, **inputs):
        """Refuses inputs of another rank than those that the layer was built for."""
        rank = self._input_rank
        for name, x in inputs.items():
            if len(x.shape) != rank:
                raise ValueError(
                    f"`{name}` must have rank {rank}, as in the layer's other calls. "
                    f"Received: {name}.shape={tuple(x.shape)}"
                )

    def _state_sizes(self, batch):
        """Sizes `[N, G, M, E]` of the `mean` of a state of `batch` rows."""
        groups = self._options.num_key_value_heads or self._num_heads
        return batch, groups, self._projection_layer.features, self._value_dim

    def _state_spec(self, query_shape, axes, causal):
        """The `AttentionState` of a symbolic call."""
        others = [size for axis, size in enumerate(query_shape[:-1]) if axis not in axes]
        sizes = self._state_sizes(None if None in others else product(others))
        dtype = accumulator(tf.as_dtype(self.compute_dtype)).name
        near = []
        if causal and self._options.exact_window is not None:
            (batch, groups), rows = sizes[:2], stored_rows(self._options.exact_window)
            near = [
                keras.KerasTensor((batch, rows, groups, self._key_dim), self.compute_dtype),
                keras.KerasTensor((batch, rows, groups, self._value_dim), self.compute_dtype),
                keras.KerasTensor((batch, groups, rows), dtype),
            ]
        return AttentionState(
            keras.KerasTensor(sizes[:-1], dtype),
            keras.KerasTensor(sizes, dtype),
            keras.KerasTensor((), "int64"),
            keras.KerasTensor((), "int64"),
            *near,
        )


class _RepeatedHeads(keras.layers.EinsumDense):
    """An `EinsumDense` to `[B, ..., G, D]` that repeats every head: `[B, ..., G * repeats, D]`.

    The parent's exact attention then computes grouped heads, too.
    """

    def __init__(self, *args, repeats, **kwargs):
        super().__init__(*args, **kwargs)
        self._repeats = repeats

    def call(self, inputs, training=None):
        """Projects, then repeats."""
        return tf.repeat(super().call(inputs, training=training), self._repeats, axis=-2)


def _positions_of(segment_ids):
    """int64 `[B, L]`: positions in runs of equal ids, also of runs that began in another part."""
    positions, mesh = positions_in_runs(segment_ids), parallel.current()
    if mesh is None:
        return positions
    first_run = tf.cumsum(tf.cast(run_starts(segment_ids), tf.int32), axis=1) == 1
    before = rows_before_runs(segment_ids, mesh)
    return positions + tf.where(first_run, before[:, tf.newaxis], 0)


def _refuse_in_parts(what, given):
    """Raises ValueError for what is given, in a scope of sequences in parts."""
    if given and parallel.current() is not None:
        raise ValueError(
            f"{what} cannot be had in the scope of `performer.parallel.sequence`, where each "
            "replica has a part of the sequence."
        )


def _refuse_in_quadratic(**arguments):
    """Raises ValueError for a call argument that is given and that the parent does not have."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` needs attention_method='linear'. With 'quadratic', which is "
                "`keras.layers.MultiHeadAttention`, use `attention_mask`. "
                f"Received: attention_method='quadratic' and `{name}`"
            )
