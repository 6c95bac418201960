"""Whether the GPU kernels are built, with which compiler, and what the build says about it."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")


@pytest.fixture
def requirements(monkeypatch, tmp_path):
    """tools/cuda_requirements.py on a system without CUDA."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    module = importlib.import_module("cuda_requirements")
    for name in ("PERFORMER_CUDA", "CUDACXX", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("os.access", lambda path, mode: str(path).startswith(str(tmp_path)))
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
    nvcc = toolkit(tmp_path / "cuda", compiles=False)
    for name, value in (
        ("CUDA_HOME", nvcc.parents[1]),
        ("CUDA_PATH", nvcc.parents[1]),
        ("PATH", nvcc.parent),
    ):
        monkeypatch.setenv(name, str(value))
        assert requirements.needed() == []
        monkeypatch.setenv(name, "")
    assert requirements.needed() != []
    monkeypatch.setenv("CUDACXX", "/opt/nvcc")
    assert requirements.needed() == []


def decide(wish, *arguments, **environment):
    """Runs the decision alone; the exit status and what it said."""
    found = subprocess.run(
        [CMAKE, f"-DPERFORMER_CUDA={wish}", *arguments, "-P", ROOT / "cmake" / "cuda.cmake"],
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
def test_they_are_built_unasked_only_where_a_gpu_is(tmp_path):
    nvcc = toolkit(tmp_path / "cuda", compiles=False, version="11.5")
    given = [f"-Dperformer_gpu_signs={tmp_path}/driver", f"-Dsystem_nvcc={nvcc}"]
    too_old = "nvcc must be 11.8 or later"
    code, said = decide("AUTO", *given)
    assert code == 0
    assert "left out; no NVIDIA GPU is here; PERFORMER_CUDA=ON builds them" in said
    assert too_old in decide("ON", *given)[1]
    (tmp_path / "driver").touch()
    assert too_old in decide("AUTO", *given)[1]


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


def toolkit(folder, compiles, version="12.4", says="no such option"):
    """A folder like CUDA's, with an nvcc that runs; one that compiles hands on to the real one."""
    for part in ("bin", "include", "lib64"):
        (folder / part).mkdir(parents=True)
    (folder / "include" / "cuda_runtime_api.h").touch()
    (folder / "lib64" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.99" ;;
  --dryrun) echo "#$ _HERE_={folder}/bin" >&2 ;;
  *) echo '{says}' >&2; exit 1 ;;
esac
""")
    if compiles:
        nvcc.write_text(f'#!/bin/sh\nexec "{shutil.which("nvcc")}" "$@"\n')
    nvcc.chmod(0o755)
    return nvcc


def configure(folder, *arguments, languages="CXX", **environment):
    """Configures a project that decides; the exit status, what it said and its _build_info.py."""
    folder.mkdir(exist_ok=True)
    (folder / "CMakeLists.txt").write_text(f"""
cmake_minimum_required(VERSION 3.22)
project(choice LANGUAGES {languages})
include({ROOT}/cmake/cuda.cmake)
message(STATUS "enabled: ${{performer_cuda_enabled}}")
include({ROOT}/cmake/build_info.cmake)
""")
    found = subprocess.run(
        [CMAKE, "-S", folder, "-B", folder / "build", *arguments],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    info = folder / "build" / "performer" / "_build_info.py"
    values = {}
    if found.returncode == 0:
        text = info.read_text().replace("XLA = \n", "XLA = False\n")  # not set in this project
        exec(compile(text, info, "exec"), values)
    return found.returncode, " ".join((found.stdout + found.stderr).split()), values


@needs_cmake
def test_a_compiler_that_runs_and_cannot_compile_is_passed_by_or_an_error_if_asked_for(tmp_path):
    nvcc = toolkit(tmp_path / "cuda", compiles=False)
    reason = f"{nvcc} cannot compile and link a program here"
    code, said, info = configure(tmp_path / "auto", CUDACXX=str(nvcc))
    assert code == 0, said
    assert f"left out; {reason}" in said
    assert "enabled: OFF" in said
    assert info["CUDA_LEFT_OUT"] == reason
    again = configure(tmp_path / "auto", CUDACXX=str(nvcc))
    assert again[0] == 0
    assert f"left out; {reason}" in again[1]
    code, said, _ = configure(tmp_path / "on", "-DPERFORMER_CUDA=ON", CUDACXX=str(nvcc))
    assert code != 0
    assert f"PERFORMER_CUDA=ON: {reason}" in said


@needs_cmake
def test_a_compiler_that_is_too_old_is_told_from_one_that_cannot_compile(tmp_path):
    nvcc = toolkit(tmp_path / "cuda", compiles=False, version="11.5")
    code, said = decide("AUTO", CUDACXX=str(nvcc))
    assert code == 0
    assert f"left out; nvcc must be 11.8 or later; {nvcc} is 11.5" in said


@needs_cmake
def test_what_a_compiler_says_is_kept_to_the_letter(tmp_path):
    nvcc = tmp_path / "nvcc"
    words = r'"""quoted""" and C:\new\table "'
    nvcc.write_text(f"#!/bin/sh\nprintf '%s' '{words}' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    code, said, info = configure(tmp_path / "project", languages="NONE", CUDACXX=str(nvcc))
    assert code == 0, said
    assert info["CUDA_LEFT_OUT"] == f"{nvcc} does not run: {words}"


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_compiler_that_has_moved_is_found_and_one_named_to_cmake_stays_named(tmp_path):
    project = tmp_path / "project"
    wish = ("-DPERFORMER_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90")

    def uses(nvcc, *arguments, **environment):
        code, said, info = configure(project, *wish, *arguments, **environment)
        assert code == 0, said
        assert "enabled: ON" in said
        assert f" {nvcc}," in said
        assert info["CUDA_COMPILER"].endswith("(system)")

    for place in ("first", "second"):
        nvcc = toolkit(tmp_path / place, compiles=True)
        uses(nvcc, CUDACXX=str(nvcc))
        assert "CMAKE_CUDA_COMPILER:" not in (project / "build" / "CMakeCache.txt").read_text()
        if place == "first":
            shutil.rmtree(tmp_path / place)
    uses(nvcc, f"-DCMAKE_CUDA_COMPILER={nvcc}")
    uses(nvcc)
