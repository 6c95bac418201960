"""The operators in plain TensorFlow, differentiable to any order."""

from performer.composition.operators import causal, read, summarize
from performer.composition.windowed import near_far

__all__ = ["causal", "near_far", "read", "summarize"]
