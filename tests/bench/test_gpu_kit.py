"""The kit for a GPU, as far as it goes without one: arguments, counts, reports, refusals."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from performer import _build_info, _core
from performer.bench.implementations import torch_kernels

ROOT = Path(__file__).parents[2]
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]
sys.path += FOLDERS
import run as kit  # noqa: E402

import gpu as benchmark  # noqa: E402
from gpukit import cases, kernels, report  # noqa: E402
from gpukit.implementations import IMPLEMENTATIONS, compose  # noqa: E402

for _folder in FOLDERS:
    sys.path.remove(_folder)

needs_kernels = pytest.mark.skipif(
    not _core.HAS_GPU_KERNELS, reason=f"no GPU kernels: {_build_info.CUDA_LEFT_OUT}"
)
no_gpu = pytest.mark.skipif(not torch_kernels.missing(), reason="there is a GPU")


def test_operations_are_those_of_the_page():
    tokens = 4 * 16 * 16384
    forward = cases.GpuCase(False, cases.FORWARD, 16384)
    assert forward.operations() == tokens * 8 * 256 * 64
    assert cases.GpuCase(True, cases.FORWARD, 16384).operations() == tokens * (
        8 * 256 * 64 + 64 * (256 + 64)
    )
    assert cases.GpuCase(False, cases.BACKWARD, 16384).operations() == 2.5 * forward.operations()
    window = cases.GpuCase(False, cases.FORWARD, 16384, window=64)
    assert window.operations() == tokens * (8 * 256 * 64 + 12 * 64 * 64)
    assert forward.exact_operations() == 4 * 16 * 4 * 16384**2 * 64
    assert forward.bytes_moved() == tokens * 64 * 4 * 2
    page = (ROOT / "docs" / "gpu.md").read_text()
    for case in (forward, window):
        assert f"{case.operations() / tokens / 1000:.0f}k" in page


def test_the_headline_comes_first_and_nothing_twice():
    plan, kinds = cases.plan(), len(cases.GOALS)
    assert {(c.causal, c.part) for c in plan[:kinds]} == set(cases.GOALS)
    assert all((c.length, c.dim, c.features) == (16384, 64, 256) for c in plan[:kinds])
    # One of the settings with a window, too.
    assert len(plan) == len(set(plan)) == kinds * len(cases.LENGTHS) * (len(cases.SETTINGS) + 1)
    assert cases.headline()[:kinds] == plan[:kinds] and set(cases.headline()) <= set(plan)
    assert {c.window for c in cases.headline()} == {0, cases.WINDOW}


def measured():
    """A run in which Performer meets its goals, and is overtaken below 1024."""
    records = []
    for case in cases.plan((512, 2048, 16384), cases.SETTINGS[:2]):
        for impl in IMPLEMENTATIONS:
            record = {
                "causal": case.causal,
                "part": case.part,
                "length": case.length,
                "dim": case.dim,
                "features": case.features,
                "implementation": impl,
                "batch": case.batch,
                "heads": case.heads,
                "window": case.window,
            }
            if impl == "composition" and case.length == 16384:
                records.append({**record, "left_out": "composition in torch: out of memory"})
                continue
            time = {"performer": case.length, "flash": case.length**2 / 1024}.get(impl, 1e5) / 4e4
            records.append({**record, "median": time, "minimum": time, "repeats": 9, "graph": True})
    machine = {"GPU": "a GPU", "driver": "1.2", "torch": "2", "date": "2026-01-01"}
    return {"machine": machine, "rates": {"product": 800.0, "copy": 3000.0}, "records": records}


def test_the_report_says_what_was_measured_and_what_follows(tmp_path):
    run = measured()
    files = report.write(run, tmp_path)
    assert [f.name for f in files] == ["gpu.json", "gpu.md", "gpu.png"]
    assert json.loads(files[0].read_text()) == run
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    text = files[1].read_text()
    assert "goal 0.46 ms (reached)" in text
    assert (
        "bidirectional, forward, D = 64, M = 128: faster than flash attention from L = 1024" in text
    )
    assert "left out, 12 measurements: composition in torch: out of memory" in text
    assert "800 TFLOP/s" in text
    rows = report.table(run).rows
    assert all(len(row) == len(report.COLUMNS) for row in rows)
    row = next(r for r in rows if r[:4] == ("causal, forward", "256", "64", "2048"))
    ours = 2048 / 4e4
    rate = cases.GpuCase(True, cases.FORWARD, 2048).operations() / ours / 1e9
    assert row[4] == f"{ours:.3f}"
    assert row[7:9] == (f"{rate:.0f}", f"{rate / 800:.2f}")
    assert row[10] == "2.00"


def test_an_empty_run_has_a_report_and_no_plot(tmp_path):
    run = {**measured(), "records": []}
    assert [f.name for f in report.write(run, tmp_path)] == ["gpu.json", "gpu.md"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 64])
def test_the_composition_is_the_reference(causal, window):
    torch = pytest.importorskip("torch")
    from performer import reference

    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 512, 2, 16)) for _ in range(3))
    projection = rng.normal(size=(24, 16))
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)]
    out = compose(*heads_first, torch.from_numpy(projection), causal, window).transpose(1, 2)
    form, options = reference.attention, {}
    if window:
        form, options = reference.near_far_attention, {"exact_window": window}
    wanted, *_ = form(
        query=query,
        key=key,
        value=value,
        query_projection=projection[None],
        key_projection=projection[None],
        feature_bias=np.zeros((1, 24)),
        key_bias=np.zeros((1, 1, 1)),
        causal=causal,
        offsets=None,
        initial_state=None,
        **options,
    )
    np.testing.assert_allclose(out.numpy(), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "512", "100"], "--lengths must be multiples of 256; got 100"),
        (["--seconds", "0"], "--seconds must be positive; got 0"),
    ],
)
def test_wrong_arguments_of_the_benchmark_are_named(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


@no_gpu
def test_without_a_gpu_the_commands_say_so(capsys, tmp_path):
    assert benchmark.main(["--output", str(tmp_path)]) == 3
    assert "nothing to measure: " in capsys.readouterr().err
    if kit.compute_capability() is None:
        assert kit.main(["--output", str(tmp_path)]) == 3
        assert "no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_of_the_kit_are_named(capsys):
    assert kit.main(["--minutes", "-1"]) == 2
    assert "--minutes must be positive; got -1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        kit.main(["--only", "dance"])
    assert stopped.value.code == 2


def test_the_kit_plans_every_tool_and_keeps_to_its_time(tmp_path):
    def planned(step, left):
        return kit.STEPS[step]("90", tmp_path, left)

    tools = [c.arguments[2] for c in planned("sanitize", 400).commands]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    (table,) = planned("table", 100).commands
    assert table.arguments[table.arguments.index("--seconds") + 1] == "100"
    configure = planned("build", 400).commands[0]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in configure.arguments
    assert "-DCMAKE_CUDA_FLAGS=-lineinfo" in configure.arguments
    for step in kit.STEPS:
        assert all(c.seconds <= 400 for c in planned(step, 400).commands)


def test_each_test_of_kernels_is_in_one_process_of_the_kit():
    """By the type in its name."""
    names = ["test_a[float32-causal]", "test_b[bfloat16-x]", "test_c[float16]", "test_d"]
    for name in names:
        taken = [t for t, chosen in kit.TYPES.items() if eval(_as_python(chosen), {"name": name})]
        assert len(taken) == 1, name


def _as_python(chosen: str) -> str:
    """pytest's -k as an expression of `name`."""
    return " ".join(
        word if word in ("and", "not", "or") else f"('{word}' in name)" for word in chosen.split()
    )


