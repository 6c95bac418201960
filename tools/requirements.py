"""Prints what a development environment needs, one requirement a line, read from pyproject.toml.

Build, run and test requirements together, so that the package can then be built without isolation
against the TensorFlow that it will run with. The build's own TensorFlow is left out for the same
reason, and because tensorflow-cpu and tensorflow overwrite each other.
"""

from __future__ import annotations

from pathlib import Path

import cuda_requirements

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main() -> None:
    """Prints the list."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    name = project["project"]["name"]
    extras = project["project"]["optional-dependencies"]
    build = [r for r in project["build-system"]["requires"] if not r.startswith("tensorflow")]
    used = [r for name in ("demo", "docs", "examples", "test") for r in extras[name]]
    wanted = build + project["project"]["dependencies"] + used
    wanted += cuda_requirements.needed()
    print(*(r for r in wanted if not r.startswith(name)), sep="\n")


if __name__ == "__main__":
    main()
