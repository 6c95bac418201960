"""Finds, checks and loads the compiled TensorFlow ops: the one place that does.

TensorFlow has no stable C++ ABI, so a library serves the minor version of TensorFlow that it was
compiled for and no other (a published wheel has one for each version that it serves); and a second
copy loaded into one process breaks every op of both. Hence
everything that needs the ops asks `ops()`, which checks first and loads once. Where the library
cannot be used, `ops()` warns once, with the ways out, and returns None: callers then take the plain
TensorFlow composition, which gives the same results more slowly.

A process that was forked from one in which TensorFlow had started has none of its threads: calls
would wait for them for ever. There `ops()` raises.

What XLA (`jit_compile=True`) needs beside the ops is a library of its own, loaded after them:
trouble with it changes nothing for calls that XLA does not compile.

Environment:
    PERFORMER_DISABLE_LIBRARY: 1 takes the composition, without a warning.
    PERFORMER_REQUIRE_LIBRARY: 1 raises ImportError where there would be a warning.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import sys
import threading
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

WITHOUT_TENSORFLOW = (
    "Performer needs TensorFlow, which is not installed here. It is an extra, as there are several "
    "packages of it: `pip install 'tensorflow-performer[cpu]'`, or [gpu] for NVIDIA GPUs."
)
DISABLE_VARIABLE = "PERFORMER_DISABLE_LIBRARY"
REQUIRE_VARIABLE = "PERFORMER_REQUIRE_LIBRARY"

_REBUILD = (
    "build them for this one: `pip install cmake ninja pybind11`, then, in the source folder, "
    "`pip install --no-build-isolation --no-deps --force-reinstall .`"
)
_FORKED = (
    "Performer cannot run in this process: it was forked from one in which TensorFlow had started, "
    "and has none of TensorFlow's threads, for which calls would wait for ever. Start processes by "
    "`multiprocessing.get_context('spawn')` (or 'forkserver'), or fork before TensorFlow runs."
)
_MOST_BYTES = 1 << 26  # of a library that may be a copy of this one: far more than it has
_lock = threading.RLock()
_ops: ModuleType | None = None
_status: Status | None = None
_xla_status: Status | None = None
_warned = False
_forked = False


@dataclass(frozen=True)
class Status:
    """What became of a compiled library in this process.

    Attributes:
        state: "loaded", "disabled" (by the environment), "missing", "mismatch" (made for another
            TensorFlow) or "unusable" (damaged, or refused by the loader).
        path: Where the library is, or should be.
        built_for: The TensorFlow versions that there are libraries for; "" if unknown.
        running: The TensorFlow version of this process.
        message: What is wrong and what to do about it; "" when loaded.
    """

    state: str
    path: Path
    built_for: str
    running: str
    message: str


def ops() -> ModuleType | None:
    """Returns the module of raw ops (`performer_summarize`, ...), loading it on the first call.

    Returns:
        The module, the same one on every call; None where the library cannot be used, after one
        `RuntimeWarning` in the life of the process.

    Raises:
        ImportError: The library cannot be used and PERFORMER_REQUIRE_LIBRARY is set.
        RuntimeError: The process was forked from one in which TensorFlow had started.

    Example:
        >>> from performer import library
        >>> library.ops() is library.ops()
        True
    """
    global _warned
    if _forked:
        raise RuntimeError(_FORKED)
    with _lock:
        found = status()
        if found.state == "loaded":
            _warn_of_xla()
        if found.state in ("loaded", "disabled"):
            return _ops
        if _flag(REQUIRE_VARIABLE):
            raise ImportError(found.message)
        if not _warned:
            _warned = True
            warnings.warn(
                f"{found.message} Until then attention runs as a plain TensorFlow composition: "
                "same results, slower, more memory.",
                RuntimeWarning,
                stacklevel=2,
            )
        return _ops


def _note_fork() -> None:
    """Called in a process that was just forked."""
    global _forked, _lock
    _lock = threading.RLock()  # another thread of the parent may have held the old one
    # TensorFlow has no public word for it. Without this name its calls are not stopped, but hang.
    context = sys.modules.get("tensorflow.python.eager.context")
    started = getattr(context, "context_safe", lambda: None)()
    _forked = _forked or bool(getattr(started, "_initialized", False))


os.register_at_fork(after_in_child=_note_fork)


def _warn_of_xla() -> None:
    """Warns, once, where the part for XLA is there and cannot be used."""
    global _warned
    found = xla_status()
    if found.state == "unusable" and not _warned:
        _warned = True
        warnings.warn(
            f"{found.message} Until then jit_compile=True fails for attention; all else works.",
            RuntimeWarning,
            stacklevel=3,
        )


def status() -> Status:
    """Returns what became of the ops, trying to load them first. Never warns or raises."""
    global _ops, _status, _xla_status
    with _lock:
        if _status is None:
            _ops, _status = _load_ops()
            _xla_status = _load_xla(_status)
        return _status


def xla_status() -> Status:
    """Returns what became of the ops' part for XLA, trying to load it first. Never warns or raises.

    Its `state` is that of the ops where these are not loaded.

    Example:
        >>> from performer import library
        >>> library.xla_status().state
        'loaded'
    """
    with _lock:
        status()
        assert _xla_status is not None
        return _xla_status


def supports_jit() -> bool:
    """Tells whether XLA can compile attention: the ops, or the composition that stands for them."""
    return status().state != "loaded" or xla_status().state == "loaded"


def _load_ops() -> tuple[ModuleType | None, Status]:
    """Checks the ops and loads them; every failure becomes a status, never an exception."""
    import tensorflow as tf

    # Resolved, so that one file has one name: TensorFlow knows libraries by their path.
    folder = Path(__file__).resolve().parent
    built = _build_info("TENSORFLOW_VERSIONS", ())
    minor = _minor(tf.__version__)
    path = (folder if len(built) <= 1 else folder / f"tensorflow-{minor}") / "_ops.so"
    built_for = ", ".join(built)

    def report(state: str, message: str) -> tuple[None, Status]:
        return None, Status(state, path, built_for, tf.__version__, message)

    if _flag(DISABLE_VARIABLE):
        return report("disabled", f"Performer's compiled ops are off: {DISABLE_VARIABLE} is set.")
    if built and minor not in map(_minor, built):
        return report(
            "mismatch",
            f"Performer's compiled ops are made for TensorFlow {' and '.join(built)}, and this"
            f" is TensorFlow {tf.__version__}. Either install one that they are made for,"
            f" `pip install 'tensorflow=={_minor(built[-1])}.*'`, or {_REBUILD}.",
        )
    if not path.is_file():
        return report(
            "missing",
            f"Performer's compiled ops are missing ({path}). To get them, install from source where"
            " there is a C++17 compiler, `pip install .`, or install a wheel of this platform.",
        )
    if fault := _damage(path) or _other_copy(path):
        return report("unusable", f"Performer's compiled ops cannot be used ({path}): {fault}.")
    try:
        module = tf.load_op_library(str(path))
    except (tf.errors.OpError, OSError, RuntimeError) as error:
        return report(
            "unusable",
            f"Performer's compiled ops cannot be loaded ({path}): {str(error).rstrip('.')}. They "
            f"may belong to another TensorFlow or system; {_REBUILD}.",
        )
    if not hasattr(module, "performer_summarize"):
        if first := _loaded_by_hand(path):
            return report(
                "unusable",
                f"Performer's compiled ops cannot be used ({path}): another copy of them ({first}) "
                "was loaded before, and a process can use only one. Load that file only where the "
                "package is not imported, or load this one instead of it.",
            )
        return report("unusable", f"Performer's compiled ops are not in {path}; {_REBUILD}.")
    return module, Status("loaded", path, built_for, tf.__version__, "")


def _load_xla(ops_status: Status) -> Status:
    """As `_load_ops`, for the part that only XLA needs."""
    import tensorflow as tf

    path = ops_status.path.with_name("_xla.so")

    def report(state: str, message: str) -> Status:
        return replace(ops_status, state=state, path=path, message=message)

    if ops_status.state != "loaded":
        return report(ops_status.state, ops_status.message)
    if not path.is_file():
        reason = "is missing" if _build_info("XLA", True) else "was left out of this build"
        return report(
            "missing",
            f"Performer's part for XLA {reason} ({path}). To get it, install from source, "
            "`pip install .`, without PERFORMER_XLA=OFF.",
        )
    fault = _damage(path) or _other_copy(path)
    if not fault:
        try:
            tf.load_op_library(str(path))
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            fault = str(error).rstrip(".")
    if fault:
        return report("unusable", f"Performer's part for XLA cannot be loaded ({path}): {fault}.")
    return report("loaded", "")


def _flag(variable: str) -> bool:
    """Tells whether an environment variable is set to something other than 0."""
    return os.environ.get(variable, "0") not in ("", "0")


def _minor(version: str) -> str:
    """Returns "2.21" for "2.21.0", which is what the ABI goes with."""
    return ".".join(version.split(".")[:2])


def _build_info(name: str, default):
    """Returns what the build wrote down under `name`, or `default` where nothing was built."""
    if importlib.util.find_spec("performer._build_info") is None:
        return default
    return getattr(importlib.import_module("performer._build_info"), name, default)


def _damage(path: Path) -> str:
    """Returns what is wrong with the file, or "".

    The loader maps a library by the sizes in its header and dies of a bus error where the file
    ends before them. The table of sections comes last, so a file that ends before it is truncated.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return "it is not a shared library; reinstall the package"
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    if path.stat().st_size < table + entry_size * entries:
        return "the file is truncated; reinstall the package"
    return ""


def _other_copy(path: Path) -> str:
    """Returns which other copy of the package's library this process has loaded, or ""."""
    for mapped in _mapped():
        if mapped.parts[-2:] == path.parts[-2:] and mapped != path:
            return f"this process has loaded another copy already ({mapped}), and can use only one"
    return ""


def _loaded_by_hand(path: Path) -> str:
    """Returns which file other than `path` has brought the operators into this process, or ""."""
    for mapped in _mapped():
        try:
            other = mapped != path and mapped.stat().st_size < _MOST_BYTES
            if other and b"Performer>Summarize" in mapped.read_bytes():
                return str(mapped)
        except OSError:
            continue
    return ""


def _mapped() -> list[Path]:
    """The shared libraries of this process, where the system says which."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {"/" + line.partition("/")[2] for line in lines if "/" in line}
    return [Path(file) for file in sorted(files) if ".so" in file]
