"""Tests of PTX without a GPU; tests/building/emulate.sh builds and runs them."""

import importlib.util

# Other runs of pytest do not see them.
collect_ignore_glob = [] if importlib.util.find_spec("performer_ptx") else ["test_*.py"]
