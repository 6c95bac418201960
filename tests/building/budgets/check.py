"""Static budgets of the CUDA kernels, read from their machine code: no GPU is needed.

    python tests/building/budgets/check.py [--library FILE] [--page docs/gpu.md]

For every kernel and architecture in the library (default: the installed performer._core):
registers, shared memory, blocks per multiprocessor, spills, and the instructions of its main loop,
beside the limits of limits.toml. Returns 1 where a limit is broken, and where a kernel has none.

Needs cuobjdump and nvdisasm (on PATH, or the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm)
and a C++ compiler, which gives the shared memory of a launch: it is no part of the machine code.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share ("Compute Capabilities" in the CUDA C++ Programming Guide)."""

    shared: int  # bytes
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    reserved: int = 1024  # bytes of shared memory that the system takes from each block


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * 1024),
    "sm_89": Multiprocessor(100 * 1024, warps=48, blocks=24),
    "sm_90": Multiprocessor(228 * 1024),
}


@dataclass
class Kernel:
    """One kernel of one architecture.

    Attributes:
        name: as in the source, "ReadKernel<BFloat16, 64>".
        loop: instructions by name in the main loop, the one with most tensor-core products (or,
            without any, with most instructions), with the loops and branches inside it.
        loop_spills: loads and stores of spilled registers in any loop.
        stack: bytes of a thread, spilled registers included.
        threads, shared: of a block; shared memory in bytes.
    """

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    loop_spills: int = 0
    loop: collections.Counter = field(default_factory=collections.Counter)
    threads: int = 0
    shared: int = 0

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at the same time; 0: not known."""
        if not self.threads:
            return 0
        return occupancy(self.architecture, self.registers, self.threads, self.shared)


def occupancy(architecture: str, registers: int, threads: int, shared: int) -> int:
    """Blocks per multiprocessor.

    Registers go to warps in units of 256 and are split over the four parts of a multiprocessor.
    """
    has = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = has.registers // 4 // of_a_warp * 4 // warps
    by_shared = has.shared // (shared + has.reserved)
    return min(by_registers, by_shared, has.warps // warps, has.blocks)


def tool(name: str) -> str:
    """The path of cuobjdump, nvdisasm or c++filt."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec and not found else ():
        found = next((str(path) for path in Path(folder).glob(f"cu*/bin/{name}")), None)
    if found is None:
        raise SystemExit(f"budgets: {name} is missing: python -m pip install nvidia-cuda-{name}")
    return found


def run(*command: str | Path, given: str | None = None) -> str:
    """Standard output of a program."""
    path = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    found = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        text=True,
        input=given,
        env={**os.environ, "PATH": path},
    )
    if found.returncode != 0:
        raise SystemExit(f"budgets: {command[0]} failed:\n{found.stderr}")
    return found.stdout


_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*)")


def kernels_of(library: Path, architecture: str) -> list[Kernel]:
    """The kernels that a library holds for an architecture, but for threads and shared memory."""
    dump = run(tool("cuobjdump"), "-arch", architecture, "-sass", library)
    usage = run(tool("cuobjdump"), "-arch", architecture, "--dump-resource-usage", library)
    found: dict[str, Kernel] = {}
    for mangled, registers, stack in re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", usage):
        found[mangled] = Kernel(mangled, architecture, int(registers), int(stack))
    code: dict[str, list] = {}
    lines: list = []
    for line in dump.splitlines():
        if "Function : " in line:
            lines = code.setdefault(line.split("Function : ")[1].strip(), [])
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands = match.groups()
            lines.append((int(address, 16), bool(guard), opcode, operands.strip()))
    names = run("c++filt", given="\n".join(found)).splitlines()
    for (mangled, kernel), name in zip(found.items(), names, strict=True):
        kernel.name = short(name)
        count(kernel, code[mangled])
    return sorted(found.values(), key=lambda kernel: kernel.name)


