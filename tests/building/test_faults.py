"""The faults that `faults.py` plants still fit the sources; planting them takes an hour."""

from collections import Counter
from pathlib import Path

import pytest

from building.fault_table import CPU, CUDA, PYTHON, THREADS

ROOT = Path(__file__).parents[2]
FAULTS = [*PYTHON, *CPU, *THREADS, *CUDA]


def test_there_are_many_and_each_has_a_name():
    assert len(FAULTS) >= 60
    names = Counter((fault.path, fault.name) for fault in FAULTS)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", sorted({fault.path for fault in FAULTS}))
def test_a_fault_replaces_one_piece_of_text(path):
    text = (ROOT / path).read_text()
    for fault in FAULTS:
        if fault.path == path:
            assert text.count(fault.old) == 1, fault.name
            assert fault.new != fault.old, fault.name


def test_the_tests_that_catch_them_exist():
    named = {name for fault in FAULTS for name in fault.tests.split()}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
