"""A process that measures: one framework, one number of threads.

Reads a task as JSON from standard input and writes a record as JSON, one a line, to standard
output. `processes` starts it.

    {"framework": "tensorflow" | "torch", "threads": n, "rounds": n, "most_seconds": s, "jobs": [...]}
    {"kind": "time", "entries": [[side, case], ...]}    take turns with each other
    {"kind": "memory", "entries": [[side, case], ...]}
    {"kind": "decode", "features": M, "dim": D}
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from performer.bench import checking, memory, timing
from performer.bench.cases import Case
from performer.bench.sides import SIDES


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
        self.calls = importlib.import_module(f"performer.bench.{framework}_calls")
        self.calls.prepare(threads)
        self.rounds, self.most_seconds, self.emit = rounds, most_seconds, emit
        self.product = self.calls.matrix_product(timing.PRODUCT_SIZE)
        self.checked: set = set()
        self.left_out: set = set()
        self.seconds: dict = {}

    def time(self, entries):
        """Checks and times (side, case) pairs against each other."""
        ready, tensors = {}, {}
        for side, case in entries:
            if not self.possible(side, case):
                continue
            self.check(side, case)
            if case not in tensors:
                tensors[case] = self.calls.tensors(case.inputs())
            call = ready[side, case] = self.calls.call(side, case, tensors[case])
            call()
        if not ready:
            return
        times, product = timing.take_turns(ready, self.rounds, self.product)
        for (side, case), milliseconds in times.items():
            self.seconds[side, case] = milliseconds.minimum / 1e3
            rate = SIDES[side].operations(case) / milliseconds.minimum / 1e6
            self.emit(
                kind="time",
                side=side,
                case=vars(case),
                minimum=milliseconds.minimum,
                median=milliseconds.median,
                gflops=rate,
                product_gflops=product,
                fraction=rate / product,
            )

    def memory(self, entries):
        """Measures the peak memory of (side, case) pairs."""
        for side, case in entries:
            if self.possible(side, case):
                call = self.calls.call(side, case, self.calls.tensors(case.inputs()))
                call()
                self.emit(kind="memory", side=side, case=vars(case), mebibytes=memory.peak(call))

    def decode(self, features, dim):
        """Measures a decode step."""
        measured = importlib.import_module("performer.bench.decode").measure(features, dim)
        self.emit(kind="decode", **measured)

    def possible(self, side, case):
        """Whether a side can take part; where it cannot, says so once."""
        reason = self.calls.missing(side) or _unfit(SIDES[side], case)
        if not reason and self.forecast(side, case) > self.most_seconds:
            reason = f"a call would take more than {self.most_seconds:g} s"
        if reason and (side, case.mode, case.setting, reason) not in self.left_out:
            self.left_out.add((side, case.mode, case.setting, reason))
            self.emit(kind="left out", side=side, case=vars(case), reason=reason)
        return not reason

    def forecast(self, side, case):
        """Seconds of a call, from the longest shorter one that has been timed; 0: unknown."""
        timed = [(c.length, t) for (s, c), t in self.seconds.items() if (s, c.at(case.length)) == (side, case)]
        length, seconds = max((x for x in timed if x[0] < case.length), default=(case.length, 0.0))
        return seconds * (case.length / length) ** SIDES[side].power

    def check(self, side, case):
        """Raises WrongResult unless the side is right on a short case of the same kind."""
        short = Case(case.causal, case.backward, checking.LENGTH, *case.setting)
        if (side, short) in self.checked:
            return
        results = self.calls.call(side, short, self.calls.tensors(short.inputs()))()
        self.emit(kind="check", **checking.check(side, short, self.calls.arrays(results)))
        self.checked.add((side, short))


def _unfit(side, case):
    if side.float32_only and case.dtype != "float32":
        return "for float32 only"
    needed, there = side.bytes(case), memory.available()
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
    jobs = task.pop("jobs")
    worker = Worker(**task, emit=emit)
    for job in jobs:
        kind = job.pop("kind")
        if "entries" in job:
            job["entries"] = [(side, Case(**case)) for side, case in job["entries"]]
        try:
            getattr(worker, kind)(**job)
        except checking.WrongResult as wrong:
            emit(kind="wrong", message=str(wrong))
            return
        emit(kind="done")


if __name__ == "__main__":
    main()
