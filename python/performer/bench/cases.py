"""What is measured: the sizes of one attention call, and how many operations it is worth."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

CHUNK = 64  # rows of the causal triangle that the operation count includes
_BACKWARD = 3.5  # forward + backward over forward: 2 products become 2 + 5


@dataclass(frozen=True)
class Case:
    """One self-attention call.

    Attributes:
        causal: query i sees keys 0 to i.
        backward: forward, then the gradients of query, key, value and projection.
        length: L.
        features: M, rows of the projection.
        dim: D = E, of keys and of values.
        dtype: of query, key and value.
        heads: H = G, of queries and of keys.
        batch: B.
        window: rows of the blocks near which keys are exact (`exact_window`), or None.
    """

    causal: bool
    backward: bool
    length: int
    features: int = 256
    dim: int = 64
    dtype: str = "float32"
    heads: int = 8
    batch: int = 1
    window: int | None = None

    @property
    def mode(self) -> str:
        """What is computed, in words."""
        what = "causal" if self.causal else "bidirectional"
        near = f", window of {self.window}" if self.window else ""
        return f"{what}{near}, forward{' + backward' if self.backward else ''}"

    @property
    def setting(self) -> tuple[int, int, str]:
        """(features, dim, dtype)."""
        return self.features, self.dim, self.dtype

    def at(self, length: int) -> Case:
        """The same at another length."""
        return dataclasses.replace(self, length=length)

    def operations(self) -> float:
        """Floating-point operations of linear attention: four products of L x M x D a head.

        Causal attention adds the triangle inside chunks of 64 rows, 64 L (M + E), whatever chunk an
        implementation uses. With a window it adds the near keys instead, D terms for each of their
        two products: W + (W + 1) / 2 keys a row if causal, else 3 W. Exponentials and sums do not
        count.

        Example:

        >>> Case(causal=False, backward=False, length=1000, features=10, dim=10).operations()
        6400000.0
        """
        rows = self.batch * self.heads * self.length
        count = 8.0 * rows * self.features * self.dim
        if self.window:
            near = 1.5 * self.window + 0.5 if self.causal else 3.0 * self.window
            count += 4.0 * rows * self.dim * near
        elif self.causal:
            count += CHUNK * rows * (self.features + self.dim)
        return count * (_BACKWARD if self.backward else 1)

    def exact_operations(self) -> float:
        """Floating-point operations of exact attention: two products of L x L x D a head.

        Causal attention counts whole too: implementations may or may not skip the upper half.
        """
        count = 4.0 * self.batch * self.heads * self.length**2 * self.dim
        return count * (_BACKWARD if self.backward else 1)

    def inputs(self) -> dict[str, np.ndarray]:
        """Standard normal query, key, value and grad_out [B, L, H, D], and projection [M, D].

        The same on every call. The projection, float32, is block-orthogonal with rows of norm
        sqrt(D); the others are of `dtype`.
        """
        random = np.random.default_rng(0)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.dtype(self.dtype)
        shape = self.batch, self.length, self.heads, self.dim
        blocks = random.standard_normal((math.ceil(self.features / self.dim), self.dim, self.dim))
        rows = np.concatenate([np.linalg.qr(block)[0] for block in blocks])[: self.features]
        return {
            "projection": (math.sqrt(self.dim) * rows).astype(np.float32),
            **{
                name: random.standard_normal(shape, np.float32).astype(dtype)
                for name in ("query", "key", "value", "grad_out")
            },
        }
