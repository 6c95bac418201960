"""The compiled library: found, checked, loaded once; and what happens where it cannot be used.

Every case needs a process of its own, since a process loads the library at most once. TensorFlow
takes seconds to import, so one process imports it and forks a child for each case; a child that
dies of a signal fails its case only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import performer

MINOR = ".".join(performer.loader.status().running.split(".")[:2])
PACKAGE = Path(performer.__file__).resolve().parent
LIBRARY = PACKAGE / "_ops.so"
XLA_LIBRARY = PACKAGE / "_xla.so"
needs_xla = pytest.mark.skipif(not XLA_LIBRARY.is_file(), reason="built without XLA")

# Runs each case, code that fills the dict `out`, in a child with `folder` first on the path.
FORKING = """
import json, os, sys, warnings
cases, imports = json.loads(sys.stdin.read())
for name in imports:
    __import__(name)
for case, (folder, code) in cases.items():
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.path.insert(0, folder)
        out = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                exec(code)
            except BaseException as error:
                out["error"] = f"{type(error).__name__}: {error}"
        out["warnings"] = [str(w.message) for w in caught if "Performer's" in str(w.message)]
        print(json.dumps({case: out}), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps({case: {"error": f"died with status {status}"}}), flush=True)
"""

LOAD = """
from performer import loader
found = loader.status()
out.update(state=found.state, message=found.message, path=str(found.path))
out["same"] = loader.ops() is loader.ops()
out["none"] = loader.ops() is None
"""

ATTEND = """
import numpy as np, performer
x = np.random.default_rng(0).normal(size=(1, 5, 2, 4)).astype("float32")
y = performer.favor_attention(x, x, x, np.eye(4, dtype="float32"))
out["finite"] = bool(np.isfinite(y).all())
"""

XLA = """
from performer import loader
found = loader.xla_status()
out.update(xla_state=found.state, xla_message=found.message, jit=loader.supports_jit())
"""

COMPILE = """
import tensorflow as tf
out["compiled"] = int(tf.function(lambda x: x + 1, jit_compile=True)(1))
"""

ATTEND_COMPILED = """
import numpy as np, performer, tensorflow as tf
x = np.random.default_rng(0).normal(size=(1, 5, 2, 4)).astype("float32")
w = np.eye(4, dtype="float32")
y = tf.function(performer.favor_attention, jit_compile=True)(x, x, x, w)
out["same bits"] = bool(np.array_equal(y, performer.favor_attention(x, x, x, w)))
"""

XLA_FIRST = """
import tensorflow as tf, importlib.util
from pathlib import Path
folder = Path(importlib.util.find_spec("performer").origin).parent.resolve()
tf.load_op_library(str(folder / "_xla.so"))
"""

REQUIRE = """
import os
os.environ["PERFORMER_REQUIRE_LIBRARY"] = "1"
from performer import loader
loader.ops()
"""

DISABLE = 'import os; os.environ["PERFORMER_DISABLE_LIBRARY"] = "1"' + LOAD

SECOND_COPY = (
    """
import importlib.util
from performer import loader
first = loader.ops()
spec = importlib.util.spec_from_file_location("second", sys.argv[1])
second = importlib.util.module_from_spec(spec)
sys.modules["second"] = second
spec.loader.exec_module(second)
out.update(state=second.status().state, message=second.status().message)
"""
    + ATTEND
)


# Copies of the libraries that are loaded by hand, as where a SavedModel is served.
BY_HAND = """
import os, shutil, tempfile
import tensorflow as tf
hand = tempfile.mkdtemp(dir=sys.argv[2])
for name in ("_ops.so", "_xla.so"):
    if os.path.exists(f"{folder}/performer/{name}"):
        tf.load_op_library(shutil.copy(f"{folder}/performer/{name}", f"{hand}/attention{name}"))
"""

GRADIENT = """
import numpy as np, performer, tensorflow as tf
x = tf.constant(np.random.default_rng(0).normal(size=(1, 5, 2, 4)).astype("float32"))
with tf.GradientTape() as tape:
    tape.watch(x)
    y = performer.favor_attention(x, x, x, np.eye(4, dtype="float32"), causal=True)
out["gradient"] = bool(np.isfinite(tape.gradient(y, x)).all())
"""

FORKED = """
import multiprocessing, numpy as np, performer, tensorflow as tf
x = np.ones((1, 5, 2, 4), "float32")
if {started}:
    performer.favor_attention(x, x, x, np.eye(4, dtype="float32"))
read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        performer.favor_attention(x, x, x, np.eye(4, dtype="float32"))
        os.write(write, b"attended")
    except RuntimeError as error:
        os.write(write, str(error).encode())
    finally:
        os._exit(0)
