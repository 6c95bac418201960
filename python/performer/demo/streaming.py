"""Sampling byte by byte with a state of constant size: no cache that grows with the text."""

import numpy as np
import tensorflow as tf

from performer import ops
from performer.demo.model import WIDTH


class Stream:
    """Runs a trained model of `model.build("linear")` one byte at a time.

    Its state is the byte before and, for each block, the `AttentionState` and the key's input,
    which is one position late.
    """

    def __init__(self, network):
        self.embedding, *self.blocks, self.norm, self.head = network.layers[1:]
        self.state = [tf.zeros([1, 1], tf.int32), *(_empty(block) for block in self.blocks)]
        self._step = tf.function(self._forward)

    def step(self, byte):
        """Takes one byte and returns the logits `[256]` of the next."""
        logits, self.state = self._step(tf.constant([[byte]]), self.state)
        return logits[0, 0].numpy()

    def _forward(self, byte, state):
        previous, *states = state
        x = self.embedding.embed(byte, previous)
        after = [byte]
        for block, (memory, key) in zip(self.blocks, states, strict=True):
            y = block.norm(x)
            branch, memory = attend(block.attention, y, key, memory)
            x = block.dense(x + branch)
            after.append((memory, y))
        return self.head(self.norm(x)), after


def _empty(block):
    """The state of a block before the first byte."""
    layer = block.attention
    features, size = layer.projection.shape
    memory = ops.empty_state(1, layer.num_heads, features, size, draw=layer.draw)
    return memory, tf.zeros([1, 1, WIDTH])


def attend(layer, x, key, state):
    """Returns (output, state after) of a causal attention layer for `x`, `key` `[B, L, dim]`."""
    out, state = ops.favor_attention(
        layer.query_dense(x),
        layer.key_dense(key),
        layer.value_dense(x),
        layer.projection,
        causal=True,
        initial_state=state,
        return_state=True,
        draw=layer.draw,
    )
    return layer.output_dense(out), state


def sample(network, prompt, length, temperature=0.8, seed=0):
    """Returns `prompt` continued by `length` sampled bytes."""
    random = np.random.default_rng(seed)
    stream, text = Stream(network), bytearray(prompt)
    for byte in prompt:
        logits = stream.step(byte)
    for _ in range(length):
        weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
        text.append(int(random.choice(256, p=weights / weights.sum())))
        logits = stream.step(text[-1])
    return bytes(text)
