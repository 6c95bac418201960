"""What is compared: the kernels, torch's flash attention, and an unfused composition in torch.

An implementation is a class, made from a case and its tensors. Its `forward()` returns out; its
`backward()` returns the gradients of query, key and value, and needs a `forward()` before it. The
kernels take tensors [B, L, H, D]; the others get them as [B, H, L, D], which they prefer.
"""

from __future__ import annotations

import math

from performer.bench.implementations import torch_kernels

INPUTS = ("query", "key", "value")


def make_inputs(case, seed: int = 0) -> dict:
    """Standard normal tensors in bfloat16 and an orthogonal projection [M, D], rounded likewise."""
    import torch

    torch.manual_seed(seed)
    shape = (case.batch, case.length, case.heads, case.dim)
    x = {
        name: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        for name in (*INPUTS, "grad_out")
    }
    blocks = torch.randn(math.ceil(case.features / case.dim), case.dim, case.dim, device="cuda")
    rows = torch.linalg.qr(blocks)[0].reshape(-1, case.dim)[: case.features]
    x["projection"] = (math.sqrt(case.dim) * rows).bfloat16().float()
    return x


class Kernels:
    """The kernels of this package."""

    label, linear = "Performer", True

    def __init__(self, case, x: dict):
        import torch

        self.case = case
        zeros = {"device": "cuda", "dtype": torch.float32}
        features, heads = case.features, case.heads
        projection = x["projection"][None].contiguous()
        self.inputs = {
            **{name: x[name] for name in (*INPUTS, "grad_out")},
            "query_projection": projection,
            "key_projection": projection,
            "feature_bias": torch.zeros(1, features, **zeros),
            "key_bias": torch.zeros(1, 1, 1, **zeros),
            "initial_log_mass": torch.full((1, heads, features), -math.inf, **zeros),
            "initial_mean": torch.zeros(1, heads, features, case.dim, **zeros),
        }
        self.results: dict = {}
        # The operator, where one does it all, and its attributes.
        self.operator, self.options = ("Causal", {}) if case.causal else ("", {})
        if case.window:
            self.operator = "NearFar"
            self.options = {"exact_window": case.window, "causal": case.causal}

    def forward(self):
        """NearFar, Causal, or Summarize and Read."""
        if self.operator:
            self.results = torch_kernels.run(self.operator, self.inputs, **self.options)
        else:
            state = torch_kernels.run("Summarize", self.inputs)
            self.results = {**torch_kernels.run("Read", {**self.inputs, **state}), **state}
        return self.results["out"]

    def backward(self):
        """Gradients of every input, the projection included."""
        import torch

        x = {**self.inputs, **self.results}
        if self.operator:
            others = [name for name in self.results if name != "out"]
            x |= {f"grad_{name}": torch.zeros_like(self.results[name]) for name in others}
            grads = torch_kernels.run(f"{self.operator}Grad", x, **self.options)
        else:
            grads = torch_kernels.run("ReadGrad", x)
            grads |= torch_kernels.run("SummarizeGrad", {**x, **grads})
        return [grads[f"grad_{name}"] for name in INPUTS]


class _Torch:
    """A function of [B, H, L, D] with torch's own gradients."""

    def __init__(self, case, x: dict):
        self.case, self.projection = case, x["projection"]
        self.leaves = [x[n].transpose(1, 2).contiguous().requires_grad_() for n in INPUTS]
        self.grad_out = x["grad_out"].transpose(1, 2).contiguous()
        self.out = None

    def forward(self):
        import torch

        with torch.no_grad():
            return self.attention(*self.leaves).transpose(1, 2)

    def backward(self):
        import torch

        if self.out is None:
            self.out = self.attention(*self.leaves)
        grads = torch.autograd.grad(self.out, self.leaves, self.grad_out, retain_graph=True)
        return [grad.transpose(1, 2) for grad in grads]


class Flash(_Torch):
    """torch's scaled_dot_product_attention by its flash kernels: exact attention."""

    label, linear = "flash attention (exact)", False

    def attention(self, query, key, value):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=self.case.causal)


class Composition(_Torch):
    """FAVOR+, with a window or without, of torch's products and element-wise functions."""

    label, linear = "composition in torch", True

    def attention(self, query, key, value):
        projection, case = self.projection.to(query.dtype), self.case
        return compose(query, key, value, projection, case.causal, case.window)


