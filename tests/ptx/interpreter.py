"""Runs straight-line PTX: what nvcc makes of tests/gpu/probes.cu, without a GPU and without the
emulator of the sources.

All lanes of all warps go through the instructions together; a register is an array [warps, 32] of
its bits. Blocks are single warps. An instruction that is not in the table, a branch or a guard is
an error. Asynchronous copies arrive as late as they may; shared memory starts as 0xFF.

Semantics are those of the PTX ISA. Where it leaves open how tensor cores add, they do as an H100 or
an A100 was found to (arXiv:2512.07004), here by way of float64, which holds all of it exactly.
"""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np

LANES = 32
SHARED_BYTES = 1024
GIVEN, RESULT = 1 << 20, 1 << 40  # addresses of the two buffers
MASKS = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
# Steps of an instruction, the bits kept below the largest exponent, and the least exponent.
TENSOR_CORES = {"H100": (1, 25, -133), "A100": (2, 24, -132)}


def parse(source: Path) -> dict[str, list[tuple[str, list]]]:
    """{mangled name of a kernel: [(opcode, operands)]}; an operand in braces is a list."""
    kernels = {}
    text = re.sub(r"//[^\n]*", "", source.read_text())
    for name, body in re.findall(r"\.entry (\w+)\(.*?\)\s*\{(.*?)\n\}", text, re.DOTALL):
        kernels[name] = [
            _instruction(line)
            for line in (part.strip() for part in body.split(";"))
            if line and not line.startswith(".reg")
        ]
    return kernels


def _instruction(line: str) -> tuple[str, list]:
    opcode, _, rest = line.replace("\t", " ").partition(" ")
    operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
    return opcode, [re.findall(r"[^{},\s]+", o) if o[0] == "{" else o for o in operands]


