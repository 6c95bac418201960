"""A process that measures: one framework, one number of threads.

Reads a task as JSON from standard input and writes a record as JSON, one a line, to standard
output. `processes` starts it.

    {"framework": "tensorflow" | "torch", "threads": n, "rounds": n, "most_seconds": s,
     "deadline": time after which no job begins, or null, "jobs": [job, ...]}

where a job is one of

    {"kind": "time", "entries": [[implementation, case], ...]}       these take turns
    {"kind": "window", "entries": [[implementation, case], ...]}     likewise, a record of that kind
    {"kind": "compare", "entries": [[implementation, case], ...]}    without the matrix product
    {"kind": "memory", "entries": [[implementation, case], ...]}
    {"kind": "decode", "features": M, "dim": D, "exact_window": W or None}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable

from performer.bench import checking, memory, timing
from performer.bench.cases import Case
from performer.bench.implementations.catalogue import IMPLEMENTATIONS

_SHORT = 64  # length of the call that warms up a process for the measurement of memory


class Worker:
    """Runs jobs; what has been checked, and what has been too slow, is remembered.

    Args:
        framework: "tensorflow" or "torch".
        threads: number of threads to compute with.
        rounds: of the timings.
        most_seconds: a call that would take longer is left out.
        emit: called with every record.
    """

    def __init__(self, framework, threads, rounds, most_seconds, emit):
        self.calls = importlib.import_module(f"performer.bench.implementations.{framework}_calls")
        self.threads, self.rounds, self.most_seconds = threads, rounds, most_seconds
        self.emit = emit
        self.checked: set = set()
        self.left_out: set = set()
        self.seconds: dict = {}

    @functools.cached_property
    def product(self):
        """The matrix product of the framework."""
        return self.calls.matrix_product(timing.PRODUCT_SIZE)

    def time(self, entries, kind="time"):
        """Checks and times (implementation, case) pairs beside the matrix product."""
        calls = self.ready(entries)
        if not calls:
            return
        times, product = timing.take_turns(calls, self.rounds, self.product)
        for (impl, case), milliseconds in times.items():
            self.seconds[impl, case] = milliseconds.minimum / 1e3
            rate = IMPLEMENTATIONS[impl].operations(case) / milliseconds.minimum / 1e6
            self.emit(
                kind=kind,
                implementation=impl,
                case=vars(case),
                minimum=milliseconds.minimum,
                median=milliseconds.median,
                gflops=rate,
                product_gflops=product,
                fraction=rate / product,
            )

    def window(self, entries):
        """The same for calls with and without exact near keys."""
        self.time(entries, "window")

    def compare(self, entries):
        """Checks and times (implementation, case) pairs against each other."""
        times, _ = timing.take_turns(self.ready(entries), self.rounds)
        for (impl, case), milliseconds in times.items():
            self.emit(
                kind="compare", implementation=impl, case=vars(case), **milliseconds._asdict()
            )

    def memory(self, entries):
        """Measures the peak memory of (implementation, case) pairs."""
        for impl, case in entries:

            def prepare(impl=impl, case=case):
                self.calls.prepare(self.threads)
                short = case.at(_SHORT)  # loads, compiles and allocates what every call shares
                self.calls.call(impl, short, self.calls.tensors(short.inputs()))()
                return self.calls.call(impl, case, self.calls.tensors(case.inputs()))

            if self.possible(impl, case):
                mebibytes = memory.peak(prepare)
                if mebibytes is None:
                    self.leave_out(impl, case, "the process that measured its memory died")
                else:
                    self.emit(
                        kind="memory", implementation=impl, case=vars(case), mebibytes=mebibytes
                    )

    def decode(self, **job):
        """Measures a decode step."""
        self.calls.prepare(self.threads)
        measured = importlib.import_module("performer.bench.decode").measure(**job)
        self.emit(kind="decode", **measured)

    def ready(self, entries):
        """The calls of the pairs that can take part, checked and compiled."""
        calls: dict[tuple[str, Case], Callable] = {}
        tensors: dict[Case, dict] = {}
        for impl, case in entries:
            if self.possible(impl, case):
                self.calls.prepare(self.threads)
                self.check(impl, case)
                if case not in tensors:
                    tensors[case] = self.calls.tensors(case.inputs())
                calls[impl, case] = self.calls.call(impl, case, tensors[case])
                calls[impl, case]()
        return calls

    def possible(self, impl, case):
        """Whether an implementation can take part; where it cannot, says so once."""
        reason = self.calls.missing(impl) or _unfit(IMPLEMENTATIONS[impl], case)
        if not reason and self.forecast(impl, case) > self.most_seconds:
            reason = f"a call would take more than {self.most_seconds:g} s"
        if reason:
            self.leave_out(impl, case, reason)
        return not reason

    def leave_out(self, impl, case, reason):
        """Says why an implementation is not measured, at the first length where it is not."""
        key = impl, case.mode, case.setting
        if key not in self.left_out:
            self.left_out.add(key)
            self.emit(kind="left out", implementation=impl, case=vars(case), reason=reason)

    def forecast(self, impl, case):
        """Seconds of a call, from the longest shorter one that has been timed; 0: unknown."""
        timed = [
            (c.length, t)
            for (s, c), t in self.seconds.items()
            if (s, c.at(case.length)) == (impl, case)
        ]
        length, seconds = max((x for x in timed if x[0] < case.length), default=(case.length, 0.0))
        return seconds * (case.length / length) ** IMPLEMENTATIONS[impl].power

    def check(self, impl, case):
        """Raises WrongResult unless a short case of the same kind is right."""
        short = dataclasses.replace(case, heads=Case.heads, batch=Case.batch).at(checking.LENGTH)
        if (impl, short) in self.checked:
            return
        results = self.calls.call(impl, short, self.calls.tensors(short.inputs()))()
        self.emit(kind="check", **checking.check(impl, short, self.calls.arrays(results)))
        self.checked.add((impl, short))


def _unfit(impl, case):
    if impl.float32_only and case.dtype != "float32":
        return "for float32 only"
    needed, there = impl.bytes(case), memory.available()
    if needed > there / 2:
        return f"needs about {needed / 2**30:.0f} GiB of memory; {there / 2**30:.0f} GiB are free"
    return ""


def main():
    """Does the task; what libraries print goes to standard error."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(**record):
        output.write(json.dumps(record) + "\n")

    task = json.load(sys.stdin)
    jobs, deadline = task.pop("jobs"), task.pop("deadline")
    worker = Worker(**task, emit=emit)
    for job in jobs:
        if deadline is not None and time.time() > deadline:
            return
        kind = job.pop("kind")
        if "entries" in job:
            job["entries"] = [(impl, Case(**case)) for impl, case in job["entries"]]
        try:
            getattr(worker, kind)(**job)
        except checking.WrongResult as wrong:
            emit(kind="wrong", message=str(wrong))
            return
        emit(kind="done")


if __name__ == "__main__":
    main()
