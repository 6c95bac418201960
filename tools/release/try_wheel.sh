#!/usr/bin/env bash
# Installs a wheel into clean environments and runs tools/smoke.py in each: try_wheel.sh WHEEL [PYTHON...]
# For each Python (python3) and each TensorFlow that is served, or the versions in TENSORFLOWS, a
# requirement each, such as "2.21.*". Prints for each how long it takes, with TensorFlow installed, to
# install the wheel and to get the first attention output.
set -euo pipefail
tools=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
shift
(($#)) || set -- python3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

failed=0
for base in "$@"; do
  for version in ${TENSORFLOWS:-$("$base" -m venv "$work/list" >&2 &&
    "$work/list/bin/python" -c 'import runpy, sys
print(*(f"{v}.*" for v in runpy.run_path(sys.argv[1])["served"]()))' "$tools/requirements.py")}; do
    rm -rf "$work/venv"
    "$base" -m venv "$work/venv"
    python=$work/venv/bin/python
    name="$("$python" --version), TensorFlow $version"
    if ! "$python" -m pip install --quiet "tensorflow-cpu==$version" >"$work/log" 2>&1; then
      echo "== $name: no such package for this Python"
      tail -n 1 "$work/log"
      failed=1
      continue
    fi
    cd "$work"
    start=$(date +%s.%N)
    "$python" -m pip install --quiet "$wheel" >"$work/log" 2>&1 || { cat "$work/log"; failed=1; continue; }
    TF_CPP_MIN_LOG_LEVEL=3 "$python" -c 'import numpy as np, performer
x = np.ones((1, 64, 2, 16), "float32")
performer.favor_attention(x, x, x, np.ones((32, 16), "float32"), causal=True)' >"$work/log" 2>&1 ||
      { cat "$work/log"; failed=1; continue; }
    end=$(date +%s.%N)
    if TF_CPP_MIN_LOG_LEVEL=3 "$python" "$tools/smoke.py" >"$work/log" 2>/dev/null; then
      echo "== $name: passed; first output $(echo "$end $start" | awk '{printf "%.1f", $1 - $2}') s after TensorFlow"
    else
      echo "== $name: FAILED"
      failed=1
    fi
    grep -v '^[WIE0-9]' "$work/log" | sed 's/^/   /'
  done
done
exit $failed
