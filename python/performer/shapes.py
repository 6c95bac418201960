"""Shapes of tensors, of which a part may be known only when the graph runs."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def dims(x: tf.Tensor) -> list[Any]:
    """Shape of x: integers where it is known, int32 scalars where it is not."""
    sizes = list(x.shape)
    if None in sizes:
        dynamic = tf.shape(x)
        sizes = [dynamic[i] if size is None else size for i, size in enumerate(sizes)]
    return sizes