# What stands for every program of the rehearsal: it notes how it was called. One process of the
# tests meets an error that stays, and the table has a wrong result.
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >>"{calls}"
case "$*" in
  *compute_cap*) echo 9.0 ;;
  *clocks.sm*) echo "timestamp, clocks"; sleep 60 & wait ;;
  *"float16 and not"*) exit 86 ;;
  *--headline* | *--once*) ;;
  *gpu.py*) exit 1 ;;
esac
"""


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    """The folder and the calls of a kit whose programs, the driver's included, are replaced."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("nvidia-smi", "cmake", "ninja", "compute-sanitizer", "ncu", "python"):
        (programs / name).write_text(PROGRAM.format(calls=calls))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(kit.sys, "executable", str(programs / "python"))
    monkeypatch.setattr(kit, "NEEDED", ())
    monkeypatch.setattr(kit, "BUILDS", tmp_path / "builds")
    return tmp_path / "out", calls


def test_the_kit_rehearsed_runs_its_steps_in_order_and_packs_what_they_found(rehearsal, capsys):
    output, calls = rehearsal
    assert kit.main(["--output", str(output)]) == 2
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary) == list(kit.STEPS)
    failed = {step for step, outcome in summary.items() if kit.is_failure(outcome)}
    assert failed == {"tests", "table"}
    assert "tests-float16: ended at an error of the GPU that stays" in summary["tests"]
    assert "table: exit status 1" in summary["table"]
    asked = calls.read_text()
    order = ["--build", "test_ptx.py", "--headline", "test_kernels.py", "--tool memcheck"]
    order += ["--seconds 240", "ncu --csv", "--name splits-of-512", "PERFORMER_SPLIT_ROWS=2048"]
    places = [asked.index(word) for word in order]
    assert places == sorted(places)
    with tarfile.open(output / kit.ARCHIVE) as packed:
        names = {Path(name).name for name in packed.getnames()}
    assert {"summary.json", "clocks.csv", "ptx.log", "racecheck.log", "headline.log"} <= names
    assert "timestamp" in (output / "clocks.csv").read_text()
    assert "2 failed" in capsys.readouterr().out


