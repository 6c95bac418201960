"""Tests that run on an NVIDIA GPU. Without one, those of single instructions run on the emulator
where that is built, and the others are skipped with the reason. tests/gpu/run.py builds and runs
everything.
"""

import importlib.util
import os
import sys

import pytest

collect_ignore = []
# Only a build with PERFORMER_PROBES or PERFORMER_EMULATION has the module.
if not (importlib.util.find_spec("performer_probes") or os.environ.get("PERFORMER_REQUIRE_GPU")):
    collect_ignore.append("test_ptx.py")
if importlib.util.find_spec("tensorflow") is None or os.environ.get("PERFORMER_DISABLE_LIBRARY"):
    collect_ignore.append("test_tensorflow.py")

STICKY = 86  # the exit status that tests/gpu/run.py knows


def error_that_stays() -> str:
    """What the GPU answers to a call that is right, or "" if it works, or nobody has used it.

    After an access out of bounds, say, every later call of the process fails with the same error.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def pytest_runtest_logreport(report):
    """Ends the process at the first such error: what comes after it would say nothing."""
    if report.failed and (error := error_that_stays()):
        pytest.exit(f"after {report.nodeid} the GPU answers: {error}", returncode=STICKY)
