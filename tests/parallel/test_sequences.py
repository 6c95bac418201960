"""Sequences in parts: what replicas compute together is what one process computes alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "support" / "parts_of_sequences.py"
REFUSALS = {
    "no mesh": ("ValueError", "mesh must be given where no scope"),
    "not in a replica": ("RuntimeError", "call this in a function that strategy.run runs"),
    "no strategy": ("ValueError", "strategy must be given"),
    "not a strategy": ("TypeError", "strategy must be a tf.distribute.MirroredStrategy"),
    "sequence": ("ValueError", "sequence must divide the 2 replicas of the strategy, got 3"),
    "lengths": ("ValueError", "lengths must have one entry for each of the 2 parts"),
    "timeout": ("ValueError", "timeout must be"),
    "an uneven part": ("ValueError", "must have a length that is a multiple of the 2 parts"),
    "another length": ("ValueError", "100 of lengths=[100, 156], got 99"),
    "exact keys": ("ValueError", "exact_keys is not there for sequences in parts"),
    "an unknown option": ("TypeError", "has no argument 'chunk'"),
    "a part of a block": ("ValueError", "a multiple of exact_window=64, got 100"),
    "no mesh for a scope": ("TypeError", "mesh must be a performer.parallel.Mesh, got str"),
    "eager": ("RuntimeError", "run them by `performer.parallel.Mesh.function`"),
    "parts of two lengths": ("InvalidArgumentError", "parts of a sequence must have the same"),
    "quadratic": ("ValueError", "cannot be had in the scope of `performer.parallel.sequence`"),
}


def run(which):
    out = subprocess.run(
        [sys.executable, PROGRAM, which], capture_output=True, text=True, timeout=500
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.rpartition("RESULT ")[2])


@pytest.fixture(scope="module")
def few():
    return run("few")


@pytest.fixture(scope="module")
def many():
    return run("many")


def test_parts_give_outputs_gradients_and_states_of_the_whole(few):
    errors = {**few["functions"], **few["uneven"], **few["layers"]}
    assert len(errors) == 5
    assert {name: error for name, error in errors.items() if not error < 1e-12} == {}


def test_what_is_exchanged_does_not_depend_on_the_length(few):
    short, long = few["traffic"]
    # Two replicas, each of which gives one tensor to a gather, and two to its gradient.
    assert [kind for kind, _ in short] == ["CollectiveAllToAllV2"] * 2 + ["CollectiveGatherV2"] * 2
    assert short == long


def test_no_gradient_of_a_slice_grows_with_the_length(few):
    (short, long), (causal_short, causal_long) = few["slices"]
    assert short == long
    # But for those of key and value where nobody asks for the keys, which are zeros.
    assert causal_short[:-2] == causal_long[:-2]


@pytest.mark.parametrize("call", REFUSALS)
def test_wrong_calls_are_refused_by_name(few, call):
    kind, words = REFUSALS[call]
    assert few["refusals"][call].startswith(kind)
    assert words in few["refusals"][call]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["functions", "uneven", "layers", "uneven layers", "of four"])
def test_all_kinds_of_calls_in_parts_are_those_of_the_whole(many, which):
    assert {name: error for name, error in many[which].items() if not error < 1e-12} == {}


@pytest.mark.slow
def test_windows_and_all_keys_exchange_the_same_for_every_length(many):
    assert all(short == long for short, long in many["traffic"])


@pytest.mark.slow
def test_replicas_are_rows_of_parts(many):
    assert many["rows"] == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.slow
def test_the_number_of_parts_changes_rounding_only(many):
    assert all(error < 5e-6 for errors in many["float32"] for error in errors.values())
