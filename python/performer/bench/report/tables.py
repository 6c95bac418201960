"""The tables of a run: plain rows of text, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from performer.bench.implementations.catalogue import IMPLEMENTATIONS
from performer.bench.report import results


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows; the first `left` columns are words, the rest are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int = 1


def details(run: dict) -> list[Table]:
    """One table for each mode and setting: all figures, length by length."""
    fields = {
        value: results.groups(run, value=value)
        for value in ("minimum", "median", "gflops", "fraction")
    }
    memory = results.groups(run, "memory", "mebibytes")
    tables = []
    for group, impls in fields["minimum"].items():
        rows = []
        for length in sorted({n for times in impls.values() for n in times}):
            ours = impls.get("performer", {}).get(length)
            for impl in (impl for impl in impls if length in impls[impl]):
                figures = [fields[value][group][impl][length] for value in fields]
                mebibytes = memory.get(group, {}).get(impl, {}).get(length)
                rows.append(
                    (
                        str(length),
                        IMPLEMENTATIONS[impl].label,
                        *(f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in figures[:3]),
                        f"{figures[3]:.2f}",
                        "" if mebibytes is None else f"{mebibytes:.0f}",
                        "" if ours is None else f"{figures[0] / ours:.2f}",
                    )
                )
        columns = ("L", "", "ms", "median", "GFLOP/s", "fraction", "MiB", "relative")
        tables.append(Table(_title(*group), columns, rows, left=2))
    return tables


def times(run: dict) -> list[Table]:
    """One table for each mode, of the main setting: milliseconds by length, and the fraction."""
    fractions = results.groups(run, value="fraction")
    tables = []
    for group, impls in _of_setting(run, main=True):
        rate = fractions[group].get("performer", {})
        rows = [
            (
                str(length),
                *(_number(times.get(length)) for times in impls.values()),
                f"{rate[length]:.2f}" if length in rate else "",
            )
            for length in sorted({n for times in impls.values() for n in times})
        ]
        columns = ("L", *(IMPLEMENTATIONS[impl].label for impl in impls), "Performer's fraction")
        tables.append(Table(f"{_title(*group)}, milliseconds", columns, rows))
    return tables


def settings(run: dict) -> list[Table]:
    """One table for each mode: the other settings, each at its longest length."""
    fractions = results.groups(run, value="fraction")
    found: dict = {}
    for (mode, setting), impls in _of_setting(run, main=False):
        if "performer" in impls:
            found.setdefault(mode, []).append((setting, impls))
    tables = []
    for mode, entries in found.items():
        names = list(dict.fromkeys(impl for _, impls in entries for impl in impls))
        rows = []
        for setting, impls in entries:
            length = max(impls["performer"])
            rows.append(
                (
                    "M={} D={} {}".format(*setting),
                    str(length),
                    *(_number(impls.get(impl, {}).get(length)) for impl in names),
                    f"{fractions[mode, setting]['performer'][length]:.2f}",
                )
            )
        columns = (
            "",
            "L",
            *(IMPLEMENTATIONS[impl].label for impl in names),
            "Performer's fraction",
        )
        tables.append(Table(f"{mode}, other settings, milliseconds", columns, rows))
    return tables


def memory(run: dict) -> list[Table]:
    """One table for each mode: MiB by length and implementation."""
    return [
        Table(
            f"{_title(*group)}, peak memory in MiB",
            ("L", *(IMPLEMENTATIONS[impl].label for impl in impls)),
            [
                (str(length), *(_number(sizes.get(length)) for sizes in impls.values()))
                for length in sorted({n for sizes in impls.values() for n in sizes})
            ],
        )
        for group, impls in results.groups(run, "memory", "mebibytes").items()
    ]


def conclusions(run: dict) -> list[Table]:
    """Crossovers, time of twice the length, windows, heads, threads, a decode step: as measured."""
    crossovers = [
        (_title(x["mode"], x["setting"]), IMPLEMENTATIONS[x["implementation"]].label, _crossover(x))
        for x in results.crossovers(run)
    ]
    doublings = [
        (
            _title(x["mode"], x["setting"]),
            f"{x['length']} to {2 * x['length']}",
            f"{x['ratio']:.2f}",
        )
        for x in results.doublings(run)
    ]
    comparisons, others = _comparisons(run)
    windows = [
        (
            x["case"].mode,
            str(x["case"].length),
            str(x["case"].features),
            x["what"],
            f"{x['value']:.2f}",
            f"{x['goal']:.2f}",
            "yes" if x["reached"] else "no",
        )
        for x in results.windows(run)
    ]
    heads = [
        (
            x["mode"],
            *(f"{x[part]['minimum']:.1f}" for part in ("one", "many")),
            f"{x['one']['minimum'] / x['many']['minimum']:.2f}",
        )
        for x in results.head_ratios(run)
    ]
    threads = [
        (
            x["mode"],
            str(x["threads"]),
            f"{x['one']:.1f}",
            f"{x['all']:.1f}",
            f"{x['one'] / x['all']:.2f}",
        )
        for x in results.thread_ratios(run)
    ]
    decode = [
        (
            f"{where}, exact_window={x['exact_window']}" if x.get("exact_window") else where,
            *(f"{x[where][name]:.0f}" for name in ("step", "identity", "overhead")),
        )
        for x in results.of_kind(run, "decode")
        for where in ("call", "loop")
    ]
    tables = [
        Table("Faster than exact attention from this length on", ("", "exact", "L"), crossovers, 2),
        Table(
            "Time over Performer's (in brackets: if Performer ran at the rate of the product)",
            ("", "L", *others),
            comparisons,
            1,
        ),
        Table("Performer at twice the length", ("", "L", "time ratio"), doublings, 2),
        Table("Near keys exact", ("", "L", "M", "", "", "goal", "reached"), windows, left=4),
        Table(
            "One head with 8 times the length against 8 heads",
            ("", "one, ms", "8, ms", "ratio"),
            heads,
        ),
        Table("Threads", ("", "threads", "with 1, ms", "with all, ms", "speed-up"), threads),
        Table("One decode step, microseconds", ("", "step", "identity", "added"), decode),
    ]
    return [table for table in tables if table.rows]


def notes(run: dict) -> list[str]:
    """What a reader must know beside the figures: estimators, errors, what is missing."""
    lines = []
    checks: dict = {}
    for x in results.of_kind(run, "check"):
        key = IMPLEMENTATIONS[x["implementation"]].label, x["case"].dtype, x["estimator"]
        checks.setdefault(key, []).append(x)
    for (label, dtype, estimator), found in checks.items():
        worst = max(found, key=lambda x: x["error"] / x["bound"])
        line = f"{label}, {dtype}: {estimator}, within {worst['error']:.1e} of float64"
        line += f" (bound {worst['bound']:g})"
        if worst["distance"] is not None:
            least = min(x["distance"] for x in found)
            line += f"; another estimator, {least:.0%} or more from FAVOR+ on these inputs"
        lines.append(line)
    reasons: dict = {}
    for x in results.of_kind(run, "left out"):
        everything = x["reason"].endswith(("not installed", "missing"))
        where = "" if everything else f", {_title(x['case'].mode, x['case'].setting)}"
        where += "" if everything else f" from L = {x['case'].length}"
        reasons[f"left out: {IMPLEMENTATIONS[x['implementation']].label}{where}: {x['reason']}"] = (
            None
        )
    late = [
        f"left out for want of time: {x['jobs']} jobs of the part '{x['part']}'"
        for x in results.of_kind(run, "not begun")
    ]
    failed = [f"failed: {x['message']}" for x in results.of_kind(run, "failed")]
    return [*lines, *reasons, *late, *failed]


def _comparisons(run):
    """Rows of the main setting, mode by mode and length by length; and the labels."""
    main = {group for group, _ in _of_setting(run, main=True)}
    rows: dict = {}
    for x in results.comparisons(run):
        if (x["mode"], x["setting"]) in main:
            row = rows.setdefault((x["mode"], x["length"]), {})
            row[x["implementation"]] = f"{x['ratio']:.1f} ({x['limit']:.1f})"
    names = list(dict.fromkeys(impl for row in rows.values() for impl in row))
    return (
        [(m, str(n), *(row.get(impl, "") for impl in names)) for (m, n), row in rows.items()],
        [IMPLEMENTATIONS[impl].label for impl in names],
    )


def _of_setting(run, main):
    """The groups of times in the main setting, which is the first, or in the others."""
    groups = results.groups(run)
    first = next(iter(groups), (None, None))[1]
    return [(group, impls) for group, impls in groups.items() if (group[1] == first) == main]


def _title(mode, setting):
    return "{}, M={} D={} {}".format(mode, *setting)


def _number(x):
    return "" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _crossover(x):
    if x["length"] == math.inf:
        return f"beyond {x['measured'][-1]}"
    if x["length"] == x["measured"][0]:
        return f"{x['measured'][0]} or less"
    return f"{x['length']:.0f}"
