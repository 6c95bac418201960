"""Keys of which each outweighs all before it by far: right, and at a bounded cost."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from performer.features.tolerances import tolerances
from support.compare import assert_close
from support.core_calls import backward, expected, expected_gradients, forward, isas, run
from support.inputs import Case, cotangents, make
from support.steep_keys import KINDS, steep

CASE = Case(batch=1, rows=110, heads=4, groups=2, features=70, bias="1GS", std=0.5, state=1)


@isas
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attributes", [(), (("feature_map", "elu"),)], ids=["softmax", "elu"])
def test_results_and_gradients_are_those_of_the_reference(isa, kind, attributes):
    case = replace(CASE, attributes=attributes, state=0 if "masked" in kind else 1)
    x, incoming = steep(case, kind, "float64"), cotangents(case, "float64")
    for name, exact in expected(x, True, **case.options).items():
        actual = forward(x, True, partial(run, isa=isa), **case.options)[name]
        assert_close(actual, exact, relative=1e-10, what=name)
    grads = backward(x, incoming, True, partial(run, isa=isa), **case.options)
    for name, exact in expected_gradients(x, incoming, True, **case.options).items():
        assert_close(grads[name], exact, worst=1e-9 * max(1, np.abs(exact).max()), what=name)


@isas
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_good_as_its_log_features(isa, kind):
    """Log-features up to 5000 are rounded to 2.5e-4, so that weights are this far off."""
    x, incoming = steep(CASE, kind, "float32"), cotangents(CASE, "float32")
    wide = [
        {n: a if n == "offsets" else a.astype("f8") for n, a in y.items()} for y in (x, incoming)
    ]
    exact = forward(wide[0], True, partial(run, isa=isa))
    for name, actual in forward(x, True, partial(run, isa=isa)).items():
        assert_close(actual, exact[name], rms=5e-4, what=name)
    exact = backward(*wide, True, partial(run, isa=isa))
    for name, actual in backward(x, incoming, True, partial(run, isa=isa)).items():
        assert_close(actual, exact[name], rms=5e-4, what=name)


@isas
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rise", [20, 45, 69, 87, 95, 150])
def test_a_chunk_whose_first_key_outweighs_the_past_is_right(isa, rise, dtype):
    """A rise in nats: what all before weighs is next to nothing, no number of float32, or 0."""
    x = make(replace(CASE, rows=150), dtype)
    x["key_bias"][..., 48:] += rise  # chunks have 48 rows
    x["key_bias"][..., 60] += 25
    for name, exact in expected(x, True).items():
        actual = forward(x, True, partial(run, isa=isa))[name]
        assert_close(actual, exact, rms=tolerances(dtype, causal=True).rms, what=name)


PEAKS = """
import resource, sys
import numpy as np
from support.core_calls import run

rows, features, dim = 40_000, 256, 4
rng = np.random.default_rng(0)
x = {n: rng.normal(size=(1, rows, 1, dim)) for n in ("query", "key", "value")}
x["query_projection"] = x["key_projection"] = rng.normal(size=(1, features, dim))
x["feature_bias"] = np.zeros((1, features))
x["initial_log_mass"] = np.full((1, 1, features), -np.inf)
x["initial_mean"] = np.zeros((1, 1, features, dim))
x["grad_log_mass"], x["grad_mean"] = np.zeros((1, 1, features)), np.zeros((1, 1, features, dim))
x = {n: a.astype(np.float32) for n, a in x.items()}
x["offsets"] = np.zeros(1, np.int64)
x["out"] = x["grad_out"] = x["value"]
x["log_mass"], x["mean"] = x["grad_log_mass"], x["grad_mean"]
for rise in (0, 31):
    x["key_bias"] = (rise * np.arange(rows, dtype=np.float32))[None, None]
    run("CausalGrad", x)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_the_gradient_keeps_no_anchors_of_every_row():
    """Anchors for every row would take 40 MB; three times a chunk, less than 3."""
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, cwd="tests", check=False
    )
    assert done.returncode == 0, done.stderr
    flat, rising = (int(word) for word in done.stdout.split())
    assert rising - flat < 8 * 1024, "KiB"