def short(name: str) -> str:
    """ "ReadKernel<BFloat16, 64>" of a demangled "void performer::cuda::ReadKernel<...>(...)"."""
    name = re.sub(r"performer::(cuda::)?|^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def count(kernel: Kernel, code: list) -> None:
    """Counts instructions in loops, and spills."""
    is_spill = [opcode.split(".")[0] in ("LDL", "STL") for _, _, opcode, _ in code]
    kernel.spills = sum(is_spill)
    loops = loops_of(code)
    everything: set[int] = set().union(*loops) if loops else set()
    kernel.loop_spills = sum(is_spill[i] for i in everything)
    kernel.loop = max(
        (collections.Counter(operation(code[i][2]) for i in loop) for loop in loops),
        key=lambda names: (names["HMMA"], names.total()),
        default=collections.Counter(),
    )


def operation(opcode: str) -> str:
    """The name that is counted: MUFU by its function, others without their variants."""
    return ".".join(opcode.split(".")[: 2 if opcode.startswith("MUFU") else 1])


def loops_of(code: list) -> list[set[int]]:
    """The outermost loops of a kernel, as sets of indices of instructions.

    A loop is a set of instructions each of which may be followed by any other one: a jump to a
    lower address alone is none, since rarely taken branches lie behind the code and jump back.
    """
    following = successors(code)
    order: list[int] = []  # Kosaraju's algorithm; without recursion, kernels are long
    seen: set[int] = set()
    for start in range(len(code)):
        stack = [(start, iter(following[start]))] if start not in seen else []
        seen.add(start)
        while stack:
            _, rest = stack[-1]
            after = next((n for n in rest if n not in seen), None)
            if after is None:
                order.append(stack.pop()[0])
            else:
                seen.add(after)
                stack.append((after, iter(following[after])))
    before: list[list[int]] = [[] for _ in code]
    for n, after_n in enumerate(following):
        for m in after_n:
            before[m].append(n)
    loops, taken = [], set()
    for start in reversed(order):
        part, waiting = set(), [start]
        while waiting:
            n = waiting.pop()
            if n not in taken:
                taken.add(n)
                part.add(n)
                waiting += before[n]
        if len(part) > 1:
            loops.append(part)
    return loops


def successors(code: list) -> list[list[int]]:
    """For each instruction the indices of those that may come next.

    A call may go either way, to its target or past it: it is also used for jumps without return.
    """
    at = {address: i for i, (address, *_) in enumerate(code)}
    found: list[list[int]] = []
    for i, (_, guarded, opcode, operands) in enumerate(code):
        name = opcode.split(".")[0]
        after = []
        target = re.search(r"0x([0-9a-f]+)$", operands) if name in ("BRA", "CALL", "JMP") else None
        if target and int(target.group(1), 16) in at:
            after.append(at[int(target.group(1), 16)])
        # "BRA.DIV UR4, 0x90" and "BRA.U UP0, 0x90" depend on their first operand.
        always = name != "CALL" and operands.startswith("0x")
        ends = name in ("EXIT", "RET", "BRX") or (target and always)
        if (guarded or not ends) and i + 1 < len(code):
            after.append(i + 1)
        found.append(after)
    return found


def add_launches(kernels: list[Kernel], table: dict) -> None:
    """Fills in threads and shared memory: constants of the class that a kernel's family names."""
    lines, asked = [], []
    for kernel in kernels:
        family = table["families"].get(kernel.name.split("<")[0], {})
        kernel.threads = family.get("threads", 0)
        if "launch" in family:
            launch = family["launch"] + kernel.name[kernel.name.index("<") :]
            lines.append(f'std::printf("%d %d\\n", {launch}::kThreads, {launch}::kBytes);')
            asked.append(kernel)
    headers = sorted({f["header"] for f in table["families"].values() if "header" in f})
    program = "\n".join(
        [
            "#include <cstdio>",
            *(f'#include "{header}"' for header in headers),
            "using namespace performer::cuda;",
            *("int main() {", *lines, "}"),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "launches.cc"), Path(folder, "launches")
        source.write_text(program)
        compiler = os.environ.get("CXX", "c++").split()
        flags = ("-std=c++17", "-w", "-O1", "-ffunction-sections", "-Wl,--gc-sections")
        run(*compiler, *flags, f"-I{ROOT / 'cc'}", source, "-o", binary)
        for kernel, line in zip(asked, run(binary).splitlines(), strict=True):
            kernel.threads, kernel.shared = map(int, line.split())


def faults(kernel: Kernel, table: dict) -> list[str]:
    """What breaks the limits; the first entry whose pattern is the kernel's name counts."""
    limits = next(
        (x for x in table["limits"] if re.fullmatch(x["kernel"], kernel.name)),
        None,
    )
    if limits is None or not kernel.threads:
        return ["no entry in limits.toml"]
    found = []
    of = limits | limits.get(kernel.architecture, {})
    for name, value in (
        ("registers", kernel.registers),
        ("shared", kernel.shared),
        ("stack", kernel.stack),
        ("loop_spills", kernel.loop_spills),
    ):
        if value > of.get(name, 0 if name != "shared" else value):
            found.append(f"{name} {value}, at most {of.get(name, 0)}")
    if kernel.blocks < of["blocks"]:
        found.append(f"{kernel.blocks} blocks per multiprocessor, at least {of['blocks']}")
    for name, least in of.get("loop_least", {}).items():
        if kernel.loop[name] < least:
            found.append(f"{kernel.loop[name]} {name} in the main loop, at least {least}")
    for name, most in of.get("loop_most", {}).items():
        value = kernel.loop.total() if name == "all" else kernel.loop[name]
        if value > most:
            found.append(f"{value} {name} in the main loop, at most {most}")
    return found


COLUMNS = (
    *("kernel", "", "registers", "stack, bytes", "spills in loops", "shared, KiB", "threads"),
    *("blocks/SM", "HMMA", "LDSM", "LDS", "EX2", "all"),
)


def rows(kernels: list[Kernel]) -> list[tuple[str, ...]]:
    """The table; the last five columns count instructions of the main loop."""
    return [
        (
            *(k.name, k.architecture, str(k.registers), str(k.stack), str(k.loop_spills)),
            *(f"{k.shared / 1024:.1f}", str(k.threads), str(k.blocks)),
            *(str(k.loop[name]) for name in ("HMMA", "LDSM", "LDS", "MUFU.EX2")),
            str(k.loop.total()),
        )
        for k in kernels
    ]


BEGIN, END = "<!-- budgets: begin -->", "<!-- budgets: end -->"


def filled(page: str, kernels: list[Kernel]) -> str:
    """A page with the table of the kernels with products between its marks; half is as bfloat16."""
    shown = [k for k in kernels if k.loop["HMMA"] and "<Half" not in k.name]
    marks = [":--"] * 2 + ["--:"] * (len(COLUMNS) - 2)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, marks, *rows(shown)))
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def print_table(kernels: list[Kernel]) -> None:
    """Prints it in aligned columns."""
    lines = (COLUMNS, *rows(kernels))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = enumerate(zip(line, widths, strict=True))
        print("  ".join(text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in cells))


