"""Times the GPU kernels beside torch's flash attention and an unfused composition in torch.

    python benchmarks/gpu.py [--output FOLDER] [--seconds N] [--lengths L ...]
    python benchmarks/gpu.py --headline [--name NAME] [--output FOLDER]
    python benchmarks/gpu.py --once

It needs a GPU, torch and a build with the GPU kernels, but not TensorFlow. Every implementation is
checked against float64 first. Where it is off by more than its bound its time is marked, where it
is wrong it is not timed; either way the command returns 1. The most telling cases come first; what
does not fit into the time is listed. The command writes gpu.json, gpu.md and gpu.png. It returns 2
for a wrong argument, and 3 where nothing can be measured.

--headline measures the cases that have a goal, with a window too, the time of each kernel,
and what this GPU reaches in single instructions. --once only runs those cases once, for a profiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from pathlib import Path

from gpukit import cases, checking, implementations, kernels, report, timing
from performer.bench.implementations import torch_kernels


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    made.add_argument("--output", type=Path, default=Path("performer-gpu"), metavar="FOLDER")
    made.add_argument("--seconds", type=float, default=240.0, help="to measure in (default 240)")
    made.add_argument(
        "--lengths", type=int, nargs="+", default=list(cases.LENGTHS), help="multiples of 256"
    )
    made.add_argument("--headline", action="store_true", help="only the cases with a goal")
    made.add_argument("--once", action="store_true", help="those once, without times")
    made.add_argument("--name", help="of the files (default gpu, or headline)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    options = parser().parse_args(arguments)
    if wrong := [n for n in options.lengths if n < 256 or n % 256]:
        print(f"gpu.py: --lengths must be multiples of 256; got {wrong[0]}", file=sys.stderr)
        return 2
    if options.seconds <= 0:
        print(f"gpu.py: --seconds must be positive; got {options.seconds}", file=sys.stderr)
        return 2
    if reason := torch_kernels.missing():
        print(f"gpu.py: nothing to measure: {reason}", file=sys.stderr)
        return 3
    import torch

    if options.once:
        for case in cases.headline():
            call_of(implementations.Kernels, case, implementations.make_inputs(case))()
            torch.cuda.synchronize()
        return 0
    deadline = time.monotonic() + options.seconds
    timer = timing.Timer()
    run = {"machine": machine(), "rates": timer.rates(), "records": []}
    plan = cases.headline() if options.headline else cases.plan(options.lengths)
    wrong_results = 0
    for case in plan:
        with torch.cuda.stream(timer.stream):
            records = measure(case, timer, deadline)
        for record in records:
            run["records"].append(record)
            if "left_out" not in record:
                print(
                    f"{record['implementation']:12s} {case}: {record['median']:.3f} ms", flush=True
                )
            wrong_results += record.get("wrong", False) or record.get("off", False)
    if options.headline:
        run["ceilings"] = kernels.ceilings()
        run["kernels"] = [row for case in plan for row in times_of_kernels(case)]
    report.show(run)
    name = options.name or ("headline" if options.headline else "gpu")
    print(*report.write(run, options.output, name), sep="\n")
    return 1 if wrong_results else 0


def call_of(impl, case, x: dict):
    """The call of a case that is measured, after what must come before it."""
    made = impl(case, x)
    if case.part == cases.FORWARD:
        return made.forward
    made.forward()
    return made.backward


def times_of_kernels(case) -> list[dict]:
    """The kernels of a case with their times; nothing where it does not run."""
    try:
        call = call_of(implementations.Kernels, case, implementations.make_inputs(case))
        return [{"case": case.mode, **row} for row in kernels.times(call)]
    except (MemoryError, RuntimeError) as error:
        return [{"case": case.mode, "kernel": f"failed: {str(error).splitlines()[0]}"}]


def measure(case, timer, deadline: float) -> list[dict]:
    """One record for each implementation, checked before it is timed."""
    import torch

    records, x = [], None
    for name, impl in implementations.IMPLEMENTATIONS.items():
        record = {**dataclasses.asdict(case), "implementation": name}
        records.append(record)
        if time.monotonic() > deadline:
            record["left_out"] = "no time"
            continue
        try:
            x = implementations.make_inputs(case) if x is None else x
            call = call_of(impl, case, x)
            error = record["error"] = checking.error(name, case, x, call())
            bound = checking.BOUNDS[name][case.part]
            record["off"] = error is not None and not error <= bound
            if record["off"] and not error <= checking.SLIGHTLY * bound:
                record["left_out"] = f"{impl.label} is wrong: {error:.1e}, bound {bound}"
                record["wrong"] = True
                continue
            record.update(timer.milliseconds(call))
        except torch.OutOfMemoryError:
            record["left_out"] = f"{impl.label}: out of memory"
        except (MemoryError, RuntimeError) as error:
            record["left_out"] = f"{impl.label}: {str(error).splitlines()[0]}"
            # Some GPUs have no room for wide heads (docs/gpu.md).
            record["wrong"] = name == "performer" and "heads of this width" not in str(error)
    del x
    torch.cuda.empty_cache()
    return records


def machine() -> dict:
    """Facts that belong beside every figure."""
    import torch

    from performer import _build_info

    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split("\n")[0]
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "kernels": f"{_build_info.VERSION} ({_build_info.CUDA_COMPILER})",
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    sys.exit(main())
