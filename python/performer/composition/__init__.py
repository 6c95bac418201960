"""The operators in plain TensorFlow, differentiable to any order."""

from performer.composition.operators import causal, read, summarize

__all__ = ["causal", "read", "summarize"]
