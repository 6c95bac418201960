"""The compiled core against the reference: every instruction set, type, shape and option."""

from functools import partial

import numpy as np
import pytest

from support.cases import cases, parameters
from support.core_calls import _core, forward, isas, run
from support.inputs import DTYPES, OPS, cotangents, make
from support.promises import check_results


@isas
@pytest.mark.parametrize(("causal", "name", "dtype"), parameters())
def test_results_are_those_of_the_reference(causal, name, dtype, isa):
    check_results(partial(run, isa=isa), cases(causal)[name], causal, dtype)


@isas
def test_a_state_without_keys_reads_as_zero(isa):
    case = cases(False)["no keys"]
    out = forward(make(case), causal=False, isa=isa)["out"]
    assert not out.any()
    assert not np.signbit(out).any()


def test_the_core_names_its_instruction_sets():
    assert _core.isa() in _core.isas()
    assert len(set(_core.isas())) == len(_core.isas()) >= 1
    with pytest.raises(ValueError, match=r"isa.*z80"):
        _core.exp2(np.zeros(16, np.float32), isa="z80")


def ulps(got, exact):
    """Error in units of the last place of the exact value, rounded to float32."""
    spacing = np.spacing(np.abs(exact).astype(got.dtype)).astype(np.float64)
    return np.abs(got.astype(np.float64) - exact) / spacing


@isas
def test_exp2_of_float32_has_the_stated_error(isa):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.uniform(-125.5, 127, 60000), np.arange(-125, 127), rng.normal(size=748)]
    )
    x = x[: len(x) // 16 * 16].astype(np.float32)
    assert ulps(_core.exp2(x, isa=isa), np.exp2(x.astype(np.float64))).max() <= 1.2


@isas
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_of_special_values(isa, dtype):
    x = np.full(16, 0, dtype)
    x[:6] = [-np.inf, -1e30 if dtype == np.float32 else -1e5, 1e5, np.inf, np.nan, -1100]
    result = _core.exp2(x, isa=isa)
    assert result.dtype == dtype
    assert np.array_equal(result, [0, 0, np.inf, np.inf, np.nan, 0] + [1] * 10, equal_nan=True)
    near = np.linspace(-160, -126, 160).astype(dtype)
    low = _core.exp2(near, isa=isa)
    assert np.all((low >= 0) & (low <= 2.0**-125.9))
    if dtype == np.float32:
        assert not low[near < -150].any()
    assert np.all(np.isposinf(_core.exp2(np.full(16, 1024.5, dtype), isa=isa)))


@isas
def test_log2_of_float32_has_the_stated_error(isa):
    rng = np.random.default_rng(1)
    wide = np.exp2(rng.uniform(-149, 128, 60000))
    near = 1 + rng.uniform(-0.3, 0.4, 8000)
    x = np.concatenate([wide, near, 2.0 ** np.arange(-149, 128)]).astype(np.float32)
    x = x[np.isfinite(x) & (x > 0)]
    x = x[: len(x) // 16 * 16]
    got, exact = _core.log2(x, isa=isa), np.log2(x.astype(np.float64))
    assert np.all((ulps(got, exact) <= 2) | (np.abs(got - exact) <= 1.2e-7))


@isas
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log2_of_special_values(isa, dtype):
    x = np.array([0, np.inf, np.nan, 1, 2, 0.5, np.finfo(dtype).tiny, np.finfo(dtype).max] * 2)
    result = _core.log2(x.astype(dtype), isa=isa)
    assert result.dtype == dtype
    exact = [-np.inf, np.inf, np.nan, 0, 1, -1, np.log2(np.finfo(dtype).tiny)]
    assert np.array_equal(result[:7], np.array(exact, dtype), equal_nan=True)
    assert result[7] == np.log2(dtype(np.finfo(dtype).max))


@isas
def test_float64_functions_have_the_error_of_the_c_library(isa):
    x = np.random.default_rng(2).uniform(-1000, 1000, 1600)
    assert ulps(_core.exp2(x, isa=isa), np.exp2(x)).max() <= 2
    assert ulps(_core.log2(np.abs(x), isa=isa), np.log2(np.abs(x))).max() <= 2


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_signature_is_what_a_call_takes_and_gives(op, dtype):
    case = cases(True)["less than a chunk, holes, a projection for each head"]
    x = {**make(case, dtype), **cotangents(case, dtype)}
    x.update(run("NearFar", x) | forward(x, causal=True))
    signature, wide = _core.signature(op), "float64" if dtype == "float64" else "float32"
    types = {"T": DTYPES[dtype], "U": np.dtype(wide), "int64": np.dtype(np.int64)}
    for name, kind, _ in signature["inputs"]:
        assert x[name].dtype == types[kind], name
    results = run(op, x)
    assert list(results) == [name for name, *_ in signature["outputs"]]
    sizes = {"B": case.batch, "N": case.batch, "H": case.heads, "G": case.groups, "L": case.rows}
    sizes |= {"D": case.dim, "E": case.value_dim, "M": case.features}
    for name, kind, shape in signature["outputs"]:
        assert results[name].dtype == types[kind], name
        same = shape.removeprefix("=")  # a gradient has the shape of its input
        wanted = x[same].shape if same in x else tuple(sizes[axis] for axis in shape.split())
        assert results[name].shape == wanted, name


def test_an_unknown_operator_has_no_signature():
    with pytest.raises(ValueError, match="Attend"):
        _core.signature("Attend")
