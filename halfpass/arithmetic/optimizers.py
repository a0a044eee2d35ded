"""Optimizers and learning-rate schedules.

A schedule is a pure function of the step, so that a client half that moves from client to client goes on where it
was, and so that a step can be repeated.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, nesterov: bool, weight_decay: float,
    fused: bool = True,
) -> torch.optim.Optimizer:  # fmt: skip
    """SGD with momentum, or AdamW, over all `parameters`; fused, which is faster and differs from the
    unfused ones in the last bit at most. PyTorch has no fused SGD of weights that are spread over processes."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    sgd = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, fused=fused
    )
    if momentum and fused:
        sgd.register_step_pre_hook(_begin_momentum)
    return sgd


def _begin_momentum(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """A momentum of zeros for what has its first gradient behind the first step, such as an expert that no sample went
    to: PyTorch's fused SGD fails there (findings/torch-fused-sgd-late-gradient.sh)."""
    if optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and "momentum_buffer" not in optimizer.state[parameter]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def learning_rate(schedule: str, peak: float, step: int, total: int) -> float:
    """Learning rate at `step` (from 0) of `total`.

    `cosine` falls from the peak to 0 (Loshchilov & Hutter, arXiv 1608.03983, eq. 5, one period). `one-cycle` rises
    linearly from peak/25 over the first 15 % and falls linearly to peak/250 000 (Smith & Topin, arXiv 1708.07120; it is
    torch.optim.lr_scheduler.OneCycleLR with these constants, better for ResNet-20 in 12 epochs than its own).
    """
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * step / total)) / 2
    if schedule == "one-cycle":
        start, end, turn = peak / 25, peak / 25e4, 0.15 * total - 1
        if step <= turn:
            return start + (peak - start) * step / turn
        return peak + (end - peak) * (step - turn) / (total - 1 - turn)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
