"""Everything that only a GPU can show, with one command; its first ten minutes tell most:

    python tests/gpu/run.py [--output FOLDER] [--minutes N] [--only STEP ...]

    build       the kernels for this GPU, without TensorFlow, in build/gpu
    ptx         every PTX wrapper by itself
    headline    the four cases with a goal, and with a window: checked, timed, time of each kernel,
                measured ceilings
    tests       all kernels against the reference, 50 runs with the same bits
    sanitize    compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    table       benchmarks/gpu.py, all cases
    counters    ncu, where it is there: pipes, issue, memory and stalls of each kernel
    variants    the headline again, built otherwise (VARIANTS)
    tensorflow  op, gradient and layer inside TensorFlow, where it is installed and sees the GPU

Needs an NVIDIA GPU (compute capability 8.0 or later), nvcc, CMake, a C++ compiler, and in this
Python torch, numpy, ml_dtypes, pybind11, pytest, rich and matplotlib. Logs, tables, plots, the
clocks while it ran (clocks.csv) and an archive of all that (performer-gpu.tar.gz, renewed after
each step) go to FOLDER (default performer-gpu). Returns the number of steps that failed, or 3
without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "gpu"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NEEDED = ("torch", "numpy", "ml_dtypes", "pybind11", "pytest", "rich", "matplotlib")
ARCHIVE = "performer-gpu.tar.gz"
# Status of a test process that ended because the GPU no longer answers it (tests/gpu/conftest.py).
STICKY = 86
# Of the tests of kernels, each a process of its own, so that an error that stays in one leaves the
# others. "bfloat16" contains "float16".
TYPES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16 and not bfloat16",
    "others": "not float32 and not float16",
}
# Macros that answer a question by the headline's times; the default is 1024 rows.
VARIANTS = {
    "splits-of-512": "-DPERFORMER_SPLIT_ROWS=512",
    "splits-of-2048": "-DPERFORMER_SPLIT_ROWS=2048",
    "default-carve-out": "-DPERFORMER_DEFAULT_CARVEOUT",
}
# What ncu collects: its sections on speed of light, the pipes, issue slots, memory and stalls.
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats"),
    *("MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"),
)


@dataclass(frozen=True)
class Command:
    """One process of a step.

    Attributes:
        name: of its log.
        seconds: after which it is stopped.
        site: where the package that it imports is installed.
        environment: what is added to that of this process.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    site: Path = BUILDS / "default" / "site"
    environment: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Commands, and how they run: one after the other until one fails, or all at once.

    Attributes:
        left_out: why there is nothing to run.
        prepare: sites that the package is copied to first.
    """

    commands: tuple[Command, ...] = ()
    together: bool = False
    left_out: str = ""
    prepare: tuple[Path, ...] = ()


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    made.add_argument("--output", type=Path, default=Path("performer-gpu"), metavar="FOLDER")
    made.add_argument("--minutes", type=float, default=25.0, help="for everything (default 25)")
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
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    clocks = log_clocks(output)
    try:
        results = run_steps(options.only, capability, output, 60 * options.minutes)
    finally:
        clocks.terminate()
        clocks.wait()
    archive(output)
    failed = [step for step, result in results.items() if is_failure(result)]
    print(f"\nGPU: {len(results) - len(failed)} steps passed or left out, {len(failed)} failed")
    print(*(f"  {step}: {result}" for step, result in results.items()), sep="\n")
    print(output / ARCHIVE)
    return len(failed)


def run_steps(chosen: list[str], capability: str, output: Path, seconds: float) -> dict[str, str]:
    """Runs the steps in their order; what came of each, which summary.json says too."""
    deadline = time.monotonic() + seconds
    results: dict[str, str] = {}
    for name, plan in STEPS.items():
        if name not in chosen:
            continue
        start = time.monotonic()
        if start > deadline:
            results[name] = "not begun: no time"
            continue
        outcome = run_step(plan(capability, output, deadline - start), output)
        results[name] = f"{outcome} ({time.monotonic() - start:.0f} s)"
        print(f"== {name}: {results[name]}", flush=True)
        (output / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
        archive(output)
        if name == "build" and is_failure(outcome):
            break
    return results


def is_failure(outcome: str) -> bool:
    """Whether a step's outcome is neither that it passed nor why it was left out."""
    return not outcome.startswith(("passed", "left out"))


