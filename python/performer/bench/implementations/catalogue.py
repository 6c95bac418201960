"""What is compared: names and facts only; the frameworks are imported where they are used."""

from __future__ import annotations

from dataclasses import dataclass

from performer.bench.cases import Case

FAVOR = "FAVOR+"
EPSILON = "FAVOR+ with a global maximum and epsilon 1e-4"
TWO_EPSILONS = "FAVOR+ with a global maximum, epsilon 1e-4, and 1e-6 in the causal denominator"
SOFTMAX = "softmax attention"


@dataclass(frozen=True)
class Implementation:
    """One implementation.

    Attributes:
        label: for tables and plots.
        framework: "tensorflow" or "torch".
        estimator: what it computes; `expected` has each of them in float64.
        xla: it is compiled by XLA.
        fused: it keeps no matrix of L x M or L x L.
        float32_only: it does not take other types, or gains nothing from them.
        everywhere: it is measured in every setting, not only in the main one.
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
        """The floating-point operations that the rate counts."""
        return case.exact_operations() if self.exact else case.operations()

    @property
    def power(self) -> int:
        """The power of the length that its time grows with."""
        return 2 if self.exact else 1

    def bytes(self, case: Case) -> float:
        """The memory that it needs: a rough estimate, rather too high."""
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


IMPLEMENTATIONS = {
    "performer": Implementation("Performer", "tensorflow", FAVOR, fused=True, everywhere=True),
    "stabilised": Implementation("stabilised", "tensorflow", FAVOR, everywhere=True),
    "stabilised_xla": Implementation("stabilised, XLA", "tensorflow", FAVOR, xla=True),
    "textbook": Implementation("textbook", "tensorflow", EPSILON, float32_only=True),
    "textbook_xla": Implementation(
        "textbook, XLA", "tensorflow", EPSILON, xla=True, float32_only=True
    ),
    "exact": Implementation("exact Keras", "tensorflow", SOFTMAX, everywhere=True),
    "exact_xla": Implementation("exact Keras, XLA", "tensorflow", SOFTMAX, xla=True),
    "torch_exact": Implementation("exact torch", "torch", SOFTMAX, fused=True, everywhere=True),
    "torch_performer": Implementation(
        "performer-pytorch", "torch", TWO_EPSILONS, float32_only=True
    ),
}
