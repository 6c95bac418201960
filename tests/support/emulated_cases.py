"""The cases of the core and of the CUDA kernels, as the emulator runs them: a split is shorter
there, and so may be what crosses several."""

from __future__ import annotations

from dataclasses import replace

from support.cases import NARROW, cases
from support.core_calls import Case
from support.cuda_cases import CASES, split_cases
from support.emulated_calls import DTYPES, emulated

SPLIT = emulated.split_rows
OWN = {**CASES, **split_cases(SPLIT)}
MOST_ROWS = 2 * SPLIT + 70


def _short(case: Case) -> Case:
    return case if case.offsets else replace(case, rows=min(case.rows, MOST_ROWS))


def all_cases(causal: bool) -> dict[str, Case]:
    """By name."""
    return {**{name: _short(case) for name, case in cases(causal).items()}, **OWN}


def parameters(leave_out=()) -> list[tuple]:
    """(causal, name, dtype): every type where it has a path of its own."""
    return [
        (causal, name, dtype)
        for causal in (False, True)
        for name in all_cases(causal)
        if name not in leave_out
        for dtype in (DTYPES if name in OWN or name in NARROW else ["bfloat16"])
    ]
