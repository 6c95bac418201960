"""Plants the faults of `fault_table.py`, one at a time, and says which ones the tests miss.

    python tests/building/faults.py [WORD]...    those whose name or path has one of the words; all
    python tests/building/faults.py --list [WORD]...

Works in a copy of the sources in build/faults. Faults in Python run with the libraries of `make
build`. For faults in C++ the core alone is compiled, for one instruction set, and those in CUDA are
compiled for the emulator. All take hours on 2 cores, as a fault in a header compiles the kernels
anew. Returns nonzero where a fault was missed.
"""

from __future__ import annotations

import argparse
import filecmp
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fault_table import CPU, CUDA, PYTHON, Fault

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "faults"
COPY = WORK / "source"
SECONDS = 900  # for one run of the tests; what takes longer hangs
ONE_ISA = [f"-DPERFORMER_COMPILES_{name}=OFF" for name in ("v2", "v4", "bf16")]  # leaves v3


class Broken(Exception):
    """The sources with a fault do not compile, or the tests fail without one."""


def main() -> int:
    """Plants the chosen faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--list", action="store_true", help="only name the faults")
    arguments = parser.parse_args()
    missed = []
    for kind, faults, build in (
        ("Python", PYTHON, build_nothing),
        ("C++", CPU, build_core),
        ("CUDA", CUDA, build_emulated),
    ):
        chosen = [fault for fault in faults if chooses(arguments.words, fault)]
        if arguments.list:
            print(*(f"{fault.path}: {fault.name}" for fault in chosen), sep="\n")
        elif chosen:
            missed += plant_all(kind, chosen, build)
    if missed:
        print("missed:", *(f"  {fault.path}: {fault.name}" for fault in missed), sep="\n")
    return bool(missed)


def chooses(words, fault):
    """Whether the command line chooses a fault."""
    return not words or any(word in fault.name or word in fault.path for word in words)


def plant_all(kind: str, faults: list[Fault], build: Callable[[], dict]) -> list[Fault]:
    """Plants faults and returns those that the tests miss."""
    copy_sources()
    missed = []
    for number, fault in enumerate(faults, 1):
        start = time.monotonic()
        check_that_tests_pass(fault.tests, build)
        source = COPY / fault.path
        right = source.read_text()
        assert right.count(fault.old) == 1, f"{fault.path} has no single {fault.old!r}"
        source.write_text(right.replace(fault.old, fault.new))
        try:
            caught = tests_fail(fault.tests, build())
        finally:
            source.write_text(right)
        if not caught:
            missed.append(fault)
        word, seconds = ("caught" if caught else "MISSED"), time.monotonic() - start
        print(f"{kind} {number}/{len(faults)} {word} in {seconds:.0f} s: {fault.name}", flush=True)
    return missed


@functools.cache
def check_that_tests_pass(tests: str, build) -> None:
    """Raises `Broken` if they fail without a fault."""
    if tests_fail(tests, build()):
        raise Broken(f"without a fault, these tests fail: {tests}")


def tests_fail(tests: str, environment: dict) -> bool:
    """Whether one of the tests fails, dies or hangs."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    clean = {name: x for name, x in os.environ.items() if not name.startswith("PERFORMER_")}
    with (WORK / "tests.log").open("w") as log:
        try:
            done = subprocess.run(
                [*command, *tests.split()],
                cwd=COPY,
                env={**clean, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return True
    return done.returncode != 0


def copy_sources() -> None:
    """Brings the copy up to date, and leaves alone what has not changed (for `ninja`)."""
    COPY.mkdir(parents=True, exist_ok=True)
    for name in ("CMakeLists.txt", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, COPY)
    for folder in ("cc", "cmake", "python", "tests", "examples", "docs"):
        wanted = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        for path in [path for path in (COPY / folder).rglob("*") if path.is_file()]:
            if path.relative_to(COPY) not in wanted:
                path.unlink()
        for path in wanted:
            if not (COPY / path).exists() or not filecmp.cmp(ROOT / path, COPY / path, False):
                (COPY / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, COPY / path)


def build_nothing() -> dict:
    """The environment of tests of Python faults."""
    return {"PYTHONPATH": str(COPY / "python")}


def build_core() -> dict:
    """Compiles the core, and installs the package with it."""
    compile_targets(WORK / "core", "all", *ONE_ISA)
    site = WORK / "site"
    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(COPY / "python" / "performer", site / "performer", ignore=ignored)
    run("cmake", "--install", str(WORK / "core"), "--prefix", str(site))
    return {"PYTHONPATH": str(site), "PERFORMER_DISABLE_LIBRARY": "1"}


def build_emulated() -> dict:
    """Compiles the CUDA kernels for the emulator."""
    options = ["-DPERFORMER_EMULATION=ON", "-DPERFORMER_BINDINGS=OFF"]
    compile_targets(WORK / "emulated", "performer_emulated", *options)
    paths = [str(WORK / "emulated" / "emulated"), str(COPY / "python")]
    return {"PYTHONPATH": os.pathsep.join(paths), "PERFORMER_DISABLE_LIBRARY": "1"}


def compile_targets(folder: Path, target: str, *options: str) -> None:
    """Configures and builds without TensorFlow and nvcc."""
    chosen = ["-DPERFORMER_TENSORFLOW=OFF", "-DPERFORMER_CUDA=OFF", *options]
    python = f"-DPython_EXECUTABLE={sys.executable}"
    run("cmake", "-S", str(COPY), "-B", str(folder), "-GNinja", python, *chosen)
    run("cmake", "--build", str(folder), "--target", target)


def run(*command: str) -> None:
    """Runs a command quietly; raises `Broken` with its words if it fails."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": tools, "PERFORMER_CUDA": "OFF"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise Broken(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
