"""Everything that only a GPU can show, with one command, in under eight minutes:

    python tests/gpu/run.py [--output FOLDER] [--minutes N] [--only STEP ...]

    build      the kernels for this GPU, without TensorFlow, in build/gpu
    tests      every PTX wrapper, all kernels against the reference, 50 runs with the same bits
    sanitize   compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    benchmark  benchmarks/gpu.py, in the time that is left

Needs an NVIDIA GPU (compute capability 8.0 or later), nvcc, CMake, a C++ compiler, and in this
Python torch, numpy, ml_dtypes, pybind11, pytest, rich and matplotlib. Logs, tables and the plot go
to FOLDER (default performer-gpu). Returns the number of steps that failed, or 3 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NEEDED = ("torch", "numpy", "ml_dtypes", "pybind11", "pytest", "rich", "matplotlib")
STEPS = ("build", "tests", "sanitize", "benchmark")
RESERVE = 15.0  # seconds of the benchmark's report


@dataclass(frozen=True)
class Command:
    """One process of a step."""

    name: str
    arguments: tuple[str, ...]
    seconds: float  # after which it is stopped


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    made.add_argument("--output", type=Path, default=Path("performer-gpu"), metavar="FOLDER")
    made.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    made.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; returns the exit status."""
    options = parser().parse_args(arguments)
    if options.minutes <= 0:
        print(f"run.py: --minutes must be positive; got {options.minutes}", file=sys.stderr)
        return 2
    capability = compute_capability()
    if capability is None:
        print("run.py: skipped: nvidia-smi shows no GPU here", file=sys.stderr)
        return 3
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"run.py: skipped: not installed: {', '.join(absent)}", file=sys.stderr)
        return 3
    deadline = time.monotonic() + 60 * options.minutes
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, str] = {}
    for step in options.only:
        start = time.monotonic()
        if start > deadline:
            results[step] = "not begun: no time"
            continue
        outcome = run_step(step, capability, output, deadline - start)
        results[step] = f"{outcome} ({time.monotonic() - start:.0f} s)"
        print(f"== {step}: {results[step]}", flush=True)
        if step == "build" and outcome != "passed":
            break
    failed = [step for step in options.only if not results.get(step, "").startswith("passed")]
    print(f"\nGPU: {len(options.only) - len(failed)} steps passed, {len(failed)} failed; {output}")
    return len(failed)


def compute_capability() -> str | None:
    """ "90" of an H100; None without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = found.stdout.split()
    return lines[0].replace(".", "") if found.returncode == 0 and lines else None


def run_step(step: str, capability: str, output: Path, left: float) -> str:
    """ "passed", or what failed. Commands of `build` follow each other, the others run together."""
    made = commands(step, capability, output, left)
    for command in made:
        if shutil.which(command.arguments[0]) is None:
            return f"failed: {command.arguments[0]} is not installed"
    if step == "build":
        prepare_site()
        outcomes = [finish(start(command, output), command) for command in made]
    else:
        running = [(start(command, output), command) for command in made]
        outcomes = [finish(process, command) for process, command in running]
    bad = [c.name + ": " + o for c, o in zip(made, outcomes, strict=True) if o != "passed"]
    for command, outcome in zip(made, outcomes, strict=True):
        if outcome != "passed" or step in ("tests", "benchmark"):
            print((output / f"{command.name}.log").read_text(errors="replace")[-6000:], flush=True)
    return "failed: " + "; ".join(bad) if bad else "passed"


def commands(step: str, capability: str, output: Path, left: float) -> list[Command]:
    """The processes of a step, with `left` seconds for all that is still to come."""
    python = sys.executable
    if step == "build":
        configure = ("cmake", "-S", str(ROOT), "-B", str(BUILD), "-DPERFORMER_CUDA=ON")
        configure += ("-DPERFORMER_TENSORFLOW=OFF", "-DPERFORMER_PROBES=ON")
        configure += (f"-DPython_EXECUTABLE={python}", "-DCMAKE_BUILD_TYPE=Release")
        configure += (f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real",)
        if shutil.which("ninja"):
            configure += ("-GNinja",)
        jobs = str(len(os.sched_getaffinity(0)))
        return [
            Command("configure", configure, 60),
            Command("compile", ("cmake", "--build", str(BUILD), "--parallel", jobs), left),
            Command("install", ("cmake", "--install", str(BUILD), "--prefix", str(SITE)), 60),
        ]
    if step == "tests":
        tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu"))
        return [Command("tests", (python, *tests), min(left, 180))]
    if step == "sanitize":
        check = (python, str(ROOT / "tests" / "gpu" / "sanitized.py"))
        filters = ("--kernel-name", "kernel_substring=performer", "--error-exitcode", "9")
        return [
            Command(tool, ("compute-sanitizer", "--tool", tool, *filters, *check), min(left, 150))
            for tool in TOOLS
        ]
    seconds = str(int(max(left - RESERVE, 10)))
    benchmark = (python, str(ROOT / "benchmarks" / "gpu.py"), "--seconds", seconds)
    return [Command("benchmark", (*benchmark, "--output", str(output)), left + 60)]


def prepare_site() -> None:
    """A copy of the package that the new build is installed into."""
    shutil.rmtree(SITE, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "python" / "performer", SITE / "performer", ignore=ignored)


def start(command: Command, output: Path) -> subprocess.Popen:
    """Starts a process that writes to its log."""
    paths = [str(SITE), str(BUILD / "probes"), str(ROOT / "tests")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PERFORMER_DISABLE_LIBRARY": "1",
        "PERFORMER_REQUIRE_GPU": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if command.name in TOOLS:  # each tensor is an allocation of its own, with edges to run over
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    with (output / f"{command.name}.log").open("w") as log:
        return subprocess.Popen(
            command.arguments, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )


def finish(process: subprocess.Popen, command: Command) -> str:
    """Waits; "passed" or what was wrong."""
    try:
        code = process.wait(timeout=command.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after {command.seconds:.0f} s"
    return "passed" if code == 0 else f"exit status {code}"


if __name__ == "__main__":
    sys.exit(main())
