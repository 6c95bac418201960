"""docs/architecture.md names what is there, and the C++ parts know only whom it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PATHS = re.findall(
    r"\b(?:cc|python|tests|cmake|tools|benchmarks)/[\w/.-]*\w(?!\w*/)|`(?:cc|tests|cmake)`", PAGE
)
KNOWN = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda", "sim"},  # the emulator in the place of CUDA's own header
    "sim": {"sim"},
    "tf": {"core", "cpu", "cuda", "tf"},
    "bindings": {"core", "cpu", "cuda", "bindings"},
}


def test_every_path_of_the_page_exists():
    assert len(PATHS) > 30
    assert [path for path in PATHS if not (ROOT / path.strip("`")).exists()] == []


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 80


def test_functions_named_beside_a_file_are_there():
    named = re.findall(r"`((?:cc|python)/[\w/]+\.\w+)`,\s+`(\w+)`", PAGE)
    assert len(named) >= 4
    for path, name in named:
        assert name in (ROOT / path).read_text(), (path, name)


@pytest.mark.parametrize("part", KNOWN)
def test_a_part_includes_only_what_it_may_know(part):
    files = [path for path in (ROOT / "cc" / part).rglob("*.*") if path.is_file()]
    assert files
    included = {
        name
        for path in files
        for name in re.findall(r'^\s*#\s*include "(\w+)/', path.read_text(), re.MULTILINE)
    }
    assert included & KNOWN.keys() <= KNOWN[part]
