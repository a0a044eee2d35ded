#!/usr/bin/env bash
# Expected: get_optimizer_state_dict of torch.distributed.checkpoint.state_dict reads what an optimizer remembers, and
#   changes nothing. Asked before the first step, it says that there is nothing yet, or zeros.
# What happens: of an optimizer without memory it makes a step, with a learning rate of 0 and gradients of 0, so that
#   there is something to give. SGD adds weight decay to those gradients before its momentum: from then on the momentum
#   is decay × weights instead of nothing. The weights stay as they were, and so nothing is seen, but the coming steps are
#   others than they would have been without the look.
# For whom: whoever writes a checkpoint before the first step (to name a run, to prove that the disk can be written), or
#   compares a run that was gone on with from there with one that was not. FSDP's users are told to use this function.
# Version: torch 2.13.0. Date: 2026-12-01.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.1
"$work/env/bin/python" - <<'PYTHON'
import copy

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def trained(look: bool) -> tuple[list, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    if look:
        get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    memory = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return memory, model.weight.detach().clone()


print("torch", torch.__version__)
memory, plain = trained(False)
print("momentum before the first step:", memory)
memory, looked = trained(True)
print("after get_optimizer_state_dict:", memory)
print("weights after three steps apart by", float((plain - looked).abs().max()))
assert torch.__version__.startswith("2.13.0")
assert float((plain - looked).abs().max()) > 1e-4, "the look changes nothing any more"
PYTHON
