"""Whether the GPU kernels are built, with which compiler, and what the build says about it."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")


@pytest.fixture
def requirements(monkeypatch, tmp_path):
    """tools/cuda_requirements.py on a system without CUDA."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("cuda_requirements")
    for name in ("PERFORMER_CUDA", "CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.os, "access", lambda path, mode: str(path).startswith(str(tmp_path)))
    return module


@pytest.mark.parametrize("wish", ["", "OFF", "AUTO"])
def test_nothing_is_fetched_that_was_not_asked_for(requirements, monkeypatch, wish):
    monkeypatch.setenv("PERFORMER_CUDA", wish)
    assert requirements.needed() == []


@pytest.mark.parametrize("wish", ["ON", "on", "1"])
def test_a_complete_compiler_is_fetched_where_there_is_none(requirements, monkeypatch, wish):
    monkeypatch.setenv("PERFORMER_CUDA", wish)
    wheels = requirements.needed()
    assert [w.split("==")[0] for w in wheels] == [
        *("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"),
        *("nvidia-cuda-runtime", "nvidia-cuda-cccl"),
    ]
    assert len({w.split("==")[1] for w in wheels}) == 1  # parts of one release


def test_the_compiler_of_the_system_is_preferred(requirements, monkeypatch, tmp_path):
    monkeypatch.setenv("PERFORMER_CUDA", "ON")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert requirements.needed() == []
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert requirements.needed() == []


def decide(wish, **environment):
    """Runs the decision alone; the exit status and what it said."""
    found = subprocess.run(
        [CMAKE, f"-DPERFORMER_CUDA={wish}", "-P", str(ROOT / "cmake" / "cuda.cmake")],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, " ".join((found.stdout + found.stderr).split())


@needs_cmake
def test_switched_off_it_says_so():
    assert decide("OFF") == (0, "-- CUDA kernels: left out; switched off (PERFORMER_CUDA)")


@needs_cmake
def test_an_unknown_wish_is_an_error():
    code, said = decide("maybe")
    assert code != 0
    assert "PERFORMER_CUDA must be AUTO, ON or OFF; got maybe" in said


@needs_cmake
def test_a_compiler_that_does_not_run_is_passed_by_or_an_error_if_asked_for(tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    nvcc.chmod(0o755)
    code, said = decide("AUTO", CUDACXX=str(nvcc))
    assert code == 0
    assert f"left out; {nvcc} does not run: broken" in said
    code, said = decide("ON", CUDACXX=str(nvcc))
    assert code != 0
    assert "PERFORMER_CUDA=ON:" in said
