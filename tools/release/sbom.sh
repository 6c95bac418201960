#!/usr/bin/env bash
# Writes what a wheel installs, in CycloneDX's format: sbom.sh WHEEL FILE
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/tools"
python3 -m venv "$work/installed"
"$work/tools/bin/python" -m pip install --quiet 'cyclonedx-bom>=5'
"$work/installed/bin/python" -m pip install --quiet "$(realpath "$1")[cpu]"
"$work/installed/bin/python" -m pip uninstall --quiet --yes pip
"$work/tools/bin/cyclonedx-py" environment --output-reproducible --output-format JSON \
  --output-file "$2" "$work/installed/bin/python"
