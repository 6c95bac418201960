"""Every barrier and every wait of the kernels is needed: left out, one at a time, it is noticed, as
an error, as other numbers, or as a data race."""

import re
from functools import cache
from pathlib import Path

import pytest

from support.compare import assert_same_bits
from support.emulated_calls import emulated, needs_race_detector
from support.emulated_kernels import EVERY_CALL, call, inputs

SOURCES = Path(__file__).parents[2] / "cc" / "cuda"
MARK = re.compile(r"__syncthreads\(\)|__syncwarp\(\)|CpAsyncWait<")


def written_sites():
    """Barriers and waits in the sources, as "folder/file:line" below cc/cuda."""
    return [
        f"{source.relative_to(SOURCES).as_posix()}:{number}"
        for source in sorted(SOURCES.rglob("*.cuh"))
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if MARK.search(line.split("//")[0])
    ]


@cache
def reached():
    """By site: its name for the emulator, and the calls that pass it, the short ones first."""
    passed = {}
    for name, op in EVERY_CALL:
        x = inputs(name, op)
        emulated.reset_sites()
        emulated.reset_counters()
        results = call(name, op, x)
        work = emulated.counters()["mma"]
        for site in emulated.sites():
            at = site.rpartition("cc/cuda/")[2]
            passed.setdefault(at, []).append((work, (site, name, op, x, results)))
    return {
        site: [arguments for _, arguments in sorted(calls, key=lambda entry: entry[0])]
        for site, calls in passed.items()
    }


def notices(site, name, op, x, results):
    emulated.reset_races()
    try:
        changed = call(name, op, x, skip=site)
        for name, result in results.items():
            assert_same_bits(changed[name], result)
    except (RuntimeError, AssertionError):
        return True
    return emulated.races()[0] > 0


def test_the_sources_have_barriers_and_waits():
    assert len(written_sites()) > 40


@needs_race_detector
@pytest.mark.parametrize("site", written_sites())
def test_a_barrier_or_wait_left_out_is_noticed(site):
    calls = reached().get(site)
    assert calls, f"no call passes {site}"
    noticed = any(notices(*arguments) for arguments in calls)
    emulated.reset_races()
    assert noticed
