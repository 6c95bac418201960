"""`from performer.networks.linear_attention import Performer`: the known import path."""

from performer.layers import Performer

__all__ = ["Performer"]
