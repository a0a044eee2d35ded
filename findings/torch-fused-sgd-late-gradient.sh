#!/bin/bash
# What one would expect: torch.optim.SGD(fused=True) does what SGD does, only faster.
# What happens: with momentum, a parameter that has its first gradient after the first step ends the step in a
#   TypeError, because it has no momentum yet where the others have one. The plain and the foreach SGD begin it there.
# For whom it matters: whoever trains a mixture of experts, layers that are skipped at random, or parameters that are
#   unfrozen later, by the same optimizer. A momentum buffer of zeros for them before the step is the same in value.
# Version: torch 2.13.0 (CPU). Date: 2026-11-29.
# Installs it in a temporary folder and runs it; fails where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --retries 0 \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch


def train(zeros=False, **kind):
    first, late = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([first, late], lr=0.1, momentum=0.9, **kind)
    for step in range(3):
        optimizer.zero_grad()
        first.grad = torch.ones(2)
        if step > 0:
            late.grad = torch.ones(2)
            if zeros:
                optimizer.state[late].setdefault("momentum_buffer", torch.zeros(2))
        optimizer.step()
    return late.detach().tolist()


print("torch", torch.__version__)
print("plain:                      ", train(foreach=False, fused=False))
print("foreach:                    ", train(foreach=True))
print("fused, momentum of zeros:   ", train(zeros=True, fused=True))
try:
    found = train(fused=True)
except TypeError as error:
    found = error
print("fused:                      ", repr(found))
assert train(foreach=True) == train(foreach=False, fused=False) == train(zeros=True, fused=True)
assert isinstance(found, TypeError), "changed: the fused step takes a gradient that comes late"
PYTHON
