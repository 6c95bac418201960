"""The published import path: `from performer.networks.linear_attention import Performer`."""

from performer.layers import Performer

__all__ = ["Performer"]
