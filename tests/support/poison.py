"""Inputs whose future holds the worst there is, for tests of causality."""

import numpy as np

HUGE = {"float32": 1e30, "float64": 1e30, "bfloat16": 1e30, "float16": 6e4}
POISONS = ["noise", "NaN", "inf", "-inf", "huge", "growing", "masked"]


def poisoned(x, poison, t, dtype, only=("query", "key", "value", "key_bias")):
    """The inputs with everything from row t on replaced."""
    rng = np.random.default_rng(9)
    changed = {name: array.copy() for name, array in x.items()}
    for name in only:
        rows = changed[name][..., t:] if name == "key_bias" else changed[name][:, t:]
        noise = rng.normal(size=rows.shape)
        fill = {
            "noise": noise,
            "NaN": np.nan,
            "inf": np.inf,
            "-inf": -np.inf,
            "huge": np.sign(noise) * HUGE[dtype],
            "growing": noise * 3 + (35.0 * np.arange(rows.shape[-1]) if name == "key_bias" else 0),
            "masked": -np.inf if name == "key_bias" else np.nan,
        }[poison]
        with np.errstate(over="ignore"):
            rows[...] = np.asarray(fill).astype(rows.dtype)
    return changed
