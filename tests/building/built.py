"""Prints what the present build made, by its own word: files that are left of others prove nothing.

Three lines: the libraries, the folder of the objects, the instruction sets of the kernels.
"""

import runpy
import sys
import sysconfig

info = runpy.run_path("python/performer/_build_info.py")
names = ["_core" + sysconfig.get_config_var("EXT_SUFFIX"), "_ops.so"] + ["_xla.so"] * info["XLA"]
print(*(f"python/performer/{name}" for name in names))
print(f"build/editable-{sys.implementation.cache_tag}/CMakeFiles")
print(*info["ISAS"])
