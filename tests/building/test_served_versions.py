"""Which versions of TensorFlow are served, and what the package says without one."""

import gzip
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
requirements = runpy.run_path(str(ROOT / "tools" / "requirements.py"))


def extra(name):
    (wanted,) = map(Requirement, requirements["extras"]()[name])
    return wanted


def test_the_list_of_served_versions_stands_in_one_place():
    served = requirements["served"]()
    assert served == sorted(served, key=lambda version: tuple(map(int, version.split("."))))
    build_files = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Dockerfile"]
    for folder in ("cmake", "tools", ".github"):
        build_files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    stated = {}
    for path in build_files:
        for line in path.read_text().splitlines():
            if re.search(r"tensorflow[^#]*\b2\.\d\d\b", line) and not line.startswith("#"):
                stated.setdefault(path.name, []).append(line)
    assert list(stated) == ["pyproject.toml"]
    assert len(stated["pyproject.toml"]) == 1


@pytest.mark.parametrize(
    ("name", "package", "extras"),
    [
        ("cpu", "tensorflow-cpu", set()),
        ("gpu", "tensorflow", {"and-cuda"}),
        ("tensorflow", "tensorflow", set()),
    ],
)
def test_the_extras_take_the_served_versions_and_no_other(name, package, extras):
    wanted, served = extra(name), requirements["served"]()
    assert (wanted.name, wanted.extras) == (package, extras)
    assert all(f"{version}.{patch}" in wanted.specifier for version in served for patch in (0, 7))
    major, minor = map(int, served[0].split("."))
    assert f"{major}.{minor - 1}.9" not in wanted.specifier
    major, minor = map(int, served[-1].split("."))
    assert f"{major}.{minor + 1}.0" not in wanted.specifier


def test_a_build_from_source_is_for_the_newest_unless_it_is_told(monkeypatch):
    monkeypatch.delenv("PERFORMER_TENSORFLOWS", raising=False)
    monkeypatch.delenv("PERFORMER_CUDA", raising=False)
    newest = requirements["served"]()[-1]
    assert any(r.startswith(f"tensorflow-cpu=={newest}.*;") for r in requirements["build"]())
    monkeypatch.setenv("PERFORMER_TENSORFLOWS", "/some/tensorflow")
    assert requirements["build"]() == []


WITHOUT = """
import sys
sys.modules["tensorflow"] = None  # not installed, as far as anyone can tell
import performer
from performer import reference
for code in ("performer.Performer", "from performer import generate", "performer.nonsense"):
    try:
        exec(code)
    except (ImportError, AttributeError) as error:
        print(type(error).__name__, error)
from performer.cli import main
print(main(["info"]))
"""


def test_without_tensorflow_the_package_says_how_to_get_it():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        check=True,
    )
    layer, function, nonsense, status = done.stdout.splitlines()
    for line, name in ((layer, "Performer"), (function, "generate")):
        assert line.startswith(f"ImportError performer.{name}: Performer needs TensorFlow")
        assert "pip install 'tensorflow-performer[cpu]'" in line
        assert "[gpu]" in line
    assert nonsense.startswith("AttributeError")
    assert status == "2"
    assert "tensorflow-performer[cpu]" in done.stderr


def test_the_same_sources_give_the_same_sdist(tmp_path, monkeypatch):
    archives = []
    for number in (1, 2):
        folder = tmp_path / f"source{number}" / "package"
        (folder / "tools").mkdir(parents=True)
        (folder / "cc").mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            (folder / name).write_bytes((ROOT / name).read_bytes())
        (folder / "MANIFEST.in").write_text("graft tools\ngraft cmake\n")
        for name in ("requirements.py", "cuda_requirements.py"):
            (folder / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
        (folder / "cmake").mkdir()
        (folder / "cmake" / "locate.py").write_bytes((ROOT / "cmake" / "locate.py").read_bytes())
        package = folder / "python" / "performer"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text('__version__ = "1.2.3"\n')
        os.utime(folder / "setup.py", (number * 1e9, number * 1e9))
        os.chmod(folder / "README.md", 0o600 if number == 1 else 0o644)
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / str(number)],
            cwd=folder,
            env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PERFORMER_TENSORFLOWS": "-"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        archives.append(tmp_path / str(number) / "tensorflow_performer-1.2.3.tar.gz")
    first, second = (archive.read_bytes() for archive in archives)
    assert first == second
    with tarfile.open(fileobj=gzip.open(archives[0])) as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {1700000000}
    assert {(member.uid, member.gid, member.uname) for member in members} == {(0, 0, "")}
    assert any(member.name.endswith("/tools/requirements.py") for member in members)


def test_the_shared_cuda_kernels_show_what_their_headers_mark():
    headers = "".join(path.read_text() for path in (ROOT / "cc" / "cuda").glob("*.h"))
    marked = re.findall(r"^PERFORMER_SHARED \w+ (\w+)\(", headers, re.MULTILINE)
    shown = re.findall(r"performer::cuda::(\w+)\*;", (ROOT / "cmake/exports_cuda.map").read_text())
    assert sorted(marked) == sorted(shown)
    called = set()
    for folder in ("cc/tf", "cc/bindings"):
        for path in (ROOT / folder).rglob("*.cc"):
            called |= set(re.findall(r"\bcuda::(\w+)\(", path.read_text()))
    assert called == set(marked)
