"""Tables, JSON and the plot of a run.

A run is a dict, the content of gpu.json: `machine` (facts), `rates` (product in TFLOP/s, copy in
GB/s) and `records`. Each record has the fields of its case, `implementation`, and either the times
(`median`, `minimum`, `repeats`, `graph`) and `error`, or `left_out`, the reason. `off`: the error
is above its bound. A run of the headline also has `kernels` (gpukit/kernels.py) and `ceilings`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from rich.console import Console

from gpukit import cases
from gpukit.implementations import IMPLEMENTATIONS
from performer.bench.report import plots, render, tables
from performer.bench.report.results import crossover

COLUMNS = ("", "M", "D", "L", *(impl.label + ", ms" for impl in IMPLEMENTATIONS.values()))
COLUMNS += ("TFLOP/s", "of product", "of copy", "flash / Performer")
CURVES = {
    "performer": plots.Curve(IMPLEMENTATIONS["performer"].label, "#0072B2", 2.5),
    "flash": plots.Curve(IMPLEMENTATIONS["flash"].label, "#D55E00"),
    "composition": plots.Curve(IMPLEMENTATIONS["composition"].label, "#E69F00"),
}


def case_of(record: dict) -> cases.GpuCase:
    """The case of a record."""
    return cases.GpuCase(**{f.name: record[f.name] for f in dataclasses.fields(cases.GpuCase)})


def by_case(run: dict) -> dict:
    """{case: {impl: record}}, in the order of plan()."""
    found: dict = {}
    for record in run["records"]:
        found.setdefault(case_of(record), {})[record["implementation"]] = record
    setting = {s: i for i, s in enumerate(cases.SETTINGS)}
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                setting.get((item[0].dim, item[0].features), len(setting)),
                item[0].window,
                item[0].part == cases.BACKWARD,
                item[0].causal,
                item[0].length,
            ),
        )
    )


def table(run: dict) -> tables.Table:
    """The table: medians, and Performer's rates."""
    rows = []
    for case, records in by_case(run).items():
        times = {impl: records.get(impl, {}).get("median") for impl in IMPLEMENTATIONS}
        rates = [""] * 4
        if ours := times["performer"]:
            rate = case.operations() / ours / 1e9
            copied = case.bytes_moved() / ours / 1e6
            rates = [
                f"{rate:.0f}",
                f"{rate / run['rates']['product']:.2f}",
                f"{copied / run['rates']['copy']:.2f}",
                f"{times['flash'] / ours:.2f}" if times["flash"] else "",
            ]
        shown = [_shown(records.get(impl, {})) for impl in IMPLEMENTATIONS]
        rows.append(
            (case.mode, str(case.features), str(case.dim), str(case.length), *shown, *rates)
        )
    return tables.Table("", COLUMNS, rows)


def _shown(record: dict) -> str:
    """A median; (off) where the result is."""
    if "median" not in record:
        return ""
    time = record["median"]
    return (f"{time:.3f}" if time < 10 else f"{time:.1f}") + (" (off)" if record.get("off") else "")


def kernel_table(run: dict) -> tables.Table:
    """The times of the kernels, a row each."""
    cells = [
        (
            row["case"],
            row["kernel"],
            f"{row['launches']:g}" if "launches" in row else "",
            f"{row['microseconds']:.1f}" if "microseconds" in row else "",
        )
        for row in run["kernels"]
    ]
    return tables.Table("", ("", "kernel", "launches", "microseconds"), cells)


def conclusions(run: dict) -> list[str]:
    """Goals, crossovers with flash attention, what was left out; a sentence each."""
    found = by_case(run)
    lines = []
    for (causal, part), goal in cases.GOALS.items():
        case = cases.GpuCase(causal, part, cases.HEADLINE)
        if time := found.get(case, {}).get("performer", {}).get("median"):
            lines.append(
                f"{case.mode}, L = {case.length}, D = 64, M = 256: {time:.3f} ms, goal {goal} ms"
                f" ({'reached' if time <= goal else 'missed'})"
            )
    curves: dict = {}
    for case, records in found.items():
        key = (case.mode, case.dim, case.features)
        for impl, record in records.items():
            if "median" in record:
                curves.setdefault(key, {}).setdefault(impl, {})[case.length] = record["median"]
    for (mode, dim, features), times in curves.items():
        at = crossover(times.get("performer", {}), times.get("flash", {}))
        if at is not None:
            longest = max(times["performer"])
            where = f"beyond L = {longest}" if math.isinf(at) else f"from L = {at:.0f}"
            lines.append(f"{mode}, D = {dim}, M = {features}: faster than flash attention {where}")
    for record in run["records"]:
        if record.get("off") and "median" in record:
            label = IMPLEMENTATIONS[record["implementation"]].label
            case = case_of(record)
            lines.append(
                f"{label} is off: {case.mode}, L = {case.length}, D = {case.dim},"
                f" M = {case.features}: error {record['error']:.1e}"
            )
    lines += [f"{name}: {rate:.4g}" for name, rate in run.get("ceilings", {}).items()]
    left = [record for record in run["records"] if "left_out" in record]
    for reason in dict.fromkeys(record["left_out"] for record in left):
        count = sum(record["left_out"] == reason for record in left)
        lines.append(f"left out, {count} measurements: {reason}")
    return lines


def markdown(run: dict) -> str:
    """Machine, table and conclusions as Markdown."""
    notes = "\n".join(f"- {line}" for line in conclusions(run))
    parts = [machine(run), render.markdown_table(table(run)), notes]
    if run.get("kernels"):
        parts.append(render.markdown_table(kernel_table(run)))
    return "\n\n".join(parts) + "\n"


def machine(run: dict) -> str:
    """One line."""
    facts = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    rates = run["rates"]
    return (
        f"{facts}; bfloat16 product {rates['product']:.0f} TFLOP/s, copy {rates['copy']:.0f} GB/s;"
        f" B = {cases.BATCH}, H = {cases.HEADS}, bfloat16, medians"
    )


def show(run: dict) -> None:
    """Prints the table and what follows from it."""
    render.show([table(run)], [machine(run), *conclusions(run)], Console())


def write(run: dict, folder: Path, name: str = "gpu") -> list[Path]:
    """Writes NAME.json, NAME.md and, where matplotlib is there and there are times, NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(run))
    plot = draw(run, folder / f"{name}.png")
    return [folder / f"{name}.json", folder / f"{name}.md", *([plot] if plot else [])]


def draw(run: dict, path: Path) -> Path | None:
    """Time against length, both logarithmic, of the main setting; one panel for each mode."""
    dim, features = cases.SETTINGS[0]
    panels: dict = {}
    for case, records in by_case(run).items():
        if (case.dim, case.features) == (dim, features):
            for impl, record in records.items():
                if "median" in record:
                    points = panels.setdefault(case.mode, {}).setdefault(impl, {})
                    points[case.length] = record["median"]
    if not panels:
        return None
    title = f"M = {features}, D = {dim}; {run['machine'].get('GPU', '')}"
    plots.draw_panels(panels, CURVES, "milliseconds", title, path)
    return path
