"""The GPU kernels on arrays, through torch tensors: calls as those of `support.core_calls`."""

from __future__ import annotations

import functools
import os

import ml_dtypes
import numpy as np
import pytest

from performer.bench.implementations import torch_kernels
from support.core_calls import signature_names

DTYPES = ["float32", "bfloat16", "float16"]
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@functools.cache
def why_not() -> str:
    """Why the kernels cannot run here, or ""."""
    return torch_kernels.missing()


if os.environ.get("PERFORMER_REQUIRE_GPU") and why_not():
    raise RuntimeError(f"PERFORMER_REQUIRE_GPU is set: {why_not()}")
needs_gpu = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is a GPU")


ON_THE_HOST = ("offsets", "start")


def to_torch(x: np.ndarray, *, on_the_host: bool = False):
    """A tensor on the GPU, or on the CPU, bfloat16 included."""
    import torch

    if x.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(x))
    return tensor if on_the_host else tensor.cuda()


def to_numpy(tensor) -> np.ndarray:
    """The tensor's numbers, in its type."""
    import torch

    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def has_small_blocks() -> bool:
    """Whether this GPU has less shared memory than the blocks of wide heads are made for."""
    import torch

    return torch.cuda.get_device_properties().shared_memory_per_block_optin < 163 * 1024


def run(op: str, x: dict, **options) -> dict[str, np.ndarray]:
    """An operator on those of the arrays that are its inputs; memory is poisoned before.

    Skips the test where this GPU has no room for heads of this width.
    """
    inputs = {
        name: to_torch(x[name], on_the_host=name in ON_THE_HOST) for name in signature_names(op)
    }
    try:
        results = torch_kernels.run(op, inputs, poison=True, **options)
    except RuntimeError as error:
        if has_small_blocks() and "heads of this width" in str(error):
            pytest.skip(str(error))
        raise
    return {name: to_numpy(tensor) for name, tensor in results.items()}
