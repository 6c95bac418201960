"""From models with exact attention to models with `Performer`, and back.

`copy_weights` carries the weights of one attention layer to another, `replace_attention` exchanges
the attention layers of a whole model. `calibrate` fits their features to data, `distill` trains
them to do what the exact layers did, `survey` measures which sizes a model needs. What they find is
a `Report`.
"""

from performer.convert.calibration import calibrate
from performer.convert.distillation import distill
from performer.convert.replacement import replace_attention
from performer.convert.report import Report, Trial
from performer.convert.survey import survey
from performer.convert.weights import copy_weights
from performer.layers._calibration import LayerReport

__all__ = [
    "LayerReport",
    "Report",
    "Trial",
    "calibrate",
    "copy_weights",
    "distill",
    "replace_attention",
    "survey",
]
