"""docs/promises.md: every promise names the tests that keep it, and these exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    line.strip("|").rpartition("|")
    for line in (ROOT / "docs" / "promises.md").read_text().splitlines()
    if line.startswith("| ") and "kept by" not in line
]


def test_there_are_many_promises():
    assert len(ROWS) >= 25


@pytest.mark.parametrize(("promise", "tests"), [(row[0].strip(), row[2]) for row in ROWS])
def test_the_tests_that_keep_a_promise_exist(promise, tests):
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", tests)
    assert named, promise
    for file, function in named:
        text = (ROOT / file).read_text()
        assert not function or f"\ndef {function}(" in text, (file, function)
