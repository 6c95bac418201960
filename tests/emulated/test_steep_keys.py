"""Keys of which each outweighs all before it by far, in the emulated CUDA kernels."""

from dataclasses import replace

import numpy as np
import pytest

from support.compare import assert_close
from support.core_calls import backward, forward
from support.emulated_calls import run
from support.inputs import Case, cotangents
from support.steep_keys import KINDS, steep

CASE = Case(batch=1, rows=70, heads=1, groups=1, features=24, bias="1GS", std=0.5, state=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_as_good_as_their_log_features(kind, dtype):
    """A row may see its own key alone; all gradients but those of values are about 0 there."""
    case = replace(CASE, state=0 if "masked" in kind else 1)
    x, incoming = steep(case, kind, dtype), cotangents(case, dtype)
    wide = [
        {n: a if n == "offsets" else a.astype("f8") for n, a in y.items()} for y in (x, incoming)
    ]
    exact, grads = forward(wide[0], True), backward(*wide, True)
    results, ours = forward(x, True, run), backward(x, incoming, True, run)
    for name, a in exact.items():
        assert_close(results[name], a, rms=5e-4 if dtype == "float32" else 4e-3, what=name)
    for name, a in grads.items():
        worst = (1e-3 if dtype == "float32" else 3e-2) * max(1, np.abs(a).max())
        assert_close(ours[name], a, worst=worst, what=name)
