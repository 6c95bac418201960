"""Lets this machine's compiler link for an older Linux: old_symbols.py FOLDER.

Writes stand-ins of the C and C++ runtime into FOLDER that show only what is there in glibc 2.28 and
GCC 8, which are those of manylinux_2_28: of every function the newest version that is old enough.
`-L FOLDER` makes the linker take them; a function that is too new is then an undefined symbol, and
the link fails. At run time nothing of FOLDER is needed. (The libraries keep their old versions, so
they are read from those of this machine.)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LIBRARIES = {"libc.so": "libc.so.6", "libm.so": "libm.so.6", "libstdc++.so": "libstdc++.so.6"}
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
# What newer headers call, and a wheel can bring along. The second says whether the program has a
# single thread, in which std::shared_ptr does without atomic operations.
BROUGHT_ALONG = """
#include <new>
namespace std { void __throw_bad_array_new_length() { throw bad_array_new_length(); } }
extern "C" { char __libc_single_threaded = 0; }
"""
SYMBOL = re.compile(
    r"\s+(FUNC|IFUNC|OBJECT)\s+(?:GLOBAL|WEAK|UNIQUE)\s+\S+\s+\d+ ([\w.]+)@@?(\w+?)_([\d.]+)\s"
)


def run(*command: object) -> str:
    """Runs a program and returns what it prints."""
    return subprocess.run(
        [*map(str, command)], check=True, capture_output=True, text=True, encoding="utf-8"
    ).stdout.strip()


def symbols(library: str) -> dict[str, tuple[str, str]]:
    """Returns the type and the version of each symbol that is old enough."""
    found: dict[str, tuple[tuple[int, ...], str, str]] = {}
    for kind, name, family, number in SYMBOL.findall(
        run("readelf", "--dyn-syms", "--wide", library)
    ):
        version = tuple(map(int, number.split(".")))
        if version <= NEWEST.get(family, ()):
            found[name] = max(found.get(name, ((), "", "")), (version, f"{family}_{number}", kind))
    return {name: (kind, node) for name, (_, node, kind) in found.items()}


def write_stand_in(library: str, path: Path) -> None:
    """Writes a shared library that has the symbols of `library`, and does nothing."""
    source, script = path.with_name(path.name + ".s"), path.with_name(path.name + ".map")
    lines, nodes = [".text"], set()
    for number, (name, (kind, node)) in enumerate(sorted(symbols(library).items())):
        type_ = "@object" if kind == "OBJECT" else "@function"
        lines += [f".globl s{number}", f".type s{number}, {type_}", f"s{number}: .long 0"]
        lines += [f".size s{number}, 4", f".symver s{number}, {name}@@{node}"]
        nodes.add(node)
    source.write_text("\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""]))
    script.write_text(
        "".join(f"{node} {{ }};\n" for node in sorted(nodes)) + "HIDDEN { local: s*; };\n"
    )
    run("cc", "-shared", "-nostdlib", f"-Wl,-soname,{path.name}", f"-Wl,--version-script={script}",
        source, "-o", path)  # fmt: skip


def write_loader(folder: Path) -> Path:
    """Writes a stand-in of the loader, which has `__tls_get_addr`; libc.so names it."""
    script = Path(run("c++", "-print-file-name=libc.so")).read_text(encoding="utf-8")
    loader = Path(re.search(r"AS_NEEDED \(\s*(\S+)\s*\)", script)[1])
    write_stand_in(str(loader), folder / loader.name)
    return folder / loader.name


def main(folder: Path) -> None:
    """Writes all that the linker asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    along = folder / "along.cc"
    along.write_text(BROUGHT_ALONG)
    run("c++", "-O2", "-fPIC", "-fvisibility=hidden", "-c", along, "-o", folder / "along.o")
    (folder / "libalong.a").unlink(missing_ok=True)
    run("ar", "rcsD", folder / "libalong.a", folder / "along.o")
    for asked, name in LIBRARIES.items():
        write_stand_in(run("c++", f"-print-file-name={name}"), folder / name)
        inputs: list[Path | str] = [folder / name]
        if asked == "libc.so":
            inputs.append(Path(run("c++", "-print-file-name=libc_nonshared.a")))
            inputs.append(f"AS_NEEDED({write_loader(folder)})")
        if asked == "libstdc++.so":
            inputs.append(folder / "libalong.a")
        (folder / asked).write_text(f"INPUT({' '.join(map(str, inputs))})\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve())