def default_library() -> Path:
    """The installed module of the core."""
    spec = importlib.util.find_spec("performer")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec else ROOT
    found = sorted(folder.glob("_core*.so"))
    if not found:
        raise SystemExit(f"budgets: no compiled module in {folder}; build it first")
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="default: the installed performer._core")
    parser.add_argument("--page", type=Path, help="also put the table between the marks of a page")
    options = parser.parse_args(arguments)
    library = options.library or default_library()
    table = tomllib.loads((Path(__file__).parent / "limits.toml").read_text())
    with concurrent.futures.ProcessPoolExecutor(len(ARCHITECTURES)) as pool:  # each takes a minute
        parts = pool.map(functools.partial(kernels_of, library), ARCHITECTURES)
        kernels = [kernel for part in parts for kernel in part]
    if not kernels:
        print(f"budgets: {library} holds no CUDA kernels", file=sys.stderr)
        return 1
    add_launches(kernels, table)
    kernels.sort(key=lambda kernel: (kernel.name, kernel.architecture))
    print_table(kernels)
    if options.page:
        options.page.write_text(filled(options.page.read_text(), kernels))
    broken = [(kernel, fault) for kernel in kernels for fault in faults(kernel, table)]
    for kernel, fault in broken:
        print(f"over budget: {kernel.name} {kernel.architecture}: {fault}", file=sys.stderr)
    print(f"budgets: {len(kernels)} kernels, {len(broken)} over", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
