#!/bin/bash
# What one would expect: what runs on a CPU tensor also runs on a fake one (FakeTensorMode), which torch.export and
#   torch.compile use to learn sizes and types.
# What happens: torch.nn.functional.grouped_mm multiplies float32 on a CPU, but on fake tensors of the same sizes and
#   types it raises an error: it wants bfloat16.
# For whom it matters: whoever exports, compiles or measures a mixture of experts on a CPU; transformers 5 computes
#   Mixtral's experts by it.
# Version: torch 2.13.0. Date: 2026-11-29.
# Installs it in a temporary folder and runs it; fails where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import grouped_mm


def product():
    rows, experts = torch.ones(8, 16), torch.ones(2, 16, 16)
    return grouped_mm(rows, experts, offs=torch.tensor([4, 8], dtype=torch.int32))


print("torch", torch.__version__)
real = product()
print("on a CPU:", tuple(real.shape), real.dtype)
try:
    with FakeTensorMode():
        product()
    said = None
except Exception as error:
    said = f"{type(error).__name__}: {error}".splitlines()[0]
print("on fake tensors of the same kind:", said)
assert said is not None, "changed: fake tensors take what the CPU takes"
PYTHON