out["child"] = os.read(read, 10000).decode()
os.waitpid(child, 0)
"""


def run_forking(cases, imports, *arguments):
    """Runs the cases and returns what each put into `out`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PERFORMER_")}
    named = {name: [str(folder), code] for name, (folder, code) in cases.items()}
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *map(str, arguments)],
        input=json.dumps([named, imports]),
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, "PYTHONPATH": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr
    results = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            results.update(json.loads(line))
    return results


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Returns a function that copies the package, edits the copy and returns its folder."""
    assert LIBRARY.is_file(), "the library is not built: `make build`"

    def make(library=None, built_for=None, xla=None):
        folder = tmp_path_factory.mktemp("site")
        # With its bytecode, which a child would otherwise compile again.
        shutil.copytree(PACKAGE, folder / "performer")
        for name, content in (("_ops.so", library), ("_xla.so", xla)):
            place = folder / "performer" / name
            if content is False:
                place.unlink()
            elif content is not None:
                place.write_bytes(content)
        if built_for is not None:
            info = folder / "performer" / "_build_info.py"
            info.write_text(info.read_text() + f"\nTENSORFLOW_VERSIONS = {built_for}\n")
        return folder

    return make


@pytest.fixture(scope="module")
def results(copy, tmp_path_factory):
    """Runs all cases that differ in what is on the disk."""
    content = LIBRARY.read_bytes()
    intact = copy()
    missing = copy(library=False)
    several = copy(built_for=("2.18.0", f"{MINOR}.9"))  # as a wheel for several versions has them
    for minor in ("2.18", MINOR):
        (several / "performer" / f"tensorflow-{minor}").mkdir()
        for path in (several / "performer").glob("_[ox]*.so"):
            library = path.read_bytes() if minor == MINOR else b"of another TensorFlow"
            (path.parent / f"tensorflow-{minor}" / path.name).write_bytes(library)
    for path in (several / "performer").glob("_[ox]*.so"):
        path.unlink()
    (core,) = PACKAGE.glob("_core.*.so")
    unloadable = content.replace(b"libtensorflow_framework.so.2", b"libtensorflow_framewerk.so.2")
    assert unloadable != content
    cases = {
        "intact": (intact, LOAD + ATTEND),
        "disabled": (intact, DISABLE + ATTEND),
        "missing": (missing, LOAD + ATTEND),
        "missing, required": (missing, REQUIRE),
        "empty": (copy(library=b""), LOAD),
        "header only": (copy(library=content[:64]), LOAD),
        "half": (copy(library=content[: len(content) // 2]), LOAD + ATTEND),
        "all but a byte": (copy(library=content[:-1]), LOAD),
        "text": (copy(library=b"x" * 10000), LOAD),
        "unloadable": (copy(library=unloadable), LOAD + ATTEND),
        "no ops": (copy(library=core.read_bytes()), LOAD),
        "older": (copy(built_for=("2.18.0", "2.19.1")), LOAD + ATTEND),
        "newer": (copy(built_for=("3.0.0",)), LOAD),
        "of several": (several, LOAD + ATTEND),
        "of several, missing": (copy(built_for=("2.20.0", f"{MINOR}.9")), LOAD + ATTEND),
        "patch": (copy(built_for=(f"{MINOR}.9",)), LOAD),
        "second copy": (intact, SECOND_COPY),
        "by hand, before": (intact, BY_HAND + LOAD + ATTEND + GRADIENT),
        "by hand, after": (intact, LOAD + ATTEND + BY_HAND + ATTEND + GRADIENT),
        "forked after a call": (intact, FORKED.format(started=True)),
        "forked before a call": (intact, FORKED.format(started=False)),
    }
    if XLA_LIBRARY.is_file():
        content = XLA_LIBRARY.read_bytes()
        unloadable = content.replace(b"libtensorflow_cc.so.2", b"libtensorflow_cx.so.2")
        assert unloadable != content
        cases |= {
            "XLA": (intact, COMPILE + XLA + ATTEND_COMPILED),
            "XLA first": (intact, XLA_FIRST + COMPILE + XLA + ATTEND_COMPILED),
            "XLA, by hand": (intact, LOAD + BY_HAND + ATTEND_COMPILED),
            "XLA missing": (copy(xla=False), XLA + ATTEND),
            "XLA half": (copy(xla=content[: len(content) // 2]), XLA + ATTEND),
            "XLA unloadable": (copy(xla=unloadable), XLA + ATTEND),
            "XLA without ops": (missing, XLA + ATTEND_COMPILED),
        }
    by_hand = tmp_path_factory.mktemp("by_hand")
    return run_forking(cases, ["tensorflow"], copy() / "performer" / "loader.py", by_hand)


def test_intact_library_is_loaded_once_and_without_a_warning(results):
    got = results["intact"]
    assert got["state"] == "loaded", got
    assert got["message"] == ""
    assert got["same"] and not got["none"] and got["finite"]
    assert got["warnings"] == []


def test_disabled_by_the_environment_is_silent(results):
    got = results["disabled"]
    assert got["state"] == "disabled", got
    assert got["none"] and got["finite"]
    assert got["warnings"] == []


def test_of_several_libraries_that_of_this_tensorflow_is_loaded(results):
    got = results["of several"]
    assert got.get("state") == "loaded", got
    assert got["path"].endswith(f"/performer/tensorflow-{MINOR}/_ops.so")
    assert got["finite"] and got["warnings"] == []


@pytest.mark.parametrize(
    ("case", "state", "words"),
    [
        ("missing", "missing", ["missing", "pip install ."]),
        ("of several, missing", "missing", [f"tensorflow-{MINOR}/_ops.so"]),
        ("empty", "unusable", ["not a shared library"]),
        ("header only", "unusable", ["truncated", "reinstall"]),
        ("half", "unusable", ["truncated", "reinstall"]),
        ("all but a byte", "unusable", ["truncated", "reinstall"]),
        ("text", "unusable", ["not a shared library", "reinstall"]),
        ("unloadable", "unusable", ["libtensorflow_framewerk.so.2", "--no-build-isolation"]),
        ("no ops", "unusable", ["not in"]),
        ("older", "mismatch", ["2.18.0 and 2.19.1", "tensorflow==2.19.*", "--no-build-isolation"]),
        ("newer", "mismatch", ["3.0.0", "tensorflow==3.0.*"]),
    ],
)
def test_unusable_library_gives_the_composition_and_one_warning(results, case, state, words):
    got = results[case]
    assert "error" not in got, got
    assert got["state"] == state, got
    assert got["none"]
    assert got.get("finite", True)
    assert len(got["warnings"]) == 1
    for word in words:
        assert word in got["warnings"][0]


def test_requiring_the_library_turns_the_warning_into_an_error(results):
    got = results["missing, required"]
    assert got["error"].startswith("ImportError: Performer's compiled ops are missing")


def test_another_patch_release_of_tensorflow_is_the_same_abi(results):
    assert results["patch"]["state"] == "loaded", results["patch"]


def test_a_second_copy_is_refused_and_the_first_keeps_working(results):
    got = results["second copy"]
    assert got["state"] == "unusable", got
    assert "another copy" in got["message"]
    assert got["finite"]


def test_a_copy_that_is_loaded_by_hand_changes_nothing(results):
    got = results["by hand, after"]
    assert got.get("state") == "loaded", got
    assert got["finite"] and got["gradient"] and got["warnings"] == []


def test_a_copy_that_was_loaded_by_hand_before_is_named_and_the_composition_works(results):
    got = results["by hand, before"]
    assert got.get("state") == "unusable", got
    assert got["finite"] and got["gradient"]
    (warning,) = got["warnings"]
    assert "attention_ops.so) was loaded before, and a process can use only one" in warning


@needs_xla
def test_a_copy_of_the_part_for_xla_that_is_loaded_by_hand_changes_nothing(results):
    assert results["XLA, by hand"].get("same bits"), results["XLA, by hand"]


def test_a_forked_process_is_told_why_it_cannot_call_tensorflow(results):
    got = results["forked after a call"]
    assert "forked from one in which TensorFlow had started" in got["child"], got
    assert "spawn" in got["child"]
    assert results["forked before a call"]["child"] == "attended"


@needs_xla
@pytest.mark.parametrize("case", ["XLA", "XLA first"])
def test_the_part_for_xla_is_loaded_in_any_order_even_after_a_compilation(results, case):
    got = results[case]
    assert (got.get("xla_state"), got["jit"]) == ("loaded", True), got
    assert got["same bits"] and got["xla_message"] == "" and got["warnings"] == []


@needs_xla
@pytest.mark.parametrize(
    ("case", "state", "word", "warnings"),
    [
        ("XLA missing", "missing", "pip install .", 0),
        ("XLA half", "unusable", "truncated", 1),
        ("XLA unloadable", "unusable", "libtensorflow_cx.so.2", 1),
    ],
)
def test_trouble_with_xla_leaves_the_ops_alone_and_says_why(results, case, state, word, warnings):
    got = results[case]
    assert (got.get("xla_state"), got["jit"]) == (state, False), got
    assert word in got["xla_message"] and got["finite"]
    assert len(got["warnings"]) == warnings


@needs_xla
def test_without_the_ops_xla_compiles_the_composition(results):
    got = results["XLA without ops"]
    assert (got.get("xla_state"), got["jit"]) == ("missing", True), got
    assert "same bits" in got


@pytest.mark.slow
@pytest.mark.parametrize("order", [["performer", "tensorflow"], ["keras", "performer"]])
def test_any_order_of_imports(copy, order):
    code = "\n".join(f"import {name}" for name in order) + LOAD + ATTEND
    got = run_forking({"order": (copy(), code)}, [])["order"]
    assert got.get("state") == "loaded", got
    assert got["finite"] and got["warnings"] == []


def test_a_file_that_cannot_be_read_is_a_fault_not_an_error(tmp_path):
    from performer import loader

    assert loader._damage(tmp_path) == "it cannot be read (Is a directory)"
