"""Keras layers."""

from performer.layers.performer import Performer

__all__ = ["Performer"]
