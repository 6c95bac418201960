"""Keras layers."""

from performer.layers.performer import Performer
from performer.layers.position_embedding import PositionEmbedding, TokenAndPositionEmbedding
from performer.layers.rotary_embedding import RotaryEmbedding
from performer.layers.transformer_decoder import PerformerDecoder
from performer.layers.transformer_encoder import PerformerEncoder

__all__ = [
    "Performer",
    "PerformerDecoder",
    "PerformerEncoder",
    "PositionEmbedding",
    "RotaryEmbedding",
    "TokenAndPositionEmbedding",
]
