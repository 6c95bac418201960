"""What a run measured, and what follows from it.

A run is a dict, the content of results.json: `machine` (facts), `plan` (fields of `Plan`) and
`records`, each with a `kind`:

    time      implementation, case, minimum and median (ms), gflops, product_gflops, fraction
    window    as time: calls with and without exact near keys
    memory    implementation, case, mebibytes
    heads     implementation, case, minimum, median: one head and eight, the same work
    threads   likewise, and the number of threads
    decode    see `performer.bench.decode.measure`
    check     see `performer.bench.checking.check`
    left out  implementation, case, reason
    not begun part, jobs: how many, for want of time
    failed    message: measurements after it in its process are missing
"""

from __future__ import annotations

import dataclasses
import math

from performer.bench.cases import Case
from performer.bench.implementations.catalogue import IMPLEMENTATIONS


def of_kind(run: dict, kind: str) -> list[dict]:
    """The records of a kind, each with a `Case` where there is one."""
    return [
        {**record, "case": Case(**record["case"])} if "case" in record else record
        for record in run["records"]
        if record["kind"] == kind
    ]


def groups(run: dict, kind: str = "time", value: str = "minimum") -> dict:
    """{(mode, setting): {impl: {length: value}}}, in the order of measurement."""
    found: dict = {}
    for record in of_kind(run, kind):
        case = record["case"]
        lengths = found.setdefault((case.mode, case.setting), {}).setdefault(
            record["implementation"], {}
        )
        lengths[case.length] = record[value]
    return found


def crossover(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """The length from which on `ours` is faster.

    Args:
        ours, theirs: time by length. Lengths that only one has do not count.

    Returns:
        The length, between two measured ones by interpolation on logarithmic axes; the shortest
        one if ours is faster there already; infinity if it is not at the longest; None if there
        is no common length.

    Example:

    >>> crossover({64: 4.0, 256: 16.0}, {64: 1.0, 256: 64.0})
    128.0
    """
    lengths = sorted(ours.keys() & theirs.keys())
    if not lengths:
        return None
    gaps = [math.log2(ours[n] / theirs[n]) for n in lengths]
    slower = [i for i, gap in enumerate(gaps) if gap > 0]
    if not slower:
        return float(lengths[0])
    last = slower[-1]
    if last == len(lengths) - 1:
        return math.inf
    part = gaps[last] / (gaps[last] - gaps[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** part


def crossovers(run: dict) -> list[dict]:
    """Crossover of Performer with each form of exact attention, by mode and setting."""
    return [
        {
            "mode": mode,
            "setting": setting,
            "implementation": impl,
            "length": crossover(impls["performer"], times),
            "measured": sorted(impls["performer"].keys() & times.keys()),
        }
        for (mode, setting), impls in groups(run).items()
        if "performer" in impls
        for impl, times in impls.items()
        if IMPLEMENTATIONS[impl].exact and impls["performer"].keys() & times.keys()
    ]


LONG = 4096  # from here on a call's fixed costs no longer show


def doublings(run: dict) -> list[dict]:
    """Time of Performer at 2L over its time at L, by mode and setting, for L from LONG on."""
    return [
        {"mode": mode, "setting": setting, "length": n, "ratio": times[2 * n] / times[n]}
        for (mode, setting), impls in groups(run).items()
        for times in [impls.get("performer", {})]
        for n in sorted(times)
        if 2 * n in times and n >= LONG
    ]


def comparisons(run: dict) -> list[dict]:
    """Times of the other forms of linear attention over Performer's, from LONG on.

    And over the time that Performer would take at the rate of the matrix product: a ratio beyond
    that is out of reach.
    """
    fractions = groups(run, value="fraction")
    found = []
    for (mode, setting), impls in groups(run).items():
        ours = impls.get("performer", {})
        for n in sorted(n for n in ours if n >= LONG):
            for impl, times in impls.items():
                if impl == "performer" or IMPLEMENTATIONS[impl].exact or n not in times:
                    continue
                ratio = times[n] / ours[n]
                found.append(
                    {
                        "mode": mode,
                        "setting": setting,
                        "length": n,
                        "implementation": impl,
                        "ratio": ratio,
                        "limit": ratio / fractions[mode, setting]["performer"][n],
                    }
                )
    return found


# What a call with a window of 64 should reach at M = 256: its time over that without, forward and
# forward + backward.
_OVER_PLAIN = {(True, False): 1.05, (True, True): 1.10, (False, False): 1.35, (False, True): 1.35}
_FRACTIONS = {False: 0.70, True: 0.60}  # of the rate of the product, causal, with few features
_TIMES_FASTER = 8.0  # than exact attention, causal, forward, at the longest length


def windows(run: dict) -> list[dict]:
    """What exact near keys cost, and what they gain over exact attention, with the goals.

    Each has the case, what is stated ("time over that without a window", ...), the value, the goal,
    and whether it is at least or at most that goal.
    """
    found = {
        (record["implementation"], record["case"]): record for record in of_kind(run, "window")
    }

    def statement(case, what, value, goal, at_most):
        reached = value <= goal if at_most else value >= goal
        return {"case": case, "what": what, "value": value, "goal": goal, "reached": reached}

    stated = []
    for (impl, case), record in found.items():
        if impl != "performer" or not case.window:
            continue
        plain = dataclasses.replace(case, window=None)
        if ("performer", plain) in found:
            ratio = record["minimum"] / found["performer", plain]["minimum"]
            goal = _OVER_PLAIN[case.causal, case.backward]
            stated.append(statement(case, "time over that without a window", ratio, goal, True))
        elif case.causal and case.length >= LONG:
            goal = _FRACTIONS[case.backward]
            what = "fraction of the matrix product"
            stated.append(statement(case, what, record["fraction"], goal, False))
        exact = [
            theirs["minimum"]
            for (other, its), theirs in found.items()
            if other == "exact" and (its.mode, its.length) == (plain.mode, plain.length)
        ]
        if exact and (case.length < LONG or case.causal):
            goal = 1.0 if case.length < LONG else _TIMES_FASTER
            ratio = exact[0] / record["minimum"]
            stated.append(statement(case, "times faster than exact attention", ratio, goal, False))
    return stated


def head_ratios(run: dict) -> list[dict]:
    """Time with all heads over time with one of the same work (1: no difference)."""
    found: dict = {}
    for record in of_kind(run, "heads"):
        found.setdefault(record["case"].mode, {})[record["case"].heads] = record
    return [
        {"mode": mode, "one": pair[1], "many": pair[max(pair)]}
        for mode, pair in found.items()
        if len(pair) == 2
    ]


def thread_ratios(run: dict) -> list[dict]:
    """Fastest time with one thread and with all, by mode."""
    found: dict = {}
    for record in of_kind(run, "threads"):
        times = found.setdefault(record["case"].mode, {})
        times[record["threads"]] = min(
            record["minimum"], times.get(record["threads"], record["minimum"])
        )
    return [
        {"mode": mode, "threads": max(times), "one": times[1], "all": times[max(times)]}
        for mode, times in found.items()
        if len(times) == 2
    ]
