#!/bin/bash
# What one would expect: a type check of arguments changes nothing but whether an error is raised.
# What happens: beartype checks one element of a list, chosen by Python's global `random`. A call with a list argument
#   moves that generator on, so a program seeded with random.seed() draws other numbers once its functions are checked.
# For whom it matters: whoever compares a seeded training with checks on and off, or tests with beartype (also through
#   jaxtyping's import hook) what runs without it.
# Version: beartype 0.22.9. Date: 2026-11-29.
# Installs it in a temporary folder and runs it; fails where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps beartype==0.22.9
"$folder/venv/bin/python" - <<'PYTHON'
import random

import beartype


def plain(values: list[int]) -> int:
    return len(values)


def drawn_after(function, values):
    random.seed(0)
    function(values)
    return [random.randrange(1000) for _ in range(3)]


checked = beartype.beartype(plain)
without, with_list = drawn_after(plain, [1, 2, 3]), drawn_after(checked, [1, 2, 3])
print("beartype", beartype.__version__)
print("seed 0, a call of the plain function, then three draws:  ", without)
print("seed 0, a call of the checked function, then three draws:", with_list)
assert without != with_list, "changed: the type check no longer draws from the global generator"
PYTHON
