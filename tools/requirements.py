"""What the package and its builds require, read from pyproject.toml.

As a program it prints what a development environment needs, one requirement a line: build, run and
test requirements together, so that the package can then be built without isolation against the
TensorFlow that it will run with. With names of extras it prints what these need.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    try:
        import tomli as tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib

TOOLS = Path(__file__).parent


def project() -> dict:
    """Returns pyproject.toml."""
    return tomllib.loads((TOOLS.parent / "pyproject.toml").read_text())


def served() -> list[str]:
    """Returns the minor versions of TensorFlow that are served, oldest first."""
    return project()["tool"]["performer"]["tensorflow"]


def extras() -> dict[str, list[str]]:
    """Returns the extras of the package and what each requires."""
    versions = served()
    major, minor = map(int, versions[-1].split("."))
    bounds = f">={versions[0]},<{major}.{minor + 1}"
    extras = project()["tool"]["performer"]["extras"]
    return {name: [r.format(served=bounds) for r in wanted] for name, wanted in extras.items()}


def build() -> list[str]:
    """Returns what a build requires beside the build system of pyproject.toml.

    That is a TensorFlow to compile against, unless the environment names some: tensorflow-cpu is
    the small package with the same headers and ABI; it exists for x86-64 only. And nvcc, see
    cuda_requirements.py.
    """
    wanted = runpy.run_path(str(TOOLS / "cuda_requirements.py"))["needed"]()
    if not os.environ.get("PERFORMER_TENSORFLOWS"):
        newest = served()[-1]
        wanted.append(f"tensorflow-cpu=={newest}.*; platform_machine == 'x86_64'")
        wanted.append(f"tensorflow=={newest}.*; platform_machine != 'x86_64'")
    return wanted


def development() -> list[str]:
    """Returns what a development environment needs."""
    text = project()
    own = text["project"]["name"]
    used = [r for name in ("demo", "examples", "test") for r in extras()[name]]
    wanted = text["build-system"]["requires"] + text["project"]["dependencies"] + used
    wanted.append(f"tensorflow=={served()[-1]}.*")
    wanted += runpy.run_path(str(TOOLS / "cuda_requirements.py"))["needed"]()
    return [requirement for requirement in wanted if not requirement.startswith(own)]


if __name__ == "__main__":
    named = [requirement for name in sys.argv[1:] for requirement in extras()[name]]
    print(*(named or development()), sep="\n")
