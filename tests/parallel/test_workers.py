"""Several processes on one machine, which find each other as the workers of a cluster do."""

import time

import numpy as np
import pytest

from support import workers


@pytest.fixture(scope="module")
def alone():
    codes, texts = workers.start("fit", 1)
    assert codes == [0], texts[0][-3000:]
    return workers.results(texts)[0]["data"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_fit_over_workers_is_that_of_one_in_parts_of_the_batch_and_of_the_sequence(alone, count):
    codes, texts = workers.start("fit", count)
    assert codes == [0] * count, texts[0][-3000:]
    found = workers.results(texts)
    assert all(other == found[0] for other in found)
    for values in found[0].values():
        for name, expected in alone.items():
            np.testing.assert_allclose(values[name], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_a_restart_has_the_same_bits(tmp_path):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    codes, texts = workers.start("steps", 2, folders[0], 0, 4)
    assert codes == [0, 0], texts[0][-3000:]
    expected = workers.results(texts)[0]

    begin = time.monotonic()
    codes, texts = workers.start("steps", 2, folders[1], 0, 4, 2, timeout=100)
    assert codes[1] < 0 < codes[0]
    assert "Error" in texts[0]
    assert time.monotonic() - begin < 90  # the start of the processes included

    codes, texts = workers.start("steps", 2, folders[1], 2, 4)
    assert codes == [0, 0], texts[0][-3000:]
    assert workers.results(texts)[0] == expected[2:]
