"""Keras layers."""

from performer.layers.decoder import PerformerDecoder
from performer.layers.encoder import PerformerEncoder
from performer.layers.performer import Performer
from performer.layers.positions import PositionEmbedding, TokenAndPositionEmbedding
from performer.layers.rotary import RotaryEmbedding

__all__ = [
    "Performer",
    "PerformerDecoder",
    "PerformerEncoder",
    "PositionEmbedding",
    "RotaryEmbedding",
    "TokenAndPositionEmbedding",
]
