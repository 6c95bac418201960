"""Which cases a run measures, from its few options."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from performer.bench.cases import Case
from performer.bench.implementations.catalogue import IMPLEMENTATIONS

MODES = {
    "bidirectional": (False, False),
    "bidirectional-gradient": (False, True),
    "causal": (True, False),
    "causal-gradient": (True, True),
}
EXTRAS = ("window", "decode", "heads", "threads", "memory")
CASES = (*MODES, *EXTRAS)
DTYPES = ("float32", "bfloat16")

_LENGTHS = tuple(2**n for n in range(7, 18))  # 128 ... 131072
_ELSEWHERE = (1024, 4096, 16384)  # lengths of the settings beside the main one
_LONG = 4096  # length of the cases that compare heads, threads, and calls with a window
_WINDOW = 64
_SHORT, _FEW = 256, 64  # length and features of the shortest call that is to beat exact attention


@dataclass(frozen=True)
class Plan:
    """What to measure. The first of features, dims and dtypes make the main setting.

    In the main setting every implementation is measured at every length. In the other settings only
    those marked `everywhere` are, at those of the lengths that are 1024, 4096 or 16384.

    Attributes:
        cases: some of `CASES`.
        lengths, features, dims, dtypes: L, M, D, types.
        threads: number of threads.
        rounds: of the timings.
        most_seconds: a call that would take longer is left out.
        most_total: seconds after which nothing new begins, or None.
        quick: leaves out exact attention under XLA (slower than without), memory except at the
            longest length and of those marked `everywhere`, the backward pass in comparisons of
            heads and threads, and the second run with each number of threads.
    """

    cases: tuple[str, ...] = CASES
    lengths: tuple[int, ...] = _LENGTHS
    features: tuple[int, ...] = (256, 64, 128)
    dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = DTYPES
    threads: int = 1
    rounds: int = 5
    most_seconds: float = 2.0
    most_total: float | None = None
    quick: bool = False

    def settings(self) -> list[tuple[int, int, str]]:
        """(M, D, dtype), the main one first."""
        return list(itertools.product(self.features, self.dims, self.dtypes))

    def time_jobs(self, framework: str) -> list[dict]:
        """The timings of a framework, the main setting first."""
        main, *others = self.settings()
        impls = [
            impl for impl in _of_framework(framework) if not (self.quick and impl == "exact_xla")
        ]
        jobs = [_job("time", case, impls) for case in self._cases(main, self.lengths)]
        lengths = [length for length in self.lengths if length in _ELSEWHERE]
        for setting in others:
            impls = [impl for impl in _of_framework(framework) if IMPLEMENTATIONS[impl].everywhere]
            jobs += [_job("time", case, impls) for case in self._cases(setting, lengths)]
        return jobs

    def extra_jobs(self) -> list[dict]:
        """Calls with a window, one head against eight with the same work, and decode steps."""
        jobs: list[dict] = []
        features, dim, dtype = self.settings()[0]
        if "window" in self.cases:
            for mode in MODES.values():
                plain = Case(*mode, _LONG, features, dim, dtype)
                near = dataclasses.replace(plain, window=_WINDOW)
                short = dataclasses.replace(near, length=_SHORT, features=_FEW)
                exact = [plain.at(_SHORT), *([plain] if mode == MODES["causal"] else [])]
                entries = [
                    *(("performer", vars(case)) for case in (plain, near, short.at(_LONG), short)),
                    *(("exact", vars(case)) for case in exact),
                ]
                jobs.append({"kind": "window", "entries": entries})
        if "heads" in self.cases:
            for causal, backward in self._compared():
                many = Case(causal, backward, _LONG, features, dim, dtype)
                one = dataclasses.replace(many, heads=1, length=many.heads * many.length)
                entries = [("performer", vars(case)) for case in (many, one)]
                jobs.append({"kind": "compare", "entries": entries})
        if "decode" in self.cases:
            sizes = {"kind": "decode", "features": features, "dim": dim}
            jobs += [{**sizes, "exact_window": window} for window in (None, _WINDOW)]
        return jobs

    def memory_jobs(self, framework: str, timed: set[tuple[str, Case]]) -> list[dict]:
        """Peak memory of the (implementation, case) pairs that were timed, in the main setting."""
        if "memory" not in self.cases:
            return []
        lengths, impls = self.lengths, _of_framework(framework)
        if self.quick:
            lengths, impls = (
                (max(lengths),),
                [impl for impl in impls if IMPLEMENTATIONS[impl].everywhere],
            )
        jobs = [
            _job("memory", case, [impl for impl in impls if (impl, case) in timed])
            for case in self._cases(self.settings()[0], lengths)
        ]
        return [job for job in jobs if job["entries"]]

    def thread_jobs(self) -> list[dict]:
        """What is timed with one thread and with all."""
        if "threads" not in self.cases or self.threads == 1:
            return []
        features, dim, dtype = self.settings()[0]
        cases = [
            Case(causal, backward, _LONG, features, dim, dtype)
            for causal, backward in self._compared()
        ]
        return [_job("compare", case, ["performer"]) for case in cases]

    def _compared(self):
        return [mode for mode in MODES.values() if not (self.quick and mode[1])]

    def _cases(self, setting, lengths):
        chosen = [mode for name, mode in MODES.items() if name in self.cases]
        return [Case(*mode, length, *setting) for mode in chosen for length in sorted(lengths)]


def quick(plan: Plan) -> Plan:
    """The same in two minutes: one setting, three lengths, fewer rounds."""
    return dataclasses.replace(
        plan,
        lengths=(256, 1024, 4096),
        features=plan.features[:1],
        dims=plan.dims[:1],
        dtypes=plan.dtypes[:1],
        rounds=3,
        most_seconds=1.0,
        most_total=105.0,
        quick=True,
    )


def _of_framework(framework):
    return [name for name, impl in IMPLEMENTATIONS.items() if impl.framework == framework]


def _job(kind, case, impls):
    return {"kind": kind, "entries": [(impl, vars(case)) for impl in impls]}
