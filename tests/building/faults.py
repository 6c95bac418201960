"""Plants the faults of `fault_table.py`, one at a time, and says which ones the tests miss.

    python tests/building/faults.py [WORD]...    those whose name or path has one of the words; all
    python tests/building/faults.py --list [WORD]...

Works in a copy of the sources in build/faults. Faults in Python run with the libraries of `make
build`. For faults in C++ the core alone is compiled, for one instruction set and without
optimisation, and those in CUDA are compiled for the emulator. Faults in the work of threads have
programs as tests, which run under ThreadSanitizer: whether they show otherwise is chance. A fault
is caught where a test fails with it that passes without it. Returns nonzero where a fault was
missed, or does not compile.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fault_table import CPU, CUDA, PYTHON, THREADS, Fault

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "faults"
COPY = WORK / "source"
SECONDS = 900  # for one run of the tests; what takes longer hangs
# A debug build of the kernels takes a fifth of the time.
QUICK = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -DNDEBUG"]
QUICK += ["-DPERFORMER_ISAS=NATIVE"]


class Broken(Exception):
    """The sources with a fault do not compile, or the tests fail without one."""


def main() -> int:
    """Plants the chosen faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--list", action="store_true", help="only name the faults")
    arguments = parser.parse_args()
    missed = []
    tables = {"Python": PYTHON, "C++": CPU, "threads": THREADS, "CUDA": CUDA}
    for kind, faults in tables.items():
        chosen = [fault for fault in faults if chooses(arguments.words, fault)]
        if arguments.list:
            print(*(f"{fault.path}: {fault.name}" for fault in chosen), sep="\n")
        elif chosen:
            missed += plant_all(kind, chosen)
    if missed:
        print("missed:", *(f"  {fault.path}: {fault.name}" for fault in missed), sep="\n")
    return bool(missed)


def chooses(words, fault):
    """Whether the command line chooses a fault."""
    return not words or any(word in fault.name or word in fault.path for word in words)


def plant_all(kind: str, faults: list[Fault]) -> list[Fault]:
    """Plants faults and returns those that the tests miss."""
    build = BUILDS[kind]
    copy_sources()
    right = build("right")
    missed = []
    for number, fault in enumerate(faults, 1):
        start = time.monotonic()
        source = COPY / fault.path
        text = source.read_text()
        assert text.count(fault.old) == 1, f"{fault.path} has no single {fault.old!r}"
        source.write_text(text.replace(fault.old, fault.new))
        try:
            failed = failures(kind, fault.tests.split(), build("wrong"))
        except Broken as error:
            print(f"{kind} {number}/{len(faults)} BROKEN: {fault.name}: {error}", flush=True)
            missed.append(fault)
            continue
        finally:
            source.write_text(text)
        if failures(kind, failed, right):
            raise Broken(f"without a fault, too, these tests fail: {' '.join(failed)}")
        if not failed:
            missed.append(fault)
        word, seconds = ("caught" if failed else "MISSED"), time.monotonic() - start
        by = f" ({failed[0].partition('[')[0]})" if failed else ""
        print(
            f"{kind} {number}/{len(faults)} {word} in {seconds:.0f} s: {fault.name}{by}", flush=True
        )
    return missed


def failures(kind: str, tests: list[str], environment: dict) -> list[str]:
    """The first of the tests that fails; all of them if they die or hang; else none."""
    if not tests:
        return []
    shutil.rmtree(WORK / "failed", ignore_errors=True)
    process = PROCESSES[kind].Process(target=run_tests, args=(tests, environment))
    process.start()
    process.join(SECONDS)
    process.kill()
    process.join()
    if process.exitcode == 0:
        return []
    found = WORK / "failed" / "v" / "cache" / "lastfailed"
    return list(json.loads(found.read_text())) if found.exists() else tests


def run_tests(tests: list[str], environment: dict) -> None:
    """Runs tests of the copy, in a process of their own."""
    for name in [name for name in os.environ if name.startswith("PERFORMER_")]:
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.dont_write_bytecode = True  # the next text may be as long, and of the same second
    os.chdir(COPY)
    log = os.open(WORK / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "PROGRAMS" in environment:
        sys.exit(run_programs(tests, Path(environment["PROGRAMS"])))
    if environment.get("PERFORMER_DISABLE_LIBRARY"):
        sys.modules.setdefault("tensorflow", None)  # type: ignore[arg-type]
    import pytest

    cache = f"cache_dir={WORK / 'failed'}"
    sys.exit(pytest.main(["-q", "-x", "-m", "", "-n", "0", "-o", cache, *tests]))


def run_programs(tests: list[str], folder: Path) -> int:
    """Runs the programs of tests in C++; the number of those that fail."""
    # Some systems randomise addresses more widely than ThreadSanitizer can follow.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    fixed = fixed if fixed and not subprocess.run([*fixed, "true"], check=False).returncode else []
    programs = [[*fixed, str(folder / Path(test).stem)] for test in tests]
    return sum(subprocess.run(program, check=False).returncode != 0 for program in programs)


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


def build_nothing(name: str) -> dict:
    """The environment of tests of Python faults; the copy itself is what they run."""
    return {"PYTHONPATH": str(COPY / "python"), "PYTHONDONTWRITEBYTECODE": "1"}


def build_core(name: str) -> dict:
    """Compiles the core, and installs the package with it."""
    compile_targets(WORK / "core", "all", *QUICK)
    site = WORK / name
    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(COPY / "python" / "performer", site / "performer", ignore=ignored)
    run("cmake", "--install", str(WORK / "core"), "--prefix", str(site))
    return {"PYTHONPATH": str(site), "PERFORMER_DISABLE_LIBRARY": "1"}


def build_threads(name: str) -> dict:
    """Compiles the tests in C++ with ThreadSanitizer."""
    options = ["-DPERFORMER_SANITIZE=thread", "-DPERFORMER_TESTS=ON", "-DPERFORMER_BINDINGS=OFF"]
    compile_targets(WORK / "threads", "threads_test", *QUICK, *options)
    (WORK / name).mkdir(exist_ok=True)
    shutil.copy(WORK / "threads" / "threads_test", WORK / name)
    return {"PROGRAMS": str(WORK / name)}


def build_emulated(name: str) -> dict:
    """Compiles the CUDA kernels for the emulator."""
    options = ["-DPERFORMER_EMULATION=ON", "-DPERFORMER_BINDINGS=OFF"]
    compile_targets(WORK / "emulated", "performer_emulated", *options)
    shutil.rmtree(WORK / name, ignore_errors=True)
    shutil.copytree(WORK / "emulated" / "emulated", WORK / name)
    paths = [str(WORK / name), str(COPY / "python")]
    return {"PYTHONPATH": os.pathsep.join(paths), "PERFORMER_DISABLE_LIBRARY": "1"}


# Builds the sources as they are into build/faults/NAME; returns the environment of their tests.
BUILDS = {
    "Python": build_nothing,
    "C++": build_core,
    "threads": build_threads,
    "CUDA": build_emulated,
}
# Those of Python faults begin with TensorFlow, which takes long to import; the others have none.
PROCESSES = {
    "Python": multiprocessing.get_context("forkserver"),
    "C++": multiprocessing.get_context("spawn"),
    "threads": multiprocessing.get_context("spawn"),
    "CUDA": multiprocessing.get_context("spawn"),
}
PROCESSES["Python"].set_forkserver_preload(["keras", "pytest"])


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