def compute_capability() -> str | None:
    """ "90" of an H100; None without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = found.stdout.split()
    return lines[0].replace(".", "") if found.returncode == 0 and lines else None


def log_clocks(output: Path) -> subprocess.Popen:
    """Writes clocks, power and what throttles to clocks.csv twice a second, until it is ended."""
    asked = (
        "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    )
    program = shutil.which("nvidia-smi") or "nvidia-smi"
    with (output / "clocks.csv").open("w") as log:
        return subprocess.Popen(
            [program, f"--query-gpu={asked}", "--format=csv", "--loop-ms=500"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def archive(output: Path) -> None:
    """Everything in the folder as one file in it."""
    made = output / (ARCHIVE + ".new")
    with tarfile.open(made, "w:gz") as tar:
        for path in sorted(output.iterdir()):
            if not path.name.startswith(ARCHIVE):
                tar.add(path, arcname=f"performer-gpu/{path.name}")
    made.replace(output / ARCHIVE)


def run_step(step: Step, output: Path) -> str:
    """ "passed", why the step was left out, or what failed."""
    if step.left_out:
        return f"left out: {step.left_out}"
    for command in step.commands:
        if shutil.which(command.arguments[0]) is None:
            return f"failed: {command.arguments[0]} is not installed"
    for site in step.prepare:
        prepare_site(site)
    if step.together:
        running = [(command, start(command, output)) for command in step.commands]
        outcomes = [(command, finish(process, command)) for command, process in running]
    else:
        outcomes = []
        for command in step.commands:
            outcomes.append((command, finish(start(command, output), command)))
            if outcomes[-1][1] != "passed":
                break
    for command, _ in outcomes:
        log = (output / f"{command.name}.log").read_text(errors="replace")
        print(f"-- {command.name}\n{log[-3000:]}", flush=True)
    bad = [f"{command.name}: {outcome}" for command, outcome in outcomes if outcome != "passed"]
    return "failed: " + "; ".join(bad) if bad else "passed"


def build_commands(capability: str, left: float, name: str = "default", flags: str = "") -> Step:
    """Configures, compiles and installs a build with these flags of nvcc."""
    folder, site = BUILDS / name, BUILDS / name / "site"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DPERFORMER_CUDA=ON"]
    configure += ["-DPERFORMER_TENSORFLOW=OFF", "-DPERFORMER_PROBES=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={capability}-real"]
    configure += [f"-DCMAKE_CUDA_FLAGS={('-lineinfo ' + flags).strip()}"]
    if shutil.which("ninja"):
        configure.append("-GNinja")
    jobs = str(len(os.sched_getaffinity(0)))
    made = (
        Command(f"configure-{name}", tuple(configure), 60),
        Command(f"compile-{name}", ("cmake", "--build", str(folder), "--parallel", jobs), left),
        Command(f"install-{name}", ("cmake", "--install", str(folder), "--prefix", str(site)), 60),
    )
    return Step(made, prepare=(site,))


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _benchmark(output: Path, *arguments: str) -> tuple[str, ...]:
    program = str(ROOT / "benchmarks" / "gpu.py")
    return (sys.executable, program, "--output", str(output), *arguments)


def plan_build(capability: str, output: Path, left: float) -> Step:
    return build_commands(capability, left)


def plan_ptx(capability: str, output: Path, left: float) -> Step:
    tests = _pytest(str(ROOT / "tests" / "gpu" / "test_ptx.py"))
    return Step((Command("ptx", tests, min(left, 120)),))


def plan_headline(capability: str, output: Path, left: float) -> Step:
    seconds = min(left, 120)
    timed = _benchmark(output, "--headline", "--seconds", str(int(seconds)))
    return Step((Command("headline", timed, seconds + 60),))


def plan_tests(capability: str, output: Path, left: float) -> Step:
    file = str(ROOT / "tests" / "gpu" / "test_kernels.py")
    commands = (
        Command(f"tests-{name}", _pytest("-k", chosen, file), min(left, 420))
        for name, chosen in TYPES.items()
    )
    return Step(tuple(commands), together=True)


def plan_sanitize(capability: str, output: Path, left: float) -> Step:
    check = (sys.executable, str(ROOT / "tests" / "gpu" / "sanitized.py"))
    filters = ("--kernel-name", "kernel_substring=performer", "--error-exitcode", "9")
    # Each tensor is an allocation of its own, with edges to run over.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = (
        Command(
            tool,
            ("compute-sanitizer", "--tool", tool, *filters, *check),
            min(left, 240),
            environment=environment,
        )
        for tool in TOOLS
    )
    return Step(tuple(commands), together=True)


def plan_table(capability: str, output: Path, left: float) -> Step:
    seconds = max(10, min(left, 240))
    timed = _benchmark(output, "--seconds", str(int(seconds)))
    return Step((Command("table", timed, seconds + 60),))


def plan_counters(capability: str, output: Path, left: float) -> Step:
    if shutil.which("ncu") is None:
        return Step(left_out="ncu is not installed")
    sections = (part for section in SECTIONS for part in ("--section", section))
    filters = ("--kernel-name-base", "demangled", "--kernel-name", "regex:performer")
    program = _benchmark(output, "--once")
    profiled = ("ncu", "--csv", "--page", "raw", *filters, *sections, *program)
    return Step((Command("counters", profiled, min(left, 240)),))


def plan_variants(capability: str, output: Path, left: float) -> Step:
    commands: list[Command] = []
    sites = []
    for name, flags in VARIANTS.items():
        built = build_commands(capability, left, name, flags)
        timed = _benchmark(output, "--headline", "--name", name, "--seconds", "30")
        commands += built.commands
        commands.append(Command(name, timed, 90, site=built.prepare[0]))
        sites.append(built.prepare[0])
    return Step(tuple(commands), prepare=tuple(sites))


def plan_tensorflow(capability: str, output: Path, left: float) -> Step:
    if importlib.util.find_spec("tensorflow") is None:
        return Step(left_out="TensorFlow is not installed")
    tests = _pytest(str(ROOT / "tests" / "gpu" / "test_tensorflow.py"))
    # With the package that is installed: the kit's own build has no operators of TensorFlow.
    environment = {"PERFORMER_DISABLE_LIBRARY": "", "PYTHONPATH": str(ROOT / "tests")}
    return Step((Command("tensorflow", tests, min(left, 300), environment=environment),))


STEPS = {
    "build": plan_build,
    "ptx": plan_ptx,
    "headline": plan_headline,
    "tests": plan_tests,
    "sanitize": plan_sanitize,
    "table": plan_table,
    "counters": plan_counters,
    "variants": plan_variants,
    "tensorflow": plan_tensorflow,
}


def prepare_site(site: Path) -> None:
    """A copy of the package that a build is installed into."""
    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    shutil.copytree(ROOT / "python" / "performer", site / "performer", ignore=ignored)


def start(command: Command, output: Path) -> subprocess.Popen:
    """Starts a process that writes to its log."""
    paths = [str(command.site), str(command.site.parent / "probes"), str(ROOT / "tests")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PERFORMER_DISABLE_LIBRARY": "1",
        "PERFORMER_REQUIRE_GPU": "1",
        "PYTHONUNBUFFERED": "1",
        **command.environment,
    }
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
    if code == STICKY:
        return "ended at an error of the GPU that stays"
    return "passed" if code == 0 else f"exit status {code}"


if __name__ == "__main__":
    sys.exit(main())
