"""What is measured on a GPU, in which order, and how much work it is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from performer.bench.cases import Case

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# (D, M), the main one first
SETTINGS = ((64, 256), (64, 128), (128, 256), (128, 128), (256, 256))
BATCH, HEADS = 4, 16
HEADLINE = 16384
WINDOW = 64
FORWARD, BACKWARD = "forward", "backward"

# Milliseconds on an H100 at B = 4, H = 16, L = 16384, D = 64, M = 256 in bfloat16: 60 % of the rate
# that mma.sync reaches there (docs/gpu.md).
GOALS = {
    (False, FORWARD): 0.46,
    (True, FORWARD): 0.78,
    (False, BACKWARD): 0.92,
    (True, BACKWARD): 2.0,
}


@dataclass(frozen=True)
class GpuCase:
    """One self-attention call in bfloat16, B = 4 and H = 16 unless told.

    Attributes:
        causal: query i sees keys 0 to i.
        part: "forward", or "backward": the gradients alone, after a forward pass.
        length: L.
        dim: D = E.
        features: M.
        window: rows of the blocks near which keys are exact, or 0.
    """

    causal: bool
    part: str
    length: int
    dim: int = 64
    features: int = 256
    batch: int = BATCH
    heads: int = HEADS
    window: int = 0

    @property
    def mode(self) -> str:
        """In words."""
        near = f", window of {self.window}" if self.window else ""
        return f"{'causal' if self.causal else 'bidirectional'}{near}, {self.part}"

    def operations(self) -> float:
        """Floating-point operations of linear attention, counted as on the CPU.

        Forward as `performer.bench.cases.Case`; backward 2.5 times (5 products for 2; the gradient
        of the projection included). What a kernel computes twice does not count.

        Example:

        >>> GpuCase(False, "forward", 16384).operations() / (4 * 16 * 16384)
        131072.0
        """
        forward = Case(
            *(self.causal, False, self.length, self.features, self.dim),
            heads=self.heads,
            window=self.window or None,
        ).operations()
        return self.batch * forward * (1.0 if self.part == FORWARD else 2.5)

    def exact_operations(self) -> float:
        """Those of exact attention: 4 L L D a head, half of it if causal; backward 2.5 times."""
        pairs = self.length**2 * (0.5 if self.causal else 1.0)
        forward = 4.0 * self.batch * self.heads * pairs * self.dim
        return forward * (1.0 if self.part == FORWARD else 2.5)

    def bytes_moved(self) -> float:
        """Bytes that must pass the GPU's memory at least: every tensor of the call once.

        Forward: query, key, value, out. Backward: these, grad_out and three gradients.
        """
        tensors = 4 if self.part == FORWARD else 8
        return 2.0 * tensors * self.batch * self.heads * self.length * self.dim


def headline() -> list[GpuCase]:
    """The cases that have a goal, and the same ones with a window."""
    return [
        GpuCase(causal, part, HEADLINE, window=window)
        for window in (0, WINDOW)
        for causal, part in GOALS
    ]


def plan(lengths=LENGTHS, settings=SETTINGS) -> list[GpuCase]:
    """All cases, the most telling first, for a run that may be cut short.

    The headline length of the main setting, then the other lengths of that setting from short to
    long, then all that with a window, then the other settings.
    """
    kinds = list(itertools.product((FORWARD, BACKWARD), (False, True)))
    ordered = sorted(lengths, key=lambda n: (n != HEADLINE, n))
    main, *others = settings
    return [
        GpuCase(causal, part, length, dim, features, window=window)
        for (dim, features), window in ((main, 0), (main, WINDOW), *((s, 0) for s in others))
        for length in ordered
        for part, causal in kinds
    ]
