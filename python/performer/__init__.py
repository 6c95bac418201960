"""Performer: linear attention for TensorFlow and Keras, with its own kernels.

`performer.Performer` is the Keras layer, `performer.favor_attention` the function under it, and
`summarize`, `read` and `merge` the halves of that. Importing this package loads the compiled ops
and registers the layer with Keras, so that saved models load. Without TensorFlow it still imports,
and has the NumPy reference and, built from source, the compiled core (`performer.reference`,
`performer._core`); what needs TensorFlow then says how to get it.

Example:
    >>> import performer
    >>> performer.__version__
    '0.1.0'
"""

import sys as _sys
from importlib.util import find_spec as _find_spec

__version__ = "0.1.0"

__all__ = [
    "AttentionState",
    "Performer",
    "PerformerDecoder",
    "PerformerEncoder",
    "PositionEmbedding",
    "RotaryEmbedding",
    "StreamingSequential",
    "TokenAndPositionEmbedding",
    "callbacks",
    "convert",
    "diagnostics",
    "empty_state",
    "export",
    "favor_attention",
    "feature_maps",
    "generate",
    "merge",
    "merge_outputs",
    "orthogonal_projection",
    "parallel",
    "read",
    "summarize",
]

if _find_spec("tensorflow") is None:

    def __getattr__(name):
        from performer.loader import WITHOUT_TENSORFLOW

        if name in __all__:
            raise ImportError(f"performer.{name}: {WITHOUT_TENSORFLOW}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

else:
    from performer import loader

    loader.ops()  # First, so that a library made for another TensorFlow is reported at once.

    from performer import callbacks, convert, ops, parallel
    from performer.features import diagnostics, feature_maps, projections, tolerances
    from performer.features.projections import orthogonal_projection
    from performer.generation import generate
    from performer.layers import (
        Performer,
        PerformerDecoder,
        PerformerEncoder,
        PositionEmbedding,
        RotaryEmbedding,
        TokenAndPositionEmbedding,
    )
    from performer.layers.streaming_sequential import StreamingSequential
    from performer.ops import (
        AttentionState,
        empty_state,
        favor_attention,
        merge,
        merge_outputs,
        read,
        summarize,
    )
    from performer.saved_model import export

    # Public modules that stand in a folder of their own, by the names under which they are known.
    for _name, _module in {
        "diagnostics": diagnostics,
        "feature_maps": feature_maps,
        "library": loader,
        "projections": projections,
        "state": ops,
        "tolerances": tolerances,
    }.items():
        _sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