CHUNK = 256


def compose(query, key, value, projection, causal: bool, window: int = 0):
    """FAVOR+ on [B, H, L, D], each feature scaled by its maximum over all keys; no epsilon.

    In the type of its arguments, exponents in float32 or wider. The causal form goes chunk by chunk
    of 256 rows over prefix sums, [L / 256, M, D] of them. With a window, those are of its blocks.
    """
    import torch

    root = query.shape[-1] ** -0.25
    wide = torch.promote_types(query.dtype, torch.float32)
    a = (root * (query @ projection.T)).to(wide)
    b = (root * (key @ projection.T)).to(wide)
    b = b - 0.5 * root**2 * key.to(wide).square().sum(-1, keepdim=True)
    top = b.detach().amax(-2, keepdim=True)
    k = torch.exp(b - top).to(query.dtype)
    a = a + top
    one = torch.ones_like(value[..., :1])
    if window:
        # What cancels where every key goes through features counts beside near keys.
        a = a - 0.5 * root**2 * query.to(wide).square().sum(-1, keepdim=True)
        a = a - math.log(len(projection))
        return _near_and_far(query, key, torch.cat([value, one], -1), a, k, causal, window)
    q = torch.exp(a - a.detach().amax(-1, keepdim=True)).to(query.dtype)
    if not causal:
        mass = k.to(wide).sum(-2).unsqueeze(-1).to(query.dtype)
        return (q @ (k.transpose(-1, -2) @ value)) / (q @ mass)
    q, k, v = _in_blocks(min(CHUNK, q.shape[-2]), q, k, torch.cat([value, one], -1))
    sums = k.transpose(-1, -2) @ v
    before = (torch.cumsum(sums.to(wide), -3) - sums).to(q.dtype)
    local = torch.tril(q @ k.transpose(-1, -2)) @ v
    both = (q @ before + local).flatten(-3, -2)
    return both[..., :-1] / both[..., -1:]


def _near_and_far(query, key, values, log_features, k, causal: bool, window: int):
    """Values end in a one. Queries have log-features, keys features."""
    import torch
    from torch.nn.functional import pad

    def shifted(x, blocks):
        """Block n has what block n - blocks had; zeros come in."""
        blank = torch.zeros_like(x[..., : abs(blocks), :, :])
        if blocks > 0:
            return torch.cat([blank, x[..., :-blocks, :, :]], -3)
        return torch.cat([x[..., -blocks:, :, :], blank], -3)

    wide = log_features.dtype
    q, key, v, a, k = _in_blocks(window, query, key, values, log_features, k)
    sides = (1, 0) if causal else (1, 0, -1)
    near, seen = (torch.cat([shifted(x, n) for n in sides], -2) for x in (key, v))
    logits = (query.shape[-1] ** -0.5 * (q @ near.transpose(-1, -2))).to(wide)
    visible = seen[..., -1].unsqueeze(-2) > 0
    if causal:
        size = (window, 2 * window)
        visible = visible & torch.ones(size, device=q.device, dtype=torch.bool).tril(window)
    logits = logits.masked_fill(~visible, -math.inf)
    top = torch.maximum(logits.detach().amax(-1), a.detach().amax(-1)).unsqueeze(-1)

    sums = k.transpose(-1, -2) @ v
    total = torch.cumsum(sums.to(wide), -3)
    far = pad(total, (0, 0, 0, 0, 2, 0))[..., :-2, :, :]
    if not causal:
        behind = total[..., -1:, :, :] - total
        far = far + pad(behind, (0, 0, 0, 0, 0, 1))[..., 1:, :, :]
    both = torch.exp(a - top).to(q.dtype) @ far.to(q.dtype)
    both = (both + torch.exp(logits - top).to(q.dtype) @ seen).flatten(-3, -2)
    return both[..., :-1] / both[..., -1:]


def _in_blocks(rows: int, *arrays):
    """[..., L, D] as [..., L / rows, rows, D]."""
    length = arrays[0].shape[-2]
    if length % rows:
        raise ValueError(f"the length must be a multiple of {rows}; got {length}")
    return [x.unflatten(-2, (-1, rows)) for x in arrays]


IMPLEMENTATIONS = {"performer": Kernels, "flash": Flash, "composition": Composition}
