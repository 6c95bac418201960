"""`make build` compiles when, and only when, something has changed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def build(tmp_path):
    """Runs `make build` with tools that only count; returns how often it has compiled by then."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("cc", "cmake", "tools"):
        (tmp_path / folder).mkdir()
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "cc/source.cc"):
        (tmp_path / name).touch()
    (tmp_path / "tools" / "setup.sh").write_text('mkdir -p "$2"\n')
    (tmp_path / "tools" / "build.sh").write_text("echo built >>count\n")
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PERFORMER_CUDA", "PERFORMER_ISAS", "CXX"}
    clean = {name: value for name, value in os.environ.items() if name not in inherited}

    def run(*arguments, **environment):
        command = ["make", "build", *arguments]
        subprocess.run(command, cwd=tmp_path, env={**clean, **environment}, check=True)
        return len((tmp_path / "count").read_text().split())

    return run


def test_nothing_is_compiled_twice(build):
    assert [build(), build(), build(PERFORMER_CUDA="")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value"), [("PERFORMER_CUDA", "OFF"), ("PERFORMER_ISAS", "ALL"), ("CXX", "clang++")]
)
def test_another_choice_is_compiled(build, tmp_path, name, value):
    assert build() == 1
    cache = tmp_path / "build" / "editable-cpython-311" / "CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.touch()
    assert build(f"{name}={value}") == 2
    assert not cache.exists()  # it holds the old choice
    assert build(**{name: value}) == 2  # the same, by the environment
    assert build() == 3


def test_a_changed_source_is_compiled(build, tmp_path):
    assert build() == 1
    built = (tmp_path / ".venv" / "built").stat().st_mtime
    os.utime(tmp_path / "cc" / "source.cc", (built + 5, built + 5))
    assert build() == 2
