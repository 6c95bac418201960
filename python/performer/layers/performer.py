"""Performer: Keras's MultiHeadAttention with linear attention."""

import dataclasses
import inspect

import keras
import tensorflow as tf

from performer import loader
from performer.layers._arguments import (
    DENSE_LIMIT,
    Options,
    check_rate,
    check_seed,
    check_size,
    default_seed,
    split_list,
)
from performer.layers._attention import attend
from performer.layers._axes import resolve_axes
from performer.layers._dense import attend_densely, score_shape
from performer.layers._heads import GroupedHeads
from performer.layers._masks import mask_of
from performer.layers._projection import HasProjection, RandomProjection
from performer.layers._streaming import HasState, advanced, check_call, position_of, with_tensors
from performer.layers._visibility import Visibility

# Call arguments that `keras.layers.MultiHeadAttention` does not have.
ADDED_CALL_ARGUMENTS = ("segment_ids", "prefix_mask", "initial_state", "return_state")


@keras.saving.register_keras_serializable(package="performer")
class Performer(HasProjection, HasState, GroupedHeads, keras.layers.MultiHeadAttention):
    """Multi-head attention whose time and memory grow linearly with the sequence.

    A `keras.layers.MultiHeadAttention` in which `softmax(query . key)` is replaced by the FAVOR+
    estimator of [Choromanski et al., 2020](https://arxiv.org/abs/2009.14794) with `supports`
    random features. Dense layers, weights and shapes are those of `MultiHeadAttention`.

    All heads share one projection: each has its own learned query and key kernels, so that its
    features differ anyway, and one `[M, D]` matrix stays in the processor's cache. It is a saved
    weight that no optimizer trains, float32 under every dtype policy.

    Args:
        num_heads: Number of attention heads.
        key_dim: Size D of each attention head for query and key.
        value_dim: Size E of each attention head for value. Defaults to `key_dim`.
        dropout: Probability, in [0, 1), of dropping a key, for one head and all queries of a
            batch row, in training; the keys left are normalised among themselves. Defaults to 0.
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
            attention of the same paper, which does not approximate softmax), or an object like
            `performer.feature_maps.FeatureMap`.
        redraw_interval: Number of training calls that a projection serves before the next call
            draws another. Defaults to `None`: one projection for ever. Inference never draws.
            `performer.callbacks.RedrawProjections` redraws by epochs or batches instead.
        num_key_value_heads: Number G of heads of key and value, a divisor of `num_heads`; head h
            of the query uses head h // (num_heads / G). Defaults to `num_heads`.
        rotary_embedding: `performer.RotaryEmbedding`, or a layer that is called like it: turns
            queries and keys by their positions. Linear attention only. Defaults to `None`.
        max_segments: Largest number of sequences in a row of `segment_ids`. Changes no output; give
            it where XLA compiles the layer, which otherwise, as it cannot count them, reserves
            memory for S of them in each row. Defaults to `None`.
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
            A masked key takes part in nothing; a masked query attends to no key.
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
        prefix_mask: Boolean `(B, S)`, T = S, with `use_causal_mask`: `True` for keys that every
            query sees, also earlier ones. Linear attention only.
        initial_state: State of keys that come before those of the call, which every query sees:
            what `get_initial_state`, `summarize` or a call with `return_state` returned. Linear
            attention only, and not with scores, `segment_ids`, or a causal mask for T other than
            S. With several attention axes a call holds a part of the first of them.
        return_state: Boolean, whether to return the state after all keys, too.

    Returns:
        Tensor of the shape of `query`, the last axis replaced by `output_shape` if given, in the
        compute dtype. With `return_attention_scores` a pair of it and the scores `(B, H, T, S)`,
        before dropout; with `return_state` a pair of it and the `performer.AttentionState`.
        A query that attends to no key (masked, or no key left) gets attention 0,
        so its output is the bias of the output layer, as `MultiHeadAttention` documents it. (For
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
        inputs by a single bit.

    Example:

    >>> import keras
    >>> from performer import Performer
    >>> layer = Performer(num_heads=2, key_dim=2, supports=2)
    >>> layer(keras.Input(shape=[8, 16]), keras.Input(shape=[4, 16])).shape
    (None, 8, 16)
    """

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
        redraw_interval=None,
        num_key_value_heads=None,
        rotary_embedding=None,
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
            redraw_interval=redraw_interval,
            num_key_value_heads=num_key_value_heads,
            max_segments=max_segments,
            dense_limit=dense_limit,
            rotary_embedding=rotary_embedding,
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

    def __call__(self, query, *args, **kwargs):
        """Calls the layer; `query` may be a list `[query, value]` or `[query, value, key]`."""
        if isinstance(query, list | tuple) and not args and "value" not in kwargs:
            query, args = split_list(query)
        if self._options.linear:
            query, args = self._converted(query), tuple(self._converted(x) for x in args)
            kwargs.update((k, self._converted(kwargs[k])) for k in ("value", "key") if k in kwargs)
            if kwargs.get("initial_state") is not None:
                kwargs["initial_state"] = with_tensors(kwargs["initial_state"])
        return super().__call__(query, *args, **kwargs)

    def _converted(self, x):
        """An input as a tensor of the compute dtype, with the mask that Keras attached to it."""
        mask = mask_of(x)
        x = self.dtype_policy.convert_input(x, self.autocast, self.input_dtype)
        if mask is not None:
            x._keras_mask = mask
        return x

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the weights for inputs of these shapes."""
        if self._options.linear:
            Visibility().check(query_shape, value_shape, self._attention_axes)
        groups = self._options.num_key_value_heads
        if groups is None or groups == self._num_heads:
            super().build(query_shape, value_shape, key_shape)
        else:
            self._build_grouped(
                query_shape,
                value_shape,
                value_shape if key_shape is None else key_shape,
                groups,
                repeats=1 if self._options.linear else self._num_heads // groups,
            )
        if self._options.linear:
            # After the parent's weights, which keep their places in `weights`.
            self._random_projection = RandomProjection(
                self._options.supports,
                self._key_dim,
                scaling=self._options.scaling,
                seed=default_seed() if self.seed is None else self.seed,
                redraw_interval=self._options.redraw_interval,
                feature_map=self._options.feature_map,
                name="random_projection",
            )
            self._random_projection.build()

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
        if not self._options.linear:
            _refuse_in_quadratic(
                segment_ids=segment_ids,
                prefix_mask=prefix_mask,
                initial_state=initial_state,
                return_state=return_state,
            )
            return super().call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )
        visibility = Visibility(
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            segment_ids=segment_ids,
            prefix_mask=prefix_mask,
        )
        axes = self._attention_axes
        visibility.check(query.shape, value.shape, axes)
        dense = visibility.needs_scores(len(axes), return_attention_scores)
        if initial_state is not None or return_state:
            check_call(visibility, (query.shape, value.shape), axes, dense)
        # The dense layers know no masks and would warn of losing one: identity leaves it behind,
        # and leaves the caller's tensor as it is.
        query, value, key = (tf.identity(x) for x in (query, value, value if key is None else key))
        heads = self._heads(query, key, value, position_of(initial_state), segment_ids)
        dropout = None
        if training and self._dropout:
            dropout = self._dropout, self._dropout_layer.seed_generator
        given = {
            "features": self._random_projection.current_features(training),
            "visibility": visibility,
            "axes": axes,
            "dropout": dropout,
        }
        scores, state = None, None
        if dense:
            output, scores = attend_densely(*heads, **given, limit=self._options.dense_limit)
        elif return_state:
            output, state = attend(*heads, **given, initial_state=initial_state, return_state=True)
            state = advanced(state, initial_state, key, axes)
        else:
            segments = self._options.max_segments
            output = attend(*heads, **given, initial_state=initial_state, max_segments=segments)
        output = self._output_dense(self._gated(output, query))
        if return_state:
            return output, state
        return (output, scores) if return_attention_scores else output

    def _heads(self, query, key, value, start=0, segment_ids=None):
        """Query, key and value as all heads see them, `[B, ..., H or G, D or E]`."""
        axes = self._attention_axes
        return (
            self._rotated(self._query_dense(query), axes, start, segment_ids),
            self._rotated(self._key_dense(key), axes, start, segment_ids),
            self._value_dense(value),
        )

    def _gated(self, output, query):
        """The attention output of all heads, gated by the query where the layer has a gate."""
        # Not every version of Keras has it.
        return output * self._gate_dense(query) if getattr(self, "_use_gate", False) else output

    def compute_output_spec(self, *args, **kwargs):
        """Shape and dtype of the output of a symbolic call, which `call` does not see."""
        given = inspect.signature(self.call).bind(*args, **kwargs).arguments
        added = {name: given.pop(name) for name in ADDED_CALL_ARGUMENTS if name in given}
        if not self._options.linear:
            _refuse_in_quadratic(**added)
            return super().compute_output_spec(**given)
        fields = {field.name for field in dataclasses.fields(Visibility)}
        visibility = Visibility(**{k: v for k, v in {**given, **added}.items() if k in fields})
        shapes = given["query"].shape, given["value"].shape
        visibility.check(*shapes, self._attention_axes)
        wanted = given.pop("return_attention_scores", False)
        output = super().compute_output_spec(**given)
        axes = resolve_axes(self._attention_axes, len(shapes[0]))
        dense = visibility.needs_scores(len(axes), wanted)
        if dense:
            scores = score_shape(*shapes, axes, self._num_heads, self._options.dense_limit)
        if added.get("initial_state") is not None or added.get("return_state"):
            check_call(visibility, shapes, axes, dense)
        if added.get("return_state"):
            return output, self._state_spec(shapes[0], axes)
        return (output, keras.KerasTensor(scores, self.compute_dtype)) if wanted else output

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            **self._options.config(),
            "flash_attention": self._requested_flash_attention,
        }


def _refuse_in_quadratic(**arguments):
    """ValueError for a call argument that the parent does not have."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(
                f"`{name}` needs attention_method='linear'. With 'quadratic', which is "
                "`keras.layers.MultiHeadAttention`, use `attention_mask`. "
                f"Received: attention_method='quadratic' and `{name}`"
            )
