#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml allows into a new environment, and runs a part of the tests with them.
# make lower-bounds; or: release/lower_bounds.sh [FOLDER for the environment [pytest's arguments]]
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp --directory)}
shift || true
${PYTHON:-python3} -m venv "$work/venv"
# name>=1.2 or name[extra]>=1.2,<3 → name==1.2; the tools of the tests, which nobody else installs, are the newest.
"$work/venv/bin/python" - > "$work/lowest.txt" <<'PYTHON'
import re, tomllib

for wanted in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]:
    name, version = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)(?:,<[\d.]+)?", wanted).groups()
    print(f"{name}=={version}")
PYTHON
cat "$work/lowest.txt"
"$work/venv/bin/pip" install --quiet --no-compile --constraint "$work/lowest.txt" --editable '.[test]'
"$work/venv/bin/pip" check
[ $# -gt 0 ] || set -- tests/test_invariants.py tests/test_wire.py tests/test_codec.py tests/test_store.py tests/test_tasks.py \
    tests/test_report.py tests/test_settings.py tests/test_trust.py tests/test_readme.py tests/test_cli.py
"$work/venv/bin/python" -m pytest -q "$@"
