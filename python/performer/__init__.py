"""Performer: linear attention for TensorFlow and Keras, with its own kernels.

`performer.Performer` is the Keras layer, `performer.favor_attention` the function under it, and
`summarize`, `read` and `merge` the halves of that. Importing this package loads the compiled ops
and registers the layer with Keras, so that saved models load. Without TensorFlow it still imports,
and has the NumPy reference and the compiled core (`performer.reference`, `performer._core`).

Example:
    >>> import performer
    >>> performer.__version__
    '0.1.0'
"""

from importlib.util import find_spec as _find_spec

__version__ = "0.1.0"

if _find_spec("tensorflow") is not None:
    from performer import library

    library.ops()  # First, so that a library made for another TensorFlow is reported at once.

    from performer import callbacks, convert, diagnostics, feature_maps
    from performer.generation import generate
    from performer.layers import (
        Performer,
        PerformerDecoder,
        PerformerEncoder,
        PositionEmbedding,
        RotaryEmbedding,
        TokenAndPositionEmbedding,
    )
    from performer.models import StreamingSequential
    from performer.ops import favor_attention
    from performer.projections import orthogonal_projection
    from performer.state import AttentionState, empty_state, merge, read, summarize

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
        "favor_attention",
        "feature_maps",
        "generate",
        "merge",
        "orthogonal_projection",
        "read",
        "summarize",
    ]
