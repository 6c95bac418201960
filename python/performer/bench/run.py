"""The whole benchmark: measures in processes of their own, reports, and writes the files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from performer.bench import processes
from performer.bench.plan import Plan
from performer.bench.report import plots, render, results

_PACKAGES = ("tensorflow", "keras", "numpy", "torch", "performer-pytorch")


def run(plan: Plan, output: Path, console: Console) -> dict:
    """Measures what the plan says and writes results.json, report.md and the plots.

    Args:
        plan: what to measure.
        output: an existing folder.
        console: where progress, tables and notes go.

    Returns:
        What was measured, see `results`.

    Raises:
        WrongResult: an implementation returned a wrong result; then nothing is written.
    """
    measured = {
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "records": measure(plan, console),
    }
    write(measured, output, console)
    return measured


def measure(plan: Plan, console: Console) -> list[dict]:
    """The records of all parts of a plan; a process that dies leaves a record of kind "failed"."""
    records: list[dict] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        deadline = None if plan.most_total is None else time.time() + plan.most_total

        def part(name, framework, jobs, count=plan.threads, **changes):
            if not jobs:
                return
            bar = progress.add_task(name, total=len(jobs))
            task = {
                "framework": framework,
                "threads": count,
                "rounds": plan.rounds,
                "most_seconds": plan.most_seconds,
                "deadline": deadline,
                "jobs": jobs,
            }
            try:
                for record in processes.records(task, lambda: progress.advance(bar)):
                    compared = record["kind"] == "compare"
                    records.append({**record, **changes} if compared else record)
            except processes.WorkerFailed as failure:
                records.append({"kind": "failed", "message": f"{name}: {failure}"})
                return
            missing = len(jobs) - int(progress.tasks[bar].completed)
            if missing:
                records.append({"kind": "not begun", "part": name, "jobs": missing})

        def timed():
            return {
                (x["implementation"], x["case"])
                for x in results.of_kind({"records": records}, "time")
            }

        part("time", "tensorflow", plan.time_jobs("tensorflow"))
        part("memory", "tensorflow", plan.memory_jobs("tensorflow", timed()))
        part("window, heads, decode", "tensorflow", plan.extra_jobs(), kind="heads")
        for count in (1, plan.threads) * (1 if plan.quick else 2):
            jobs = plan.thread_jobs()
            part(f"threads: {count}", "tensorflow", jobs, count, kind="threads", threads=count)
        part("time, torch", "torch", plan.time_jobs("torch"))
        part("memory, torch", "torch", plan.memory_jobs("torch", timed()))
    return records


def write(measured: dict, output: Path, console: Console) -> None:
    """Prints a run and writes its files."""
    (output / "results.json").write_text(json.dumps(measured, indent=1) + "\n")
    (output / "report.md").write_text(render.markdown(measured) + "\n")
    render.terminal(measured, console)
    if importlib.util.find_spec("matplotlib") is None:
        console.print("left out: the plots, matplotlib is not installed")
        written = []
    else:
        written = plots.draw(measured, output)
    names = ["results.json", "report.md", *(path.name for path in written)]
    console.print(f"{output}: {', '.join(names)}", markup=False, highlight=False)


def machine() -> dict:
    """Processor, cores, instruction set of the kernels, and versions."""
    versions = {"performer": importlib.import_module("performer").__version__}
    versions["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "isa": _isa(),
        "versions": versions,
    }


def _isa() -> str:
    """That of the kernels; where there is no module of the core to ask, those that were built."""
    try:
        return importlib.import_module("performer._core").isa()
    except ImportError:
        return "one of " + ", ".join(importlib.import_module("performer._build_info").ISAS)