def test_a_build_that_fails_ends_the_kit(rehearsal, monkeypatch):
    output, calls = rehearsal
    (calls.parent / "bin" / "cmake").write_text("#!/bin/sh\nexit 2\n")
    assert kit.main(["--output", str(output)]) == 1
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary) == ["build"]
    assert "configure-default: exit status 2" in summary["build"]


def test_tests_end_at_the_first_error_of_the_gpu_that_stays(tmp_path):
    (tmp_path / "test_it.py").write_text(
        """
import sys, types


def broken(*args, **kwargs):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_right():
    pass


def test_wrong():
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=broken)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, zeros=broken)
    assert False


def test_after():
    pass
"""
    )
    options = ["-p", "conftest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests" / "gpu")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == kit.STICKY, found.stdout + found.stderr
    assert "1 failed, 1 passed" in found.stdout
    assert "an illegal memory access" in found.stdout


def test_results_slightly_off_are_timed_and_marked(tmp_path):
    run = measured()
    record = run["records"][0]
    record.update(error=5e-3, off=True)
    text = report.write(run, tmp_path)[1].read_text()
    assert f"{record['median']:.3f} (off)" in text
    assert "Performer is off: bidirectional, forward, L = 16384" in text
    assert "error 5.0e-03" in text


def test_the_headline_reports_kernels_and_ceilings(tmp_path):
    class Event:
        key = "void performer::cuda::ReadKernel<performer::BFloat16, 64>(performer::cuda::P<x>)"
        count, self_device_time_total = 20, 5000.0

    run = {**measured(), "ceilings": {"ex2, T/s": 4.25}}
    run["kernels"] = [{"case": "a case", **row} for row in kernels.rows([Event()], 10)]
    text = report.write(run, tmp_path, "headline")[1].read_text()
    assert "| a case | ReadKernel<BFloat16, 64> | 2 | 500.0 |" in text
    assert "ex2, T/s: 4.25" in text


