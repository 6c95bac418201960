"""The PTX strings of cc/cuda/device/ptx.h, as nvcc passes them on, do what tests/gpu/test_ptx.py
asks of a GPU: the PTX of all probes is interpreted."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import performer_ptx
import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc is installed")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The PTX of the probes."""
    path = tmp_path_factory.mktemp("ptx") / "probes.ptx"
    includes = [f"-I{ROOT / folder}" for folder in ("cc", "tests")]
    options = ["-std=c++17", "-O3", "-DNDEBUG", "-arch=compute_80", "-ptx"]
    source = ROOT / "tests" / "gpu" / "probes.cu"
    subprocess.run([NVCC, *options, *includes, source, "-o", path], check=True)
    return path.read_text()


@needs_nvcc
def test_what_nvcc_makes_of_the_wrappers_passes_their_tests(ptx, tmp_path):
    path = tmp_path / "probes.ptx"
    path.write_text(ptx)
    folders = [ROOT / "tests" / "ptx", Path(performer_ptx.__file__).parent, ROOT / "python"]
    tests = str(ROOT / "tests" / "gpu" / "test_ptx.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        cwd=ROOT,
        env={
            **os.environ,
            "PERFORMER_PROBES_PTX": str(path),
            "PERFORMER_DISABLE_LIBRARY": "1",
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert "skipped" not in found.stdout


@pytest.fixture
def wrappers(tmp_path, monkeypatch):
    """The tests of the wrappers as a module, on the PTX that it is called with."""

    def load(text):
        path = tmp_path / "probes.ptx"
        path.write_text(text)
        monkeypatch.setenv("PERFORMER_PROBES_PTX", str(path))
        monkeypatch.syspath_prepend(str(ROOT / "tests" / "ptx"))
        monkeypatch.delitem(sys.modules, "performer_probes", raising=False)
        monkeypatch.setitem(
            sys.modules, "performer_probes", importlib.import_module("performer_probes")
        )
        source = ROOT / "tests" / "gpu" / "test_ptx.py"
        spec = importlib.util.spec_from_file_location("test_ptx_of_faults", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# What is changed in the PTX, to what, and the test that must see it with its arguments.
FAULTS = {
    "matrices are not transposed": (
        ("x4.trans.shared", "x4.shared"),
        lambda m: m.test_ldmatrix_gives_each_lane_its_pairs("LdMatrixX4Trans"),
    ),
    "a pair is swapped": (
        (r"(cvt.rn.bf16x2.f32\s+%r\d+), (%f\d+), (%f\d+)", r"\1, \3, \2"),
        lambda m: m.test_pairs_are_rounded_to_nearest_even("Pack<BFloat16>", ml_dtypes.bfloat16),
    ),
    "a wait lets both copies fly": (
        ("wait_group 1", "wait_group 2"),
        lambda m: m.test_cp_async_copies_or_writes_zeros_and_arrives_with_its_wait(),
    ),
    "what is not valid is copied": (
        (r"(\[%rd1\], 16), %r\d+;", r"\1, 16;"),
        lambda m: m.test_cp_async_copies_or_writes_zeros_and_arrives_with_its_wait(),
    ),
    "tf32 is cut off": (
        (r"cvt.rna.tf32.f32\s+(%r\d+), (%f\d+)", r"and.b32 \1, \2, 4294959104"),
        lambda m: m.test_tf32_is_rounded_to_nearest_ties_away_from_zero(),
    ),
    "operands of half are bfloat16": (
        ("f32.f16.f16.f32", "f32.bf16.bf16.f32"),
        lambda m: m.test_products_of_small_integers_are_exact(m.PRODUCTS[1]),
    ),
}


@needs_nvcc
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_instruction_fails_its_test(ptx, wrappers, fault):
    (pattern, change), test = FAULTS[fault]
    test(wrappers(ptx))
    wrong, count = re.subn(pattern, change, ptx)
    assert count > 0
    with pytest.raises(AssertionError):
        test(wrappers(wrong))
