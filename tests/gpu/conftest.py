"""Tests that run on an NVIDIA GPU. Without one, those of single instructions run on the emulator
where that is built, and the others are skipped with the reason. tests/gpu/run.py builds and runs
everything.
"""

import importlib.util
import os

# Here the kernels are tested without TensorFlow, which takes memory of the GPU.
os.environ.setdefault("PERFORMER_DISABLE_LIBRARY", "1")

# Only a build with PERFORMER_PROBES or PERFORMER_EMULATION has it.
collect_ignore = [] if importlib.util.find_spec("performer_probes") else ["test_ptx.py"]
