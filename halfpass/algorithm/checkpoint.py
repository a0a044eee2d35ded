"""What modules and their optimizer hold between two steps: all that is needed to go on as if nothing had been."""

from typing import Any

import torch
from torch import nn


def training_state(optimizer: torch.optim.Optimizer, *modules: nn.Module | None) -> dict[str, Any]:
    """Weights, buffers and the optimizer's memory. The tensors are those that are trained on, not copies."""
    return {"optimizer": optimizer.state_dict(), "modules": [m and m.state_dict() for m in modules]}


def load_training_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, *modules: nn.Module | None) -> None:
    """The inverse of `training_state`, from any device. Tensors of the optimizer keep the storage order that they have
    in `state`, which must be that of their parameters: fused optimizers go through memory in order."""
    for module, values in zip(modules, state["modules"], strict=True):
        if module is not None:
            module.load_state_dict(values)
    optimizer.load_state_dict(state["optimizer"])