def _floats(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _words(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def toward_zero(x: np.ndarray) -> np.ndarray:
    """float64 to float32."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    back = np.nextafter(y, np.float32(0))
    return np.where(np.abs(y.astype(np.float64)) > np.abs(x), back, y)


def add_products(a, b, d, cores: str, min_exponent: int) -> np.ndarray:
    """d [.., 16, 8] + a [.., 16, K] b [.., K, 8] in float32, as the tensor cores add."""
    steps, fraction, least = TENSOR_CORES[cores]
    depth = a.shape[-1] // steps
    for first in range(0, a.shape[-1], depth):
        part = slice(first, first + depth)
        d = _step(a[..., part], b[..., part, :], d, min_exponent, fraction, least)
    return d


def _exponents(x: np.ndarray, least: int) -> np.ndarray:
    """Of what is 0: one that aligns nothing."""
    return np.where(x == 0, -10000, np.maximum(np.frexp(x)[1] - 1, least))


def _step(a, b, d, min_exponent: int, fraction: int, least: int) -> np.ndarray:
    a, b = a.astype(np.float64)[..., None], b.astype(np.float64)[..., None, :, :]
    with np.errstate(invalid="ignore", over="ignore"):
        products = a * b  # [.., 16, k, 8], exact
        exponents = _exponents(a, min_exponent) + _exponents(b, min_exponent)
        top = np.maximum(exponents.max(-2), _exponents(d.astype(np.float64), -126))
        plain = d + products.astype(np.float32).sum(-2)
        last = np.where(top < -5000, 0, np.maximum(top, least) - fraction)
        kept = np.trunc(np.ldexp(products, -last[..., None, :])).sum(-2)
        kept += np.trunc(np.ldexp(d.astype(np.float64), -last))
        finite = np.isfinite(products).all(-2) & np.isfinite(d)
        return np.where(finite, toward_zero(np.ldexp(np.where(finite, kept, 0), last)), plain)


class Machine:
    """The memory and registers of one launch."""

    def __init__(self, given: np.ndarray, out_words: int, cores: str = "H100"):
        self.warps = len(given)
        self.cores = cores
        self.given = np.ascontiguousarray(given, np.uint32).view(np.uint8).reshape(-1)
        self.result = np.full(self.warps * LANES * out_words * 4, 0xFF, np.uint8)
        self.shared = np.full((self.warps, SHARED_BYTES), 0xFF, np.uint8)
        self.registers: dict[str, np.ndarray] = {}
        self.open: list = []  # copies that are not in a group yet
        self.groups: list = []

    def run(self, code: list) -> np.ndarray:
        """Runs a kernel; the words of the result."""
        for opcode, operands in code:
            base = opcode.split(".")[0]
            if opcode.startswith("@") or base not in OPERATIONS:
                raise NotImplementedError(f"PTX: {opcode} {operands}")
            OPERATIONS[base](self, opcode.split(".")[1:], operands)
        if self.open or self.groups:
            raise RuntimeError("PTX: a kernel ends with copies in flight")
        return self.result.view(np.uint32)

    # ---- operands

    def value(self, operand: str) -> np.ndarray:
        """The bits of a register, special register, number or address of shared memory."""
        if operand == "%tid.x":
            return self.full(np.arange(LANES, dtype=np.uint64)[None])
        if operand == "%ctaid.x":
            return self.full(np.arange(self.warps, dtype=np.uint64)[:, None])
        if operand in self.registers:
            return self.registers[operand]
        if operand.startswith("0f"):
            return self.full(np.uint64(int(operand[2:], 16)))
        if re.fullmatch(r"-?\d+", operand):
            return self.full(np.array(int(operand), np.int64).view(np.uint64))
        if operand.endswith("sharedE"):
            return self.full(np.uint64(0))
        raise NotImplementedError(f"PTX: operand {operand}")

    def full(self, x) -> np.ndarray:
        return np.broadcast_to(x, (self.warps, LANES)).astype(np.uint64)

    def set(self, register: str, bits, width: int) -> None:
        self.registers[register] = np.asarray(bits).astype(np.uint64) & np.uint64(MASKS[width])

    def address(self, operand: str) -> np.ndarray:
        """Of "[%rd1+8]"."""
        base, _, offset = operand.strip("[]").partition("+")
        return self.value(base) + np.uint64(int(offset or 0))

    def bytes_at(self, space: str, address: np.ndarray, count: int):
        """Where `count` bytes lie: an array, and indices into it [warps, 32, count]."""
        at = address[..., None].astype(np.int64) + np.arange(count)
        if (address % np.uint64(count)).any():
            raise RuntimeError(f"PTX: an access to {space} memory is not aligned to {count} bytes")
        if space == "shared":
            return self.shared, (np.arange(self.warps)[:, None, None], at)
        return (self.given, at - GIVEN) if at.max() < RESULT else (self.result, at - RESULT)

    def load(self, space: str, address: np.ndarray, count: int) -> np.ndarray:
        """Bytes [warps, 32, count]."""
        memory, at = self.bytes_at(space, address, count)
        return np.ascontiguousarray(memory[at])

    def store(self, space: str, address: np.ndarray, data: np.ndarray) -> None:
        memory, at = self.bytes_at(space, address, data.shape[-1])
        memory[at] = data


def _width(suffix: str) -> int:
    return int(re.sub(r"\D", "", suffix))


def _signed(bits: np.ndarray, width: int) -> np.ndarray:
    return (bits << np.uint64(64 - width)).view(np.int64) >> np.int64(64 - width)


def _binary(function):
    def operation(machine: Machine, suffixes: list, operands: list) -> None:
        to, x, y = operands
        width = _width(suffixes[-1])
        machine.set(to, function(machine.value(x), machine.value(y)), width)

    return operation


def _mul(machine: Machine, suffixes: list, operands: list) -> None:
    to, x, y = operands
    width = _width(suffixes[-1])
    if suffixes == ["wide", "u32"]:
        mask = np.uint64(MASKS[32])
        machine.set(to, (machine.value(x) & mask) * (machine.value(y) & mask), 64)
    elif suffixes[0] == "lo":
        machine.set(to, machine.value(x) * machine.value(y), width)
    else:
        raise NotImplementedError(f"PTX: mul.{'.'.join(suffixes)}")


def _ld(machine: Machine, suffixes: list, operands: list) -> None:
    space, kind = suffixes[0], suffixes[-1]
    to, at = operands
    if space == "param":
        machine.set(to, machine.full(np.uint64(RESULT if at.endswith("+8]") else GIVEN)), 64)
        return
    count = _width(kind) // 8
    data = machine.load(space, machine.address(at), count)
    machine.set(to, data.view(f"u{count}")[..., 0], 8 * count)


def _st(machine: Machine, suffixes: list, operands: list) -> None:
    at, values = operands
    values = values if isinstance(values, list) else [values]
    count = _width(suffixes[-1]) // 8
    data = np.stack([machine.value(v) for v in values], -1).astype(f"u{count}")
    machine.store(suffixes[0], machine.address(at), data.view(np.uint8))


def _mov(machine: Machine, suffixes: list, operands: list) -> None:
    machine.set(operands[0], machine.value(operands[1]), _width(suffixes[-1]))


def _cvta(machine: Machine, suffixes: list, operands: list) -> None:
    machine.set(operands[0], machine.value(operands[1]), 64)


def _narrowed(x: np.ndarray, dtype, nan: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.ascontiguousarray(x).astype(dtype).view(np.uint16).astype(np.uint64)
    return np.where(np.isnan(x), np.uint64(nan), bits)


def _cvt(machine: Machine, suffixes: list, operands: list) -> None:
    to, x = operands[0], machine.value(operands[1])
    kind = ".".join(suffixes)
    if kind in ("u64.u32", "u16.u32", "u32.u16"):
        machine.set(to, x & np.uint64(MASKS[_width(suffixes[1])]), _width(suffixes[0]))
    elif kind == "f32.f16":
        machine.set(to, _words(x.astype(np.uint16).view(np.float16).astype(np.float32)), 32)
    elif kind in ("rn.bf16x2.f32", "rn.f16x2.f32"):
        dtype = ml_dtypes.bfloat16 if "bf16" in kind else np.float16
        high, low = (_narrowed(_floats(machine.value(o)), dtype, 0x7FFF) for o in operands[1:])
        machine.set(to, low | high << np.uint64(16), 32)
    elif kind == "rna.tf32.f32":
        special = x & np.uint64(0x7F800000) == np.uint64(0x7F800000)
        rounded = (x + np.uint64(0x1000)) & np.uint64(MASKS[32] ^ 0x1FFF)
        machine.set(to, np.where(special, x, rounded), 32)
    else:
        raise NotImplementedError(f"PTX: cvt.{kind}")


def _setp(machine: Machine, suffixes: list, operands: list) -> None:
    width = _width(suffixes[1])
    x, y = (_signed(machine.value(o), width) for o in operands[1:])
    compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "gt": np.greater}[suffixes[0]]
    machine.registers[operands[0]] = compare(x, y)


def _selp(machine: Machine, suffixes: list, operands: list) -> None:
    to, x, y, chosen = operands
    x, y = machine.value(x), machine.value(y)
    machine.set(to, np.where(machine.registers[chosen], x, y), _width(suffixes[-1]))


def _ex2(machine: Machine, suffixes: list, operands: list) -> None:
    x = _flushed(_floats(machine.value(operands[1]))).astype(np.float64)
    with np.errstate(over="ignore"):
        y = np.exp2(x).astype(np.float32)
    machine.set(operands[0], _words(_flushed(y)), 32)


def _lg2(machine: Machine, suffixes: list, operands: list) -> None:
    x = _flushed(_floats(machine.value(operands[1]))).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        machine.set(operands[0], _words(np.log2(x)), 32)


def _cp(machine: Machine, suffixes: list, operands: list) -> None:
    if suffixes == ["async", "commit_group"]:
        machine.groups.append(machine.open)
        machine.open = []
    elif suffixes == ["async", "wait_group"]:
        while len(machine.groups) > int(operands[0]):
            for to, data in machine.groups.pop(0):
                machine.store("shared", to, data)
    elif suffixes == ["async", "cg", "shared", "global"]:
        to, source, size, valid = operands
        data = machine.load("global", machine.address(source), int(size))
        left = machine.value(valid)[..., None] <= np.arange(int(size)).astype(np.uint64)
        machine.open.append((machine.address(to), np.where(left, np.uint8(0), data)))
    else:
        raise NotImplementedError(f"PTX: cp.{'.'.join(suffixes)}")


def _ldmatrix(machine: Machine, suffixes: list, operands: list) -> None:
    known = ["sync", "aligned", "m8n8", "x4", "shared", "b16"]
    if [s for s in suffixes if s != "trans"] != known:
        raise NotImplementedError(f"PTX: ldmatrix.{'.'.join(suffixes)}")
    rows = machine.load("shared", machine.address(operands[1]), 16).view(np.uint16)
    matrices = rows.reshape(machine.warps, 4, 8, 8)
    if "trans" in suffixes:
        matrices = matrices.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)  # [warps, 4, 8, 4]
    for i, to in enumerate(operands[0]):
        machine.set(to, pairs[:, i].reshape(machine.warps, LANES), 32)


def _mma(machine: Machine, suffixes: list, operands: list) -> None:
    shape, kinds = suffixes[2], suffixes[5:]
    to, a_registers, b_registers, d_registers = operands
    g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
    given_a, given_b = ([machine.value(r) for r in rs] for rs in (a_registers, b_registers))
    if (shape, kinds) == ("m16n8k8", ["f32", "tf32", "tf32", "f32"]):
        a, b = (np.zeros((machine.warps, *s), np.float32) for s in ((16, 8), (8, 8)))
        ignored = np.uint64(MASKS[32] ^ 0x1FFF)
        for i, x in enumerate(given_a):
            a[:, g + 8 * (i % 2), t + 4 * (i // 2)] = _floats(x & ignored)
        for i, x in enumerate(given_b):
            b[:, t + 4 * i, g] = _floats(x & ignored)
        least = -126
    elif shape == "m16n8k16" and kinds in (
        ["f32", "bf16", "bf16", "f32"],
        ["f32", "f16", "f16", "f32"],
    ):
        dtype = ml_dtypes.bfloat16 if kinds[1] == "bf16" else np.float16
        least = -126 if kinds[1] == "bf16" else -14
        a, b = (np.zeros((machine.warps, *s), np.float32) for s in ((16, 16), (16, 8)))
        for half in range(2):
            for i, x in enumerate(given_a):
                part = (x >> np.uint64(16 * half)).astype(np.uint16).view(dtype)
                a[:, g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = part
            for i, x in enumerate(given_b):
                part = (x >> np.uint64(16 * half)).astype(np.uint16).view(dtype)
                b[:, 2 * t + half + 8 * i, g] = part
    else:
        raise NotImplementedError(f"PTX: mma.{'.'.join(suffixes)}")
    d = np.zeros((machine.warps, 16, 8), np.float32)
    at = [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]
    for (row, column), register in zip(at, d_registers, strict=True):
        d[:, row, column] = _floats(machine.value(register))
    d = add_products(a, b, d, machine.cores, least)
    for (row, column), register in zip(at, to, strict=True):
        machine.set(register, _words(d[:, row, column]), 32)


def _nothing(machine: Machine, suffixes: list, operands: list) -> None:
    """All lanes are together already."""


OPERATIONS = {
    "add": _binary(lambda x, y: x + y),
    "and": _binary(lambda x, y: x & y),
    "xor": _binary(lambda x, y: x ^ y),
    "or": _binary(lambda x, y: x | y),
    "shl": _binary(lambda x, y: x << y),
    "shr": _binary(lambda x, y: x >> y),
    "mul": _mul,
    "mov": _mov,
    "cvta": _cvta,
    "cvt": _cvt,
    "setp": _setp,
    "selp": _selp,
    "ld": _ld,
    "st": _st,
    "ex2": _ex2,
    "lg2": _lg2,
    "cp": _cp,
    "bar": _nothing,
    "ldmatrix": _ldmatrix,
    "mma": _mma,
    "ret": _nothing,
}
