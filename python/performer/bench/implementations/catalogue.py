"""Who is measured. Names and facts only: the frameworks are imported where they are used."""

from __future__ import annotations

from dataclasses import dataclass

from performer.bench.cases import Case

FAVOR = "FAVOR+"
EPSILON = "FAVOR+ with a global maximum and epsilon 1e-4"
TWO_EPSILONS = "FAVOR+ with a global maximum, epsilon 1e-4, and 1e-6 in the causal denominator"
SOFTMAX = "softmax attention"


@dataclass(frozen=True)
class Side:
    """One implementation.

    Attributes:
        label: for tables and plots.
        framework: "tensorflow" or "torch".
        estimator: what it computes; `expected` has each of them in float64.
        xla: compiled by XLA.
        fused: keeps no matrix of L x M or L x L.
        float32_only: does not take other types, or loses their point.
        everywhere: measured in every setting, not in the main one only.
    """

    label: str
    framework: str
    estimator: str
    xla: bool = False
    fused: bool = False
    float32_only: bool = False
    everywhere: bool = False

    @property
    def exact(self) -> bool:
        """Whether it is exact attention, quadratic in the length."""
        return self.estimator == SOFTMAX

    def operations(self, case: Case) -> float:
        """Floating-point operations that its time is divided by."""
        return case.exact_operations() if self.exact else case.operations()

    @property
    def power(self) -> int:
        """Of the length, that its time grows with."""
        return 2 if self.exact else 1

    def bytes(self, case: Case) -> float:
        """Memory it needs, roughly and rather too much."""
        rows = case.batch * case.heads * case.length
        needed = 4.0 * rows * case.dim * (12 if case.backward else 6)
        if self.fused:
            return needed
        if self.exact:
            return needed + 4.0 * rows * case.length * (6 if case.backward else 3)
        if self.estimator == TWO_EPSILONS and case.causal:
            part = 1 if case.backward else 1 / 128  # it scans over 128 parts
            needed += 4.0 * rows * case.features * case.dim * 4 * part
        return needed + 4.0 * rows * case.features * (12 if case.backward else 5)


SIDES = {
    "performer": Side("Performer", "tensorflow", FAVOR, fused=True, everywhere=True),
    "lean": Side("lean", "tensorflow", FAVOR, everywhere=True),
    "lean_xla": Side("lean, XLA", "tensorflow", FAVOR, xla=True),
    "usual": Side("usual", "tensorflow", EPSILON, float32_only=True),
    "usual_xla": Side("usual, XLA", "tensorflow", EPSILON, xla=True, float32_only=True),
    "exact": Side("exact Keras", "tensorflow", SOFTMAX, everywhere=True),
    "exact_xla": Side("exact Keras, XLA", "tensorflow", SOFTMAX, xla=True),
    "torch_exact": Side("exact torch", "torch", SOFTMAX, fused=True, everywhere=True),
    "torch_performer": Side("performer-pytorch", "torch", TWO_EPSILONS, float32_only=True),
}
