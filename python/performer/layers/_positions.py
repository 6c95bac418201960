"""Arguments that say where in a sequence the elements of a call stand."""

import tensorflow as tf


def integer_scalar(name, value):
    """`value` as an int64 scalar.

    Raises:
        ValueError: no integer scalar.
    """
    try:
        x = tf.convert_to_tensor(value)
    except Exception as error:  # TensorFlow and NumPy raise a dozen kinds
        raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}") from error
    if not x.dtype.is_integer or x.shape.rank not in (0, None):
        raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}")
    return tf.cast(x, tf.int64)


def positions_of(inputs, positions, axis):
    """`positions` as int64 `(L,)` or `(B, L)`, for inputs of which `axis` is the sequence.

    Whole floating numbers are taken, too, as in `keras_hub.layers`.

    Raises:
        ValueError: another shape or type.
        tf.errors.InvalidArgumentError: another length, known only when the graph runs.
    """
    rule = "`positions` must be numbers of shape (L,) or (B, L)"
    try:
        x = tf.convert_to_tensor(positions)
    except Exception as error:
        raise ValueError(f"{rule}. Received: positions={positions!r}") from error
    sizes = (inputs.shape[0], inputs.shape[axis])[-x.shape.rank :] if x.shape.rank else ()
    fits = len(x.shape) in (1, 2) and all(
        None in pair or pair[0] == pair[1] or (place == 0 and len(x.shape) == 2 and pair[0] == 1)
        for place, pair in enumerate(zip(x.shape, sizes, strict=False))
    )
    if not fits or not (x.dtype.is_integer or x.dtype.is_floating):
        raise ValueError(
            f"{rule} = {tuple(sizes)}. Received: positions of {x.dtype.name} {tuple(x.shape)} for "
            f"inputs of {tuple(inputs.shape)}"
        )
    return tf.cast(x, tf.int64)
