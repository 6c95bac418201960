"""The kit for a GPU, as far as it goes without one: arguments, counts, reports, refusals."""

import io
import json
import os
import subprocess
import sys
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
from gpukit import cases, report  # noqa: E402
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
    assert forward.exact_operations() == 4 * 16 * 4 * 16384**2 * 64
    assert forward.bytes_moved() == tokens * 64 * 4 * 2
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert f"{forward.operations() / tokens / 1000:.0f}k" in page


def test_the_headline_comes_first_and_nothing_twice():
    plan = cases.plan()
    assert {(c.causal, c.part) for c in plan[:4]} == set(cases.GOALS)
    assert all((c.length, c.dim, c.features) == (16384, 64, 256) for c in plan[:4])
    assert len(plan) == len(set(plan)) == 4 * len(cases.LENGTHS) * len(cases.SETTINGS)


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
    assert "left out, 8 measurements: composition in torch: out of memory" in text
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
def test_the_composition_is_the_reference(causal):
    torch = pytest.importorskip("torch")
    from performer import reference

    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 512, 2, 16)) for _ in range(3))
    projection = rng.normal(size=(24, 16))
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)]
    out = compose(*heads_first, torch.from_numpy(projection), causal).transpose(1, 2)
    wanted, _ = reference.attention(
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
    tools = [c.arguments[2] for c in kit.commands("sanitize", "90", tmp_path, 400)]
    assert tools == ["memcheck", "racecheck", "initcheck", "synccheck"]
    (benchmark_command,) = kit.commands("benchmark", "90", tmp_path, 100)
    at = benchmark_command.arguments.index("--seconds")
    assert benchmark_command.arguments[at + 1] == "85"
    configure = kit.commands("build", "90", tmp_path, 400)[0]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in configure.arguments
    assert max(c.seconds for c in kit.commands("tests", "90", tmp_path, 400)) <= 400


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
