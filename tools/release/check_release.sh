#!/usr/bin/env bash
# Checks that a tag may be released: check_release.sh v1.2.3. The version is that of the package, which
# stands in python/performer/__init__.py and nowhere else, and CHANGELOG.md says what is new in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/performer/__init__.py)
[[ $1 == "v$version" ]] || { echo "the tag is $1, and the version is $version" >&2; exit 1; }
grep -qE "^## \[${version//./\\.}\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md ||
  { echo "CHANGELOG.md has no dated section [$version]" >&2; exit 1; }
