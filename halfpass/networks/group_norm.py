"""Group norms of what takes no gradient, such as what crossed in decoupled training or came out of frozen layers.

On a CPU, where the memory is channels last, PyTorch 2.13's backward pass of a group norm whose weights take a gradient
and whose input takes none ends the process. So the input gets a gradient, which nobody uses.
Tests: tests/test_replay.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions


def guard_group_norms(module: nn.Module) -> None:
    """All of its nn.GroupNorm get what `with_gradient` makes of their input."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm) and part.affine and _give_gradient not in part._forward_pre_hooks.values():
            part.register_forward_pre_hook(_give_gradient)


def with_gradient(x: Tensor) -> Tensor:
    """The same values, taking a gradient where they take none and are channels last."""
    order = CHANNELS_LAST.get(x.ndim)
    if order is None or x.requires_grad or not torch.is_grad_enabled() or not x.is_floating_point():
        return x
    return x.detach().requires_grad_() if x.is_contiguous(memory_format=order) and not x.is_contiguous() else x


def _give_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunction():  # no calls of the network's, which are counted
        if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            return args
        return tuple(with_gradient(value) if isinstance(value, Tensor) else value for value in args)
