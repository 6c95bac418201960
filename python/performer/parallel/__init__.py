"""More than one device or machine: sequences in parts, over the collectives of `tf.distribute`."""

from performer.parallel.attention import favor_attention
from performer.parallel.keras_fit import enable_fit
from performer.parallel.mesh import Mesh, current, sequence

__all__ = ["Mesh", "current", "enable_fit", "favor_attention", "sequence"]
