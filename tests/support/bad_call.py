"""A call that must be refused: what is wrong with it, and what the message must say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from support.core_calls import Case, cotangents, forward, make

GOOD = Case(
    batch=2,
    rows=5,
    heads=4,
    groups=2,
    dim=3,
    value_dim=2,
    features=6,
    query_projections=4,
    key_projections=2,
    feature_biases=2,
    bias="BGS",
    state=2,
)
PACKED = Case(batch=1, rows=5, offsets=(0, 2, 5), state=2, bias="11S", masked="")


def good_inputs(case: Case = GOOD, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Inputs of all six operators, float32 or another type."""
    x = make(case, dtype)
    return {**x, **cotangents(case, dtype), **forward(x, causal=True, **case.options)}


@dataclass(frozen=True)
class Bad:
    """A call to refuse.

    Attributes:
        op: operator.
        shapes: wrong shapes, by argument.
        says: parts of the message.
        attributes: of the operator.
        offsets: for packed calls.
        late: only the values are wrong, so that tracing cannot know.
    """

    op: str
    shapes: dict = field(default_factory=dict)
    says: tuple[str, ...] = ()
    attributes: dict = field(default_factory=dict)
    offsets: tuple[int, ...] | None = None
    late: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        """All inputs of the call."""
        x = good_inputs(GOOD if self.offsets is None else PACKED)
        x.update({name: np.zeros(shape, x[name].dtype) for name, shape in self.shapes.items()})
        if self.offsets is not None:
            x["offsets"] = np.array(self.offsets, np.int64)
        return x


def name_of(bad: Bad) -> str:
    """For the test's name."""
    what = [f"{name}={list(shape)}" for name, shape in bad.shapes.items()]
    what += [f"{name}={value!r}" for name, value in bad.attributes.items() if name != "packed"]
    what += [] if bad.offsets is None else [f"offsets={list(bad.offsets)}"]
    return f"{bad.op} {' '.join(what)}"
