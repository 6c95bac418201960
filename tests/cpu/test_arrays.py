"""What NumPy and its threads can hand to the compiled core."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from support.cases import cases
from support.compare import assert_same_bits
from support.core_calls import run
from support.inputs import DTYPES, OPS, Case, make
from support.refused_calls import good_inputs

CASE = cases(True)["less than a chunk, holes, a projection for each head"]


def assert_all_same(results, wanted, what):
    for name, result in results.items():
        assert_same_bits(result, wanted[name], what=f"{name}, {what}")


def test_inputs_that_are_not_contiguous_are_read_right():
    x = make(CASE)
    strided = {name: np.repeat(a, 2, -1)[..., ::2] for name, a in x.items()}
    strided["query"] = np.asfortranarray(x["query"])
    wanted = run("Causal", x, **CASE.options)
    assert_all_same(run("Causal", strided, **CASE.options), wanted, "strided")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_addresses_that_are_no_multiple_of_their_size_are_read_right(op, dtype):
    x = good_inputs(dtype=dtype)
    odd = {}
    for name, array in x.items():
        room = np.zeros(array.nbytes + 1, np.uint8)
        room[1:] = np.frombuffer(array.tobytes(), np.uint8)
        odd[name] = np.ndarray(array.shape, array.dtype, room.data, 1)
        assert odd[name].flags.c_contiguous
        assert not odd[name].flags.aligned
    assert_all_same(run(op, odd), run(op, x), "misaligned")


def test_numbers_of_the_other_byte_order_are_refused():
    x = good_inputs()
    for name, swapped in (("key", ">f4"), ("offsets", ">i8")):
        with pytest.raises(ValueError, match=f"{name} must have dtype .*; got {swapped}"):
            run("Summarize", {**x, name: x[name].astype(swapped)})


def test_offsets_that_another_thread_writes_during_the_call_change_nothing():
    """They are 0, 2, 5 or 0, 3, 5 when they are copied, and what comes later is not seen."""
    case = Case(batch=1, rows=5, offsets=(0, 2, 5), state=2, features=64)
    x, stop = make(case), threading.Event()
    wanted = []
    for cut in (2, 3):
        x["offsets"][1] = cut
        wanted.append({n: a.tobytes() for n, a in run("Causal", x, packed=True).items()})

    def write():
        while not stop.is_set():
            for cut in (2, 3) * 50:
                x["offsets"][1] = cut

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            got = {n: a.tobytes() for n, a in run("Causal", x, packed=True).items()}
            assert got in wanted
    finally:
        stop.set()
        writer.join()


EXIT = """
import sys, threading, time
sys.modules["tensorflow"] = None  # it would take seconds
import numpy as np
from performer import _core
x = np.zeros((1, {rows}, 1, 8), np.float32)
inputs = {{"key": x, "value": x, "key_projection": np.zeros((1, 64, 8), np.float32),
          "key_bias": np.zeros((1, 1, 1), np.float32), "offsets": np.zeros(1, np.int64)}}
def work():
    while True:
        _core.run("Summarize", inputs, threads=2)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.1)
"""


@pytest.mark.parametrize("rows", [1, 20000])
def test_the_interpreter_ends_while_threads_are_in_the_core(rows):
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(rows=rows)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
