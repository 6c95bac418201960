"""The time of each kernel of a call, and what single instructions reach on this GPU."""

from __future__ import annotations

import importlib
import importlib.util
import re

REPEATS = 10


def times(call) -> list[dict]:
    """The kernels of a call by torch's profiler: name, launches and microseconds in one call."""
    import torch

    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize()
    return rows(profile.key_averages(), REPEATS)


def rows(averages, repeats: int) -> list[dict]:
    """Those of a profile of `repeats` calls, the longest first."""
    found = []
    for event in averages:
        # Older versions of torch say cuda where newer ones say device.
        total = getattr(event, "self_device_time_total", None)
        if total is None:
            total = event.self_cuda_time_total
        if total:
            found.append(
                {
                    "kernel": short(event.key),
                    "launches": event.count / repeats,
                    "microseconds": total / repeats,
                }
            )
    return sorted(found, key=lambda row: -row["microseconds"])


def short(name: str) -> str:
    """ "ReadKernel<float, 64>" of "void performer::cuda::ReadKernel<float, 64>(performer::..)"."""
    name = re.sub(r"performer::(cuda::)?|^void ", "", name)
    return re.sub(r"\((?!anonymous).*", "", name)


def ceilings() -> dict[str, float]:
    """Rates of the probes (tests/gpu/ceilings.cu), where they are built: TFLOP/s, TB/s, T/s."""
    if importlib.util.find_spec("performer_probes") is None:
        return {}
    return dict(importlib.import_module("performer_probes").ceilings())
