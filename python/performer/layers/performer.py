"""Performer: Keras's MultiHeadAttention with linear attention."""

import dataclasses
import inspect

import keras
import tensorflow as tf

from performer import library
from performer.layers.arguments import (
    Options,
    check_rate,
    check_seed,
    check_size,
    default_seed,
    split_list,
)
from performer.layers.attention import attend, check_call
from performer.layers.projection import HasProjection, RandomProjection


@keras.saving.register_keras_serializable(package="performer")
class Performer(HasProjection, keras.layers.MultiHeadAttention):
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
            attention of the same paper, which does not approximate softmax).
        redraw_interval: Number of training calls that a projection serves before the next call
            draws another. Defaults to `None`: one projection for ever. Inference never draws.
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
        attention_mask: Boolean `(B, 1, S)`, the same for every query.
        return_attention_scores: Must be `False` in linear attention, which has no scores.
        training: Python boolean: whether to drop keys and to follow `redraw_interval`.
        use_causal_mask: Boolean, whether a query attends only to its own and earlier positions
            (in row-major order of the attention axes). Needs T = S.

    Returns:
        Tensor of the shape of `query`, the last axis replaced by `output_shape` if given, in the
        compute dtype. A query that attends to no key (masked, or no key left) gets attention 0,
        so its output is the bias of the output layer, as `MultiHeadAttention` documents it. (For
        3-D inputs without dropout that layer in fact returns the mean of all values.)

    Raises:
        RuntimeError: `'must have numbers of supports specified'`: linear without `supports`.
        ValueError: an argument outside its range; shapes, axes or masks that do not fit; in
            linear attention, a sliding window, attention scores or a general `attention_mask`.

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
        seed=None,
        flash_attention=None,
        **kwargs,
    ):
        options = Options(
            attention_method=attention_method,
            supports=supports,
            scaling=scaling,
            feature_map=feature_map,
            redraw_interval=redraw_interval,
            sliding_window=kwargs.get("sliding_window"),
        )
        super().__init__(
            num_heads=check_size("num_heads", num_heads),
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
        self._requested_flash_attention = flash_attention
        if options.linear:
            self.supports_jit = library.supports_jit()
            if dropout:
                self._dropped_keys_seed = keras.random.SeedGenerator(self.seed)

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
        return super().__call__(query, *args, **kwargs)

    def build(self, query_shape, value_shape, key_shape=None):
        """Creates the weights for inputs of these shapes."""
        if self._options.linear:
            check_call(query_shape, value_shape, self._attention_axes)
        super().build(query_shape, value_shape, key_shape)
        if self._options.linear:
            # After the parent's weights, which keep their places in `weights`.
            self._random_projection = RandomProjection(
                self._options.supports,
                self._key_dim,
                scaling=self._options.scaling,
                seed=default_seed() if self.seed is None else self.seed,
                redraw_interval=self._options.redraw_interval,
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
    ):
        """Attention of `query` to `key` and `value`; see the class."""
        if not self._options.linear:
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
        check_call(
            query.shape,
            value.shape,
            self._attention_axes,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
        )
        # The dense layers know no masks and would warn of losing one: identity leaves it behind,
        # and leaves the caller's tensor as it is.
        query, value, key = (tf.identity(x) for x in (query, value, value if key is None else key))
        projection = self._random_projection.current(training)
        output = attend(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            projection,
            axes=self._attention_axes,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            use_causal_mask=use_causal_mask,
            dropout=(self._dropout, self._dropped_keys_seed)
            if training and self._dropout
            else None,
            draw=self.draw.value,
            feature_map=self._options.feature_map,
        )
        if getattr(self, "_use_gate", False):  # not in every version of Keras
            output = output * self._gate_dense(query)
        return self._output_dense(output)

    def compute_output_spec(self, *args, **kwargs):
        """Shape and dtype of the output of a symbolic call, which `call` does not see."""
        if self._options.linear:
            given = inspect.signature(self.call).bind(*args, **kwargs).arguments
            names = ("attention_mask", "return_attention_scores", "use_causal_mask")
            options = {name: given[name] for name in names if name in given}
            check_call(given["query"].shape, given["value"].shape, self._attention_axes, **options)
        return super().compute_output_spec(*args, **kwargs)

    def get_config(self):
        """Every argument of the constructor."""
        return {
            **super().get_config(),
            **dataclasses.asdict(self._options),
            "flash_attention": self._requested_flash_attention,
        }
