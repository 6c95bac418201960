"""Keys of which each outweighs all before it by far, in the emulated CUDA kernels."""

import pytest

from support.emulated_calls import run
from support.steep_keys import KINDS, check_steep_keys


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_as_good_as_their_log_features(kind, dtype):
    check_steep_keys(run, kind, dtype)
