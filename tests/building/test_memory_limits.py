"""Where the system gives no more memory a call ends with an error, and the next one is right.

`limits.py` tries more limits, and the operators of TensorFlow, which take longer.
"""

import pytest

from building.limits import CORE, attempt, faults


def test_the_core_refuses_what_has_no_memory():
    pytest.importorskip("performer._core")
    found = attempt(CORE, [0, *(1 << i for i in range(18, 31, 2))])
    assert faults(found) == []


GOOD = {1: "refused: out of memory", 2: "refused: OOM", 3: "refused: out of memory", 4: "right"}
CRASH = """died with status 139: Fatal Python error: Segmentation fault

Current thread 0x00007ff02c3d1b80 (most recent call first):
  File "{}", line 3620 in fill
  File "/site-packages/tensorflow/python/ops/gen_array_ops.py", line 7 in call
"""
OURS = CRASH.format("<string>")
OF_TENSORFLOW = CRASH.format("/site-packages/tensorflow/python/ops/gen_array_ops.py")


def test_crashes_and_other_words_are_faults():
    assert faults(GOOD) == []
    bad = [
        "wrong",
        "died with status 6: ",
        "ValueError: no",
        "refused: no",
        CRASH.format("<string>"),
    ]
    for said in bad:
        assert faults({**GOOD, 5: said}) == [f"5 bytes: {said}"]
    assert len(faults({1: "right"})) == 1


def test_ends_by_tensorflow_itself_are_not():
    for said in ("died with status 6: [low_level_alloc.cc : 599] RAW: mmap", OF_TENSORFLOW):
        assert faults({**GOOD, 5: said}) == []
        assert faults({**GOOD, 5: said.replace("died", "wrong")}) != []
