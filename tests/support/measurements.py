"""A run of the benchmark with invented figures."""

import itertools

from performer.bench.cases import Case
from performer.bench.implementations.catalogue import EPSILON, IMPLEMENTATIONS

LENGTHS = (256, 1024, 4096)


def measurements():
    """A run as if it had been measured: Performer linear, exact attention quadratic."""
    records = []
    for causal, backward in itertools.product((False, True), repeat=2):
        for impl, length in itertools.product(IMPLEMENTATIONS, LENGTHS):
            case = vars(Case(causal, backward, length))
            time = {"exact": length**2 / 2**16, "performer": length / 2**6}.get(impl, length / 2**5)
            rate = {"gflops": 100.0, "product_gflops": 200.0, "fraction": 0.5}
            one = {"implementation": impl, "case": case}
            records.append({"kind": "time", **one, "minimum": time, "median": 2 * time, **rate})
            records.append({"kind": "memory", **one, "mebibytes": length / 8})
    many, one = (Case(False, False, 4096 * 8 // heads, heads=heads) for heads in (8, 1))
    compared = [("heads", many, 10.0, {}), ("heads", one, 11.0, {})]
    compared += [("threads", many, 20.0, {"threads": 1}), ("threads", many, 10.5, {"threads": 2})]
    for kind, case, time, more in compared:
        record = {
            "implementation": "performer",
            "case": vars(case),
            "minimum": time,
            "median": time,
        }
        records.append({"kind": kind, **record, **more})
    step = {"step": 90.0, "identity": 50.0, "overhead": 40.0}
    size = {"features": 256, "dim": 64, "heads": 8, "state_bytes": 532480}
    records.append({"kind": "decode", **size, "call": step, "loop": step})
    textbook = {
        "implementation": "textbook",
        "case": vars(Case(False, False, 256)),
        "estimator": EPSILON,
    }
    records.append({"kind": "check", **textbook, "error": 1e-6, "bound": 6e-5, "distance": 0.94})
    gone = {"implementation": "torch_exact", "case": vars(Case(False, False, 256))}
    records.append({"kind": "left out", **gone, "reason": "torch not installed"})
    records.append({"kind": "not begun", "part": "memory", "jobs": 3})
    versions = {"performer": "0.1.0"}
    machine = {"processor": "a processor", "cores": 2, "isa": "v4", "versions": versions}
    return {"machine": machine, "plan": {"threads": 2}, "records": records}
