"""Sampling byte by byte with a state of constant size: no cache that grows with the text."""

import numpy as np
import tensorflow as tf

from performer import ops
from performer.layers import Performer


class Stream:
    """Runs a trained model of `model.build("linear")` one byte at a time.

    The state is one `AttentionState` for each attention layer and the byte before.
    """

    def __init__(self, network):
        self.layers = network.layers[1:]
        mixers = [layer for layer in self.layers if isinstance(layer, Performer)]
        self.states = {
            layer.name: ops.empty_state(
                1, layer.num_heads, layer.projection.shape[0], layer._value_dim, draw=layer.draw
            )
            for layer in mixers
        }
        self.network = network
        self.previous = 0
        self._step = tf.function(self._forward)

    def step(self, byte):
        """Takes one byte and returns the logits `[256]` of the next."""
        logits, self.states = self._step(
            tf.constant([[byte]]), tf.constant([[self.previous]]), self.states
        )
        self.previous = byte
        return logits[0, 0].numpy()

    def _forward(self, byte, previous, states):
        states = dict(states)
        embedding, *rest = self.layers
        stream = embedding.this(byte) + embedding.previous(previous)
        branch = stream
        for layer in rest:
            kind = type(layer).__name__
            if kind == "Add":
                stream = branch = stream + branch
            elif isinstance(layer, Performer):
                branch, states[layer.name] = attend(layer, branch, states[layer.name])
            else:
                branch = layer(branch)
        return branch, states


def attend(layer, x, state):
    """Returns (output, state after) of a causal self-attention layer for `x` `[B, L, dim]`."""
    out, state = ops.favor_attention(
        layer.query_dense(x),
        layer.key_dense(x),
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
