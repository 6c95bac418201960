#!/bin/sh
# Makes a development environment: setup.sh PYTHON FOLDER. Says plainly what is missing.
# Quick when nothing has changed: the list of requirements is kept in the folder.
set -eu

python=$1
venv=$2
cd "$(dirname "$0")/.."

fail() {
  printf '\n%s\n' "$1" >&2
  printf '  %s\n' "$2" >&2
  exit 1
}

command -v "$python" >/dev/null 2>&1 ||
  fail "Python is missing: '$python' was not found." \
    "Install Python 3.10 to 3.13, or name one: make PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
  fail "Unsupported Python: $("$python" --version 2>&1). Performer runs on Python 3.10 to 3.13." \
    "Name another one: make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "Python's venv module is missing." "Debian, Ubuntu: apt-get install python3-venv"
"$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  fail "Python's headers are missing (Python.h)." \
    "Debian, Ubuntu: apt-get install python3-dev    Fedora: dnf install python3-devel"
compiler=${CXX:-c++}
printf '#include <optional>\nint main() { return std::optional<int>(0).value(); }\n' |
  $compiler -std=c++17 -x c++ - -o /dev/null 2>/dev/null ||
  fail "A working C++17 compiler is missing ('$compiler' was tried)." \
    "Debian, Ubuntu: apt-get install g++    Fedora: dnf install gcc-c++    or name one: make CXX=clang++"

if ! "$venv/bin/python" -c '' 2>/dev/null; then
  echo "Making $venv with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv" ||
    fail "The virtual environment could not be made." "Debian, Ubuntu: apt-get install python3-venv"
fi

wanted=$("$venv/bin/python" tools/requirements.py)
if [ "$wanted" != "$(cat "$venv/requirements.txt" 2>/dev/null)" ]; then
  echo "Installing TensorFlow and the tools of the project into $venv (up to 1 GB to download)"
  printf '%s\n' "$wanted" >"$venv/requirements.new"
  "$venv/bin/python" -m pip install --quiet --requirement "$venv/requirements.new" ||
    fail "pip could not install the requirements; its message is above." \
      "Without a network, give pip a mirror: PIP_INDEX_URL=... or PIP_NO_INDEX=1 PIP_FIND_LINKS=folder"
  mv "$venv/requirements.new" "$venv/requirements.txt"
fi
