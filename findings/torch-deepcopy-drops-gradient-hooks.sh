#!/bin/bash
# What one would expect: copy.deepcopy of a network trains as the network does.
# What happens: the copy keeps the hooks of modules, but the gradient hooks and Python attributes of its parameters are
#   gone, without a word. Rows that a gradient hook freezes in the original are trained in the copy.
# For whom it matters: whoever freezes a part of an embedding or masks gradients by Tensor.register_hook and copies the
#   network: for an average of weights (EMA), for federated clients, to check one training against another.
# Version: torch 2.13.0. Date: 2026-11-29.
# Installs it in a temporary folder and runs it; fails where the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import torch
from torch import nn


def frozen_first_row(gradient):
    return torch.cat([torch.zeros_like(gradient[:1]), gradient[1:]])


def first_row_moves(network):
    before = network.weight[0].detach().clone()
    network(torch.tensor([0, 1])).sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    return not torch.equal(before, network.weight[0])


network = nn.Embedding(3, 2)
network.weight.register_hook(frozen_first_row)
network.weight.rate = 0.5
network.register_forward_hook(lambda module, args, output: None)
twin = copy.deepcopy(network)
found = {
    "module hooks": (len(network._forward_hooks), len(twin._forward_hooks)),
    "attribute of the weight": (hasattr(network.weight, "rate"), hasattr(twin.weight, "rate")),
    "first row trains": (first_row_moves(network), first_row_moves(twin)),
}
print("torch", torch.__version__)
for what, (original, copied) in found.items():
    print(f"{what}: {original} in the original, {copied} in the copy")
expected = {
    "module hooks": (1, 1),
    "attribute of the weight": (True, False),
    "first row trains": (False, True),
}
assert found == expected, "changed"
PYTHON