def test_the_kit_reports_failures_and_stops_what_hangs(tmp_path):
    def outcome(code, seconds):
        command = kit.Command("c", (sys.executable, "-c", code), seconds)
        return kit.finish(kit.start(command, tmp_path), command)

    assert outcome("pass", 60) == "passed"
    assert outcome("raise SystemExit(9)", 60) == "exit status 9"
    assert outcome("import time; time.sleep(60)", 0.2) == "stopped after 0 s"


@pytest.mark.slow
def test_a_required_gpu_that_is_not_there_is_a_failure():
    if not torch_kernels.missing():
        pytest.skip("there is a GPU")
    environment = {
        **os.environ,
        "PERFORMER_REQUIRE_GPU": "1",
        "PERFORMER_DISABLE_LIBRARY": "1",
    }
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "PERFORMER_REQUIRE_GPU is set" in found.stdout


INPUTS = {
    "key": (256, (1, 8, 2, 16), "float32"),
    "value": (256, (1, 8, 2, 16), "float32"),
    "key_projection": (256, (1, 32, 16), "float32"),
    "key_bias": (256, (1, 1, 1), "float32"),
    "offsets": (0, (1,), "int64"),
}


def summarize(inputs=INPUTS, allocate=lambda size: 256, **options):
    """A call with addresses of nothing: it must end before it looks there."""
    make_output = lambda shape, dtype: (io.BytesIO(), 256)  # noqa: E731
    return _core.run_on_gpu("Summarize", inputs, make_output, allocate, stream=0, **options)


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": None}, "inputs must have 'key'"),
        ({"key": (256, (1, 8, 2), "float32")}, "key must have"),
        (
            {"value": (256, (1, 8, 2, 16), "bfloat16")},
            "value must have dtype float32; got bfloat16",
        ),
        ({"key": (256, (1, 8, 2, 16), "float64")}, "value must have dtype float64"),
        (
            {
                "key": (256, (1, 8, 2, 200), "float32"),
                "key_projection": (256, (1, 32, 200), "float32"),
            },
            "key dimension D must be at most 128",
        ),
        (
            {
                "key": (256, (1, 8, 65536, 16), "float32"),
                "value": (256, (1, 8, 65536, 16), "float32"),
            },
            "number of key and value heads G must be at most 65535 on a GPU; got 65536",
        ),
        ({"key": (256, (1, -1, 2, 16), "float32")}, r"key must have .* at least 0; got .*1, -1, 2"),
        ({"offsets": (0, (-1,), "int64")}, r"offsets must have .* at least 0; got .*-1"),
    ],
)
def test_wrong_calls_on_device_memory_are_refused(changes, message):
    inputs = {name: x for name, x in {**INPUTS, **changes}.items() if x is not None}
    with pytest.raises(ValueError, match=message):
        summarize(inputs)


@needs_kernels
def test_unknown_options_of_calls_on_device_memory_are_refused():
    with pytest.raises(ValueError, match="feature_map"):
        summarize(feature_map="cosine")


@needs_kernels
def test_a_gpu_without_memory_is_a_memory_error():
    with pytest.raises(MemoryError, match="out of GPU memory"):
        summarize(allocate=lambda size: 0)


@needs_kernels
def test_memory_that_the_kernels_cannot_use_is_refused():
    with pytest.raises(RuntimeError, match=r"GPU memory must be aligned to 16 bytes; .*gave 264"):
        summarize(allocate=lambda size: 264)


@needs_kernels
@no_gpu
def test_without_a_driver_a_call_says_so_and_names_what_is_needed():
    with pytest.raises(RuntimeError, match=r"CUDA: .*driver"):
        summarize()
    with pytest.raises(RuntimeError, match="CUDA: counting devices"):
        _core.gpus()


def test_the_build_says_what_it_chose_and_why():
    built = bool(_build_info.CUDA_COMPILER)
    assert built == _core.HAS_GPU_KERNELS
    assert built != bool(_build_info.CUDA_LEFT_OUT)
    if built:
        assert any(target.startswith("compute_") for target in _build_info.CUDA_TARGETS)
