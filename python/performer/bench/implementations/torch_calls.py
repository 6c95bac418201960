"""The torch implementations, in the layout that torch prefers: [B, H, L, D]."""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np

from performer.bench.cases import Case

PACKAGES = {"torch_exact": ("torch",), "torch_performer": ("torch", "performer_pytorch")}


def missing(impl: str) -> str:
    """Why an implementation cannot take part, or ""."""
    absent = [name for name in PACKAGES[impl] if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def prepare(threads: int) -> None:
    """Fixes the number of threads."""
    import torch

    torch.set_num_threads(threads)


def tensors(inputs: dict[str, np.ndarray]) -> dict:
    """The inputs as tensors, [B, H, L, D]."""
    import torch

    def tensor(x):
        narrow = x.dtype.itemsize == 2
        x = torch.from_numpy(x.astype(np.float32))
        x = x.transpose(1, 2).contiguous() if x.ndim == 4 else x
        return x.bfloat16() if narrow else x

    return {name: tensor(x) for name, x in inputs.items()}


def call(impl: str, case: Case, inputs: dict):
    """A function without arguments that computes the results on `tensors`."""
    import torch

    attention = _attention(impl, case, inputs["projection"])
    leaves = [inputs[name] for name in ("query", "key", "value")]

    def forward():
        with torch.no_grad():
            return {"out": attention(*leaves)}

    def forward_and_backward():
        fresh = [x.detach().requires_grad_() for x in leaves]
        out = attention(*fresh)
        gradients = torch.autograd.grad(out, fresh, inputs["grad_out"])
        return {"out": out.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}

    return forward_and_backward if case.backward else forward


def arrays(results: dict) -> dict[str, np.ndarray]:
    """Results as arrays: out [B, L, H, D], and gradients by the name of their input."""
    return {name: x.transpose(1, 2).float().numpy() for name, x in results.items()}


def matrix_product(size: int):
    """A function without arguments that multiplies two float32 matrices [size, size]."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.matmul(a, b)


def _attention(impl, case, projection):
    if impl == "torch_exact":
        exact = importlib.import_module("torch.nn.functional").scaled_dot_product_attention
        return lambda query, key, value: exact(query, key, value, is_causal=case.causal)
    attention = importlib.import_module("performer_pytorch").FastAttention(
        dim_heads=case.dim, nb_features=case.features, causal=case.causal
    )
    attention.projection_matrix.copy_(projection)
    return attention
