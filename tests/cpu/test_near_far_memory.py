"""The memory of near-and-far attention, in a process that has made no call before."""

import json
import subprocess
import sys

import pytest

from support.inputs import forms

MIB = 1 << 20
ROWS, DIM, FEATURES, WINDOW = 8192, 64, 256, 64
RISE = """
import json, sys
sys.modules["tensorflow"] = None  # not installed, as far as the package can tell
import numpy as np
from performer.bench.memory import peak
from support.core_calls import run
from support.inputs import Case, cotangents, make

rows, dim, features, window, heads, threads, causal, backward = json.loads(sys.argv[1])
case = Case(
    batch=1, rows=rows, heads=heads, groups=heads, dim=dim, value_dim=dim, features=features
)
options = {"exact_window": window, "causal": causal, "threads": threads}
x = make(case)
short = {n: a[:, :window] if a.shape[1:2] == (rows,) else a for n, a in x.items()}

def prepare():
    results = run("NearFar", short if not backward else x, **options)  # loads the code
    if not backward:
        return lambda: run("NearFar", x, **options)
    given = {**x, **results, **cotangents(case)}
    return lambda: run("NearFarGrad", given, **options)

print(peak(prepare))
"""


def rise(heads, threads, causal, backward):
    """Bytes by which the resident memory rises in a call, its results included."""
    sizes = [ROWS, DIM, FEATURES, WINDOW, heads, threads, causal, backward]
    done = subprocess.run(
        [sys.executable, "-c", RISE, json.dumps(sizes)],
        capture_output=True,
        text=True,
        cwd="tests",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout) * MIB


@forms
@pytest.mark.parametrize(("heads", "threads"), [(1, 1), (1, 4), (4, 2)])
def test_scratch_memory_is_at_most_twice_the_size_of_the_values(causal, heads, threads):
    """The states of all blocks would take four times that of the values of each head."""
    values = 4 * ROWS * heads * DIM
    fixed = MIB  # packed projections, the final state, stacks
    assert rise(heads, threads, causal, False) < values + 2 * values + fixed


@forms
@pytest.mark.parametrize(("heads", "threads"), [(1, 1), (4, 2)])
def test_that_of_gradients_is_at_most_twice_the_size_of_keys_and_values(causal, heads, threads):
    values = 4 * ROWS * heads * DIM
    fixed = MIB * (1 + heads)  # and gradients of the projection of each head
    assert rise(heads, threads, causal, True) < 3 * values + 2 * (2 * values) + fixed
