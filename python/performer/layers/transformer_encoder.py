"""The encoder block of a Transformer, with linear attention."""

import keras

from performer.layers._block import Block
from performer.layers._masks import mask_of


@keras.saving.register_keras_serializable(package="performer")
class PerformerEncoder(Block):
    """Transformer encoder block with linear attention; stack several for an encoder.

    Arguments, calls, and names and shapes of weights are those of
    `keras_hub.layers.TransformerEncoder`, with additions for linear attention. Architecture:
    Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762.

    Args:
        intermediate_dim: Size of the feed-forward's inner layer.
        num_heads: Number of attention heads, each of size `channels // num_heads`.
        dropout: Probability of dropping keys in attention, and entries of the outputs of attention
            and feed-forward. Defaults to 0.
        activation: Activation of the inner layer. Defaults to `"relu"`.
        layer_norm_epsilon: Epsilon of the layer normalizations. Defaults to 1e-5.
        kernel_initializer, bias_initializer: Of all dense layers, those of attention included.
            Default to `"glorot_uniform"` and `"zeros"`.
        normalize_first: Boolean, whether to normalize the inputs of attention and feed-forward (as
            GPT-2), rather than the sums after them (as BERT). Defaults to `False`.
        kernel_regularizer, bias_regularizer: Of all dense layers. Default to `None`.
        attention_method, supports, rotary_embedding: As `performer.Performer`. `supports` defaults
            to 256.
        exact_window, far_bias: As `performer.Performer`, for self-attention. Default to `None`.
        attention_options: Dict of further arguments of `performer.Performer`, for the attention
            layers; none that the block sets.
        seed: Integer that seeds projection and dropout, or `None`.
        **kwargs: Arguments of `keras.layers.Layer`, such as `activity_regularizer`.

    Call arguments:
        inputs: `(B, L, channels)`.
        padding_mask: Boolean `(B, L)`, `True` where there is a token. Defaults to the mask that
            Keras attached.
        attention_mask: Boolean `(B, L, L)`, `True` where a position may attend to another: dense
            form, see `performer.Performer`.
        training: Python boolean.
        return_attention_scores: Boolean, whether to return the scores too: dense form.
        segment_ids: Integers `(B, L)`: a row holds several sequences, which are runs of equal ids.

    Returns:
        `(B, L, channels)`; with `return_attention_scores` a pair of it and `(B, H, L, L)`.

    Raises:
        ValueError, RuntimeError: As `performer.Performer`; fewer channels than heads;
            `attention_options` that the block sets.

    Example:

    >>> import tensorflow as tf
    >>> from performer import PerformerEncoder
    >>> block = PerformerEncoder(intermediate_dim=64, num_heads=8)
    >>> block(tf.random.normal([2, 10, 64]), padding_mask=tf.sequence_mask([10, 7])).shape
    TensorShape([2, 10, 64])
    """

    def build(self, inputs_shape):
        """Creates the sublayers."""
        self._make_attention(
            "self_attention",
            inputs_shape,
            inputs_shape,
            layer_name="self_attention_layer",
            rotary_embedding=self.rotary_embedding,
            **self._window(),
        )
        self._feedforward_layer_norm = self._norm("feedforward_layer_norm", inputs_shape)
        self._build_feedforward(inputs_shape)

    def call(
        self,
        inputs,
        padding_mask=None,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        segment_ids=None,
    ):
        """Attention, then the feed-forward; see the class."""
        if padding_mask is None:
            padding_mask = mask_of(inputs)

        def attention(y):
            result = self._self_attention_layer(
                y,
                y,
                value_mask=padding_mask,
                attention_mask=attention_mask,
                return_attention_scores=return_attention_scores,
                training=training,
                segment_ids=segment_ids,
            )
            return result if return_attention_scores else (result, None)

        x, scores = self._residual("self_attention", attention, self._cast(inputs), training)
        x = self._feedforward(x, training)
        return (x, scores) if return_attention_scores else x
