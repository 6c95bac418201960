"""Linear attention as functions of tensors, over the compiled operators."""

from performer.ops.attention import favor_attention, read, summarize
from performer.ops.fingerprint import fingerprint
from performer.ops.outputs import merge_outputs
from performer.ops.state import AttentionState, empty_state, merge

__all__ = [
    "AttentionState",
    "empty_state",
    "favor_attention",
    "fingerprint",
    "merge",
    "merge_outputs",
    "read",
    "summarize",
]
