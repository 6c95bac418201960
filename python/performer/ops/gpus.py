"""Which calls have a kernel on which GPU; the others run there as plain TensorFlow.

The rules are those of cc/cuda, whose kernels would refuse the call: asked here, before it is made.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import tensorflow as tf

# Operators that have no kernel for GPUs. TensorFlow does as well there: not worth a warning.
_CPU_ONLY = ("append_rows",)
_TYPES = (tf.float32, tf.bfloat16, tf.float16)
# D and E, also in float32, and where blocks are small; H and G.
_MAX_WIDTH, _MAX_FLOAT32_WIDTH, _WIDTH_OF_SMALL_BLOCKS, _MAX_HEADS = 256, 128, 64, 65535
_OLDEST = (8, 0)
# The oldest driver of Linux that runs what CUDA 11, 12, 13 compiled ("minor version compatibility",
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/).
_OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
_DRIVER = Path("/proc/driver/nvidia/version")

_warned: set[str] = set()


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: its model, for messages.
        capability: (major, minor), or None where nobody says.
        driver: major version of the driver, or 0 where nobody says.
    """

    name: str
    capability: tuple[int, int] | None
    driver: int = 0


class Build(NamedTuple):
    """The GPU kernels of a library.

    Attributes:
        targets: what they were compiled for, such as ("sm_80", "compute_90").
        cuda: major version of the CUDA that compiled them, or 0 where nobody says.
        left_out: why there are none.
    """

    targets: tuple[str, ...]
    cuda: int = 0
    left_out: str = ""


class Call(NamedTuple):
    """What decides whether a kernel takes a call; a size is None where it is not known yet."""

    operator: str
    dtype: tf.DType
    widths: tuple[int | None, ...]  # D and E
    heads: tuple[int | None, ...]  # H and G


def fault(call: Call, card: Card, build: Build) -> str:
    """Why a call has no kernel on a GPU, or "".

    Example:

    >>> import tensorflow as tf
    >>> from performer.ops import gpus
    >>> build = gpus.Build(("sm_80", "sm_90", "compute_90"), cuda=12)
    >>> call = gpus.Call("causal", tf.float32, (64, 64), (8, 8))
    >>> gpus.fault(call, gpus.Card("A100", (8, 0), driver=535), build)
    ''
    >>> gpus.fault(call, gpus.Card("Tesla T4", (7, 5), driver=535), build)
    'the kernels need compute capability 8.0, and Tesla T4 has 7.5'
    """
    if not build.targets:
        return f"the library was built without them ({build.left_out or 'nobody says why'})"
    oldest = _OLDEST_DRIVERS.get(build.cuda, 0)
    if card.driver and card.driver < oldest:
        return (
            f"they were compiled by CUDA {build.cuda}, which needs driver {oldest}, and this "
            f"driver is {card.driver}"
        )
    if card.capability is not None:
        has = f"and {card.name} has {_text(card.capability)}"
        if card.capability < _OLDEST:
            return f"the kernels need compute capability {_text(_OLDEST)}, {has}"
        if not any(_runs(target, card.capability) for target in build.targets):
            return f"they were compiled for {', '.join(build.targets)}, {has}"
    if call.operator in _CPU_ONLY:
        return f"{call.operator} has no kernel for GPUs"
    if call.dtype not in _TYPES:
        return f"they take {', '.join(t.name for t in _TYPES)}, not {call.dtype.name}"
    widest = max((width for width in call.widths if width is not None), default=0)
    if call.dtype == tf.float32 and widest > _MAX_FLOAT32_WIDTH:
        return f"they take heads of D and E up to {_MAX_FLOAT32_WIDTH} in float32, not {widest}"
    if widest > _MAX_WIDTH:
        return f"they take heads of D and E up to {_MAX_WIDTH}, not {widest}"
    if widest > _WIDTH_OF_SMALL_BLOCKS and card.capability and has_small_blocks(card.capability):
        return (
            f"{card.name} has too little shared memory for heads wider than "
            f"{_WIDTH_OF_SMALL_BLOCKS}, which these are ({widest})"
        )
    most = max((heads for heads in call.heads if heads is not None), default=0)
    if most > _MAX_HEADS:
        return f"they take up to {_MAX_HEADS} heads, not {most}"
    return ""


def has_small_blocks(capability: tuple[int, int]) -> bool:
    """Whether a block has 99 KiB of shared memory only: 8.6, 8.9 and 12.x.

    "Compute Capabilities" in the CUDA C++ Programming Guide,
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/.
    """
    return capability in ((8, 6), (8, 9)) or capability[0] == 12


def takes(call: Call, device: str) -> bool:
    """Whether the compiled operator runs where its inputs are, without a way through the CPU.

    Where it does not, and something is lost by it, warns of the reason, once for each reason in a
    process.

    Args:
        call: the call.
        device: of an input: the name of a device, or "" in a graph that is placed later. Such a
            call may run on any GPU that TensorFlow sees.
    """
    found = cards()
    if not found or "CPU" in device.upper():
        return True
    number = re.search(r"GPU:(\d+)", device)
    if number and int(number[1]) < len(found):
        found = (found[int(number[1])],)
    for card in found:
        if reason := fault(call, card, build()):
            if call.operator not in _CPU_ONLY:
                _warn(card, reason)
            return False
    return True


def takes_inputs(operator: str, inputs: dict) -> bool:
    """`takes` of a call with these tensors by input name."""
    if not cards():
        return True
    rows = next(inputs[name] for name in ("query", "key", "value") if name in inputs)
    last = [inputs[name].shape[-1] for name in ("query", "key", "value", "mean") if name in inputs]
    heads = [inputs[name].shape[2] for name in ("query", "key") if name in inputs]
    return takes(Call(operator, rows.dtype, tuple(last), tuple(heads)), rows.device)


@functools.cache
def cards() -> tuple[Card, ...]:
    """The GPUs that TensorFlow uses in this process, in its order."""
    driver = 0
    if _DRIVER.exists():
        version = re.search(r"\b(\d{3,})\.\d+", _DRIVER.read_text())
        driver = int(version[1]) if version else 0
    found = []
    for device in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        name = details.get("device_name", device.name)
        found.append(Card(name, details.get("compute_capability"), driver))
    return tuple(found)


@functools.cache
def build() -> Build:
    """The GPU kernels of the package's library, by what its build wrote down."""
    if importlib.util.find_spec("performer._build_info") is None:
        return Build((), left_out="it does not say how it was built")
    info = importlib.import_module("performer._build_info")
    version = re.search(r"nvcc (\d+)", info.CUDA_COMPILER)
    return Build(info.CUDA_TARGETS, int(version[1]) if version else 0, info.CUDA_LEFT_OUT)


def _runs(target: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs code for sm_XY (same X, at most Y), or PTX for compute_XY and later."""
    kind, _, number = target.partition("_")
    made = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
    if number[-1].isdigit():
        return made <= capability and (kind == "compute" or made[0] == capability[0])
    return made == capability  # sm_90a and the like run nowhere else


def _text(capability):
    return f"{capability[0]}.{capability[1]}"


def _warn(card, reason):
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"Performer's GPU kernels are not used on {card.name}: {reason}. Attention runs there "
            "as a plain TensorFlow composition: same results, slower, more memory.",
            RuntimeWarning,
            stacklevel=2,
        )
