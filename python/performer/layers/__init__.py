"""Keras layers."""

from performer.layers.performer import Performer
from performer.layers.positions import PositionEmbedding, TokenAndPositionEmbedding
from performer.layers.rotary import RotaryEmbedding

__all__ = ["Performer", "PositionEmbedding", "RotaryEmbedding", "TokenAndPositionEmbedding"]
