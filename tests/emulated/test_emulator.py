"""The emulator finds the mistakes that are planted for it, and nothing where there are none."""

import subprocess
import sys

import numpy as np
import pytest

from support.emulated_calls import emulated, needs_race_detector

X = np.random.default_rng(0).normal(size=1000).astype(np.float32)
RACES = {
    "MissingBarrier": "read after write in shared memory",
    "ReusedBuffer": "write after read in shared memory",
    "MissingSyncWarp": "read after write in shared memory",
    "BlocksRace": "write after write in global memory",
}
ERRORS = {
    "MissingWait": "",
    "DivergentBarrier": "deadlock: .*planted.cuh.* threads have ended",
    "DivergentShuffle": "deadlock: .*shfl.bfly",
    "Misaligned": "ldmatrix: row not aligned to 16 bytes .*thread 3",
}
orders = pytest.mark.parametrize("order", ["forward", "reverse", "fair", "random"])


@pytest.mark.parametrize("kernel", [*RACES, *ERRORS, "BankConflicts"])
@orders
def test_a_right_kernel_passes(kernel, order):
    emulated.reset_races()
    out = emulated.planted(kernel, X, False, order=order)
    assert np.isfinite(out[:128]).all()
    assert emulated.races()[0] == 0


@needs_race_detector
@pytest.mark.parametrize("kernel", RACES)
@orders
def test_a_race_is_found_under_every_schedule(kernel, order):
    emulated.reset_races()
    emulated.planted(kernel, X, True, order=order)
    count, report = emulated.races()
    assert count > 0
    assert RACES[kernel] in report
    emulated.reset_races()


@pytest.mark.parametrize("kernel", ["DivergentBarrier", "DivergentShuffle", "Misaligned"])
@orders
def test_a_kernel_that_cannot_go_on_is_an_error(kernel, order):
    with pytest.raises(RuntimeError, match=ERRORS[kernel]):
        emulated.planted(kernel, X, True, order=order)


def test_what_is_read_before_the_wait_is_not_there():
    right = emulated.planted("MissingWait", X, False, order="forward")
    assert np.array_equal(right[:64], X[:256:4])
    assert np.isnan(emulated.planted("MissingWait", X, True, order="forward")[:128]).all()


def test_a_missing_barrier_gives_wrong_numbers_under_some_schedule():
    wrong = 0
    for seed in range(5):
        out = emulated.planted("MissingBarrier", X, True, order="random", seed=seed)
        wrong += np.isnan(out[:128]).any()
    emulated.reset_races()
    assert wrong > 0


@pytest.mark.parametrize("bug", [False, True])
def test_bank_conflicts_are_counted(bug):
    emulated.reset_counters()
    emulated.planted("BankConflicts", X, bug, blocks=1)
    counters = emulated.counters()
    assert counters["ldmatrix"] == 2
    assert counters["ldmatrix_conflicts"] == (2 * 4 * 7 if bug else 0)


def test_other_planted_kernels_are_refused():
    with pytest.raises(ValueError, match="NoSuchKernel"):
        emulated.planted("NoSuchKernel", X, False)
    with pytest.raises(ValueError, match="order must be forward"):
        emulated.planted("Misaligned", X, False, order="sorted")


@pytest.mark.skipif(emulated.detects_addresses, reason="AddressSanitizer would end the process")
@pytest.mark.parametrize("kernel", ["BehindOutput", "BeforeOutput"])
def test_a_write_outside_of_global_memory_is_found(kernel):
    assert (emulated.planted(kernel, X, False)[:128] == 1).all()
    words = f"a kernel wrote {kernel.removesuffix('Output').lower()} a buffer of 2048 bytes"
    with pytest.raises(RuntimeError, match=words):
        emulated.planted(kernel, X, True)


@pytest.mark.skipif(not emulated.detects_addresses, reason="not built with AddressSanitizer")
@pytest.mark.parametrize("kernel", ["OutOfBounds", "BehindOutput", "BeforeOutput"])
def test_a_write_outside_of_shared_or_global_memory_ends_the_process(kernel):
    code = f"import numpy, performer_emulated as e; e.planted('{kernel}', numpy.ones(640, 'f'), "
    for bug in (False, True):
        result = subprocess.run(
            [sys.executable, "-c", f"{code}{bug})"], capture_output=True, text=True, check=False
        )
        assert (result.returncode != 0) == bug
        assert ("AddressSanitizer" in result.stderr) == bug
