"""What is linked here for publication runs on Linux of 2018 (manylinux_2_28)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
]
OLD = """
#include <cmath>
#include <condition_variable>
#include <memory>
#include <thread>
#include <vector>
thread_local double kept;  // which the loader finds
double* of_thread() { return &kept; }
double calls(double x, int n) {
  std::vector<double> v(n);
  auto shared = std::make_shared<double>(std::exp2(x) + std::log2(x) + std::pow(x, x));
  std::thread thread([&] { v[0] = *shared; });
  thread.join();
  std::mutex mutex;
  std::condition_variable condition;
  std::unique_lock<std::mutex> lock(mutex);
  condition.wait(lock);
  return v[0];
}
"""
NEW = '#include <filesystem>\nbool calls() { return std::filesystem::exists("x"); }'  # GCC 9


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    script = ROOT / "tools" / "release" / "old_symbols.py"
    subprocess.run([sys.executable, script, folder], check=True)
    return folder


def link(folder, code, *arguments):
    (folder / "code.cc").write_text(code)
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wl,--no-undefined", "-pthread"]
    return subprocess.run(
        ["c++", *options, *arguments, folder / "code.cc", "-o", folder / "code.so"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_library_needs_nothing_newer(tmp_path, stand_ins):
    done = link(tmp_path, OLD, f"-L{stand_ins}")
    assert done.returncode == 0, done.stderr
    read = subprocess.run(
        ["readelf", "--version-info", tmp_path / "code.so"], capture_output=True, text=True
    ).stdout
    needed = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", read)
    assert {family for family, _ in needed} == {"GLIBC", "GLIBCXX", "CXXABI"}
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
    for family, version in needed:
        assert tuple(map(int, version.split("."))) <= newest[family], (family, version)


def test_what_is_newer_does_not_link(tmp_path, stand_ins):
    assert link(tmp_path, NEW).returncode == 0  # the compiler knows it
    done = link(tmp_path, NEW, f"-L{stand_ins}")
    assert done.returncode != 0
    assert "undefined reference to" in done.stderr
    assert "filesystem" in done.stderr
