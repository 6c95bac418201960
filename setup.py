"""Compiles the C++ parts with CMake, and names the extras; pyproject.toml says all else.

Wheels are built in setuptools' own folder. An editable install (`pip install -e .`) keeps its build
in build/editable-*, and compiles only what has changed. Environment:

    CXX: The compiler.
    CMAKE_ARGS: Further arguments for CMake.
    CMAKE_BUILD_PARALLEL_LEVEL: The number of jobs.
    PERFORMER_CUDA: Whether the GPU kernels are built (AUTO, ON, OFF; see cmake/cuda.cmake).
    PERFORMER_ISAS: For which processors those of the CPU are (see cmake/isas.cmake): unless it is
        given, for all in a wheel and for this machine in an editable install.
    PERFORMER_TENSORFLOWS: Folders of TensorFlow packages, separated by ";", to build operators for;
        unless it is given, that of this Python. (tools/wheels.sh gives all that are served.)
    PERFORMER_BINDINGS: OFF leaves the module of the core (performer._core) out of a wheel, which
        then serves any Python.

A sdist holds no time but SOURCE_DATE_EPOCH, where that is set, and no name of a user.
"""

from __future__ import annotations

import gzip
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).parent.resolve()
BINDINGS = os.environ.get("PERFORMER_BINDINGS", "").upper() not in ("OFF", "0", "NO", "FALSE")


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake: into the wheel, or beside the source."""

    def run(self):
        check_machine()
        if self.inplace or self.editable_mode:
            build = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
            destination = ROOT / "python"
            isas = "NATIVE"  # it stays on this machine
        else:
            build = Path(self.build_temp).resolve()
            destination = Path(self.build_lib).resolve()
            isas = "ALL"
            # The build requirements of the last wheel lay in a temporary folder that is gone.
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        # Given on every run: what an earlier run remembered may not exist any more.
        configure = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DPERFORMER_CUDA={os.environ.get('PERFORMER_CUDA') or 'AUTO'}")
        configure.append(f"-DPERFORMER_ISAS={os.environ.get('PERFORMER_ISAS') or isas}")
        configure.append(f"-DPERFORMER_TENSORFLOWS={os.environ.get('PERFORMER_TENSORFLOWS', '')}")
        configure.append(f"-DPERFORMER_BINDINGS={'ON' if BINDINGS else 'OFF'}")
        if ninja := tool("ninja"):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        cmake("-S", ROOT, "-B", build, *configure)
        cmake("--build", build, "--parallel", jobs)
        cmake("--install", build, "--prefix", destination)


class Wheel(bdist_wheel):
    """Without the module of the core nothing in a wheel belongs to one Python."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if BINDINGS else ("py3", "none", platform)


class SourceArchive(sdist):
    """Same sources, same bytes."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, **ownership):
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is None or format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, **ownership)

        def anonymous(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = int(epoch)
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        path = Path(f"{base_name}.tar.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            path.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=int(epoch)) as compressed,
            tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(Path(root_dir or ".") / base_dir, base_dir, filter=anonymous)
        return str(path)


def check_machine():
    """Raises PlatformError, with the remedy, where something is missing that no wheel can bring."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(shlex.split(compiler)[0]) is None:
        raise PlatformError(
            f"no C++ compiler: {compiler or 'c++, g++ and clang++'} not found. Performer needs one "
            "for C++17, for example `apt-get install g++` or `dnf install gcc-c++`."
        )
    if BINDINGS and not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise PlatformError(
            f"no Python headers: Python.h not found for {sys.executable}. Install them, for "
            "example with `apt-get install python3-dev` or `dnf install python3-devel`."
        )


def tool(name):
    """Returns the path of the program `name`: beside this Python, else on PATH, else None."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def cmake(*arguments):
    """Runs CMake; raises CompileError where it fails, after its own messages."""
    program = tool("cmake")
    if program is None:
        raise PlatformError("CMake is not installed: `pip install cmake`.")
    command = [program, *map(str, arguments)]
    print(shlex.join(command), flush=True)
    if subprocess.run(command, check=False).returncode != 0:
        raise CompileError(f"CMake failed, see its messages above: {shlex.join(command)}")


requirements = runpy.run_path(str(ROOT / "tools" / "requirements.py"))
# The name makes setuptools tag the wheel for this platform; CMakeLists.txt says what is built. What
# is required for setup, pip installs into the isolated environment of the build.
setup(
    ext_modules=[Extension("performer._core", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "sdist": SourceArchive},
    extras_require=requirements["extras"](),
    setup_requires=requirements["build"](),
)
