"""Where the system gives no more memory a call ends with an error, and the next one is right.

`limits.py` tries more limits, and the operators of TensorFlow, which take longer.
"""

import pytest

from building.limits import CORE, attempt, faults


def test_the_core_refuses_what_has_no_memory():
    pytest.importorskip("performer._core")
    found, _ = attempt(CORE, [0, *(1 << i for i in range(18, 31, 2))])
    assert faults(found) == []


def test_crashes_and_other_words_are_faults():
    good = {1: "refused: out of memory", 2: "refused: OOM", 3: "refused: out of memory", 4: "right"}
    assert faults(good) == []
    for bad in ("wrong", "died with status 6", "ValueError: no", "refused: no"):
        assert faults({**good, 5: bad}) == [f"5 bytes: {bad}"]
    assert faults({**good, 5: "died with status 6"}, gave_up=1) == []
    assert len(faults({1: "right"})) == 1
