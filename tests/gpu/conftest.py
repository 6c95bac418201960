"""Tests that run on an NVIDIA GPU. Without one, those of single instructions run on the emulator
where that is built, and the others are skipped with the reason. tests/gpu/run.py builds and runs
everything.
"""

import importlib.util
import os

collect_ignore = []
# Only a build with PERFORMER_PROBES or PERFORMER_EMULATION has the module.
if not (importlib.util.find_spec("performer_probes") or os.environ.get("PERFORMER_REQUIRE_GPU")):
    collect_ignore.append("test_ptx.py")
if importlib.util.find_spec("tensorflow") is None or os.environ.get("PERFORMER_DISABLE_LIBRARY"):
    collect_ignore.append("test_tensorflow.py")
