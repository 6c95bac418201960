"""Calls where the system gives no more memory: they end with an error, and the next one is right.

    python tests/building/limits.py

Each limit of the address space (RLIMIT_AS), from what the process has to far more than the call
needs, is tried in a process of its own: a fork of one that has run nothing. The core and the
operators of TensorFlow are tried. TensorFlow itself may abort where its own locks get no memory; it
says so (`low_level_alloc`), and such an end is counted apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
import json, resource, sys
import numpy as np

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
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            said = attempt(extra)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    children.append((extra, child, read))
for extra, child, read in children:
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    print(json.dumps([extra, said or f"died with status {status}"]), flush=True)
"""


def attempt(code: str, limits: list[int]) -> tuple[dict[int, str], int]:
    """What became of a call under each limit, and how often TensorFlow itself gave up."""
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
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return found, done.stderr.count("low_level_alloc")


def faults(found: dict[int, str], gave_up: int = 0) -> list[str]:
    """What is wrong with what `attempt` found."""
    words = [said.split(":")[0] for said in found.values()]
    wrong = [
        f"{limit} bytes: {said}"
        for limit, said in found.items()
        if said != "right" and not (said.startswith("refused") and names_memory(said))
    ]
    died = [word for word in wrong if "died" in word]
    wrong = [word for word in wrong if word not in died] + died[gave_up:]
    if words.count("refused") < 3 or "right" not in words:
        wrong.append(f"the limits are too far apart: {words}")
    return wrong


def names_memory(said: str) -> bool:
    """Whether a message says that there is no memory."""
    return any(word in said for word in ("memory", "OOM", "Unable to allocate"))


def main() -> int:
    """Tries all limits; returns nonzero where a call crashed or was wrong."""
    wrong = []
    for name, code in (("core", CORE), ("operators", OPERATORS)):
        found, gave_up = attempt(code, LIMITS)
        wrong += [f"{name}: {fault}" for fault in faults(found, gave_up)]
        count = {said.split(":")[0]: 0 for said in found.values()}
        for said in found.values():
            count[said.split(":")[0]] += 1
        print(f"limits: {name}: {count}; TensorFlow itself gave up {gave_up} times")
    print(*wrong, f"limits: {len(wrong)} wrong", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
