"""Calls where the system gives no more memory: they end with an error, and the next one is right.

    python tests/building/limits.py

Each limit of the address space (RLIMIT_AS), from what the process has to far more than the call
needs, is tried in a process of its own: a fork of one that has run nothing. The core and the
operators of TensorFlow are tried. TensorFlow itself may give up, and such an end is counted apart.
It aborts where its own locks get no memory, and says so (`low_level_alloc`). Where an operator of
its own gets none (the ones of a gradient, the sum of several), its Python module handles the C++
exception without the interpreter's lock, which may crash.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import performer

TESTS = Path(__file__).parents[1]
LIMITS = [0, *(3 << i for i in range(14, 29))]  # bytes

# Each defines prepare(), which returns a call; a call returns arrays.
CORE = """
import os, sys
sys.modules["tensorflow"] = None  # not installed, as far as the package can tell
from support import core_calls
from support.inputs import Case, cotangents, make
case = Case(batch=1, rows=2500, heads=4, groups=2, dim=64, value_dim=64, features=200)
x, incoming = make(case), cotangents(case)
def prepare():
    def run(op, x, **options):
        return core_calls.run(op, x, threads=4, **options)
    def call():
        found = {}
        for causal in (False, True):
            found[f"out {causal}"] = core_calls.forward(x, causal, run)["out"]
            found.update(core_calls.backward(x, incoming, causal, run))
        return list(found.values())
    return call
ALLOWED = MemoryError
"""

OPERATORS = """
import os
import numpy as np, tensorflow as tf, performer
x = np.random.default_rng(0).normal(size=(1, 2500, 4, 64)).astype("float32")
w = np.random.default_rng(1).normal(size=(200, 64)).astype("float32")
def attend(q):
    found = []
    for causal in (False, True):
        with tf.GradientTape() as tape:
            tape.watch(q)
            out = performer.favor_attention(q, q, q, w, causal=causal)
        found += [out, tape.gradient(out, q)]
    return found
def prepare():
    q = tf.constant(x)
    attend(q[:, :500])  # TensorFlow and its threads start
    return lambda: attend(q)
ALLOWED = (MemoryError, tf.errors.ResourceExhaustedError)
"""

TRIES = """
import faulthandler, json, resource, sys, tempfile
import numpy as np
faulthandler.enable()

def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()

def attempt(extra):
    call = prepare()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size() + extra, hard))
    try:
        got = call()
        said = "right"
    except ALLOWED as error:
        got, said = None, "refused: " + str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    expected = call()
    if got is not None and not all(map(np.array_equal, got, expected)):
        return "wrong"
    return said

children = []
for extra in json.loads(sys.argv[1]):
    read, write = os.pipe()
    errors = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(errors.fileno(), 2)
        said = "nothing"
        try:
            said = attempt(extra)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    children.append((extra, child, read, errors))
for extra, child, read, errors in children:
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    errors.seek(0)
    said = said or f"died with status {status}: {errors.read().decode(errors='replace')}"
    print(json.dumps([extra, said]), flush=True)
"""


def attempt(code: str, limits: list[int]) -> dict[int, str]:
    """What became of a call under each limit: what it said, with all its errors if it died."""
    paths = [str(Path(performer.__file__).parents[1]), str(TESTS)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", code + TRIES, json.dumps(limits)],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def faults(found: dict[int, str]) -> list[str]:
    """What is wrong with what `attempt` found."""
    wrong = [
        f"{limit} bytes: {said}"
        for limit, said in found.items()
        if said != "right"
        and not (said.startswith("refused") and names_memory(said))
        and not tensorflow_gave_up(said)
    ]
    words = [said.split(":")[0] for said in found.values()]
    if words.count("refused") < 3 or "right" not in words:
        wrong.append(f"the limits are too far apart: {words}")
    return wrong


def tensorflow_gave_up(said: str) -> bool:
    """Whether a process died by TensorFlow's own doing."""
    # The innermost Python function of the thread that crashed.
    crashed = re.search(r'^Current thread .*\n +File "(.*)", line', said, re.MULTILINE)
    return said.startswith("died") and (
        "low_level_alloc" in said
        or bool(crashed and re.search(r"/tensorflow/python/ops/gen_\w+\.py$", crashed[1]))
    )


def names_memory(said: str) -> bool:
    """Whether a message says that there is no memory."""
    return any(word in said for word in ("memory", "OOM", "Unable to allocate"))


def main() -> int:
    """Tries all limits; returns nonzero where a call crashed or was wrong."""
    wrong = []
    for name, code in (("core", CORE), ("operators", OPERATORS)):
        found = attempt(code, LIMITS)
        wrong += [f"{name}: {fault}" for fault in faults(found)]
        words = Counter(said.split(":")[0] for said in found.values())
        gave_up = sum(map(tensorflow_gave_up, found.values()))
        print(f"limits: {name}: {dict(words)}; TensorFlow itself gave up {gave_up} times")
    print(*wrong, f"limits: {len(wrong)} wrong", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
