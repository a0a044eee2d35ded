"""The centralized baseline: the uncut network, trained end to end on all data in one place."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.algorithm.learning import Loss, check_outputs, check_step, check_targets, mean_loss
from halfpass.arithmetic.precision import Arithmetic
from halfpass.seed import derive_seed, seed_python
from halfpass.tree import call, prediction


@dataclass
class Whole:
    model: nn.Module  # (B, ...) → outputs (B, ...)
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    seed: int = 0
    loss: Loss = cross_entropy  # of outputs and targets: their mean, or a value per sample


def whole_step(whole: Whole, x: Any, targets: Any, epoch: int, step: int) -> float:
    """One step of plain end-to-end training; returns the loss."""
    check_targets(x, targets)
    torch.manual_seed(derive_seed(whole.seed, "whole", epoch, step))
    seed_python(whole.seed, 0, epoch, step, 0)
    whole.optimizer.zero_grad(set_to_none=True)
    inputs = whole.arithmetic.move(x), whole.arithmetic.move(targets)
    (loss,), _ = whole.arithmetic.run(_learn, whole, *inputs)
    found = check_step("whole network", epoch, step, loss, (), whole.optimizer)
    whole.optimizer.step()
    return found


def _learn(whole: Whole, x: Any, targets: Any) -> tuple[Tensor, ...]:
    """Adds up the gradients of the loss; returns that loss."""
    with whole.arithmetic.autocast():
        outputs = call(whole.model, x)
    loss = mean_loss(whole.loss, outputs, targets)
    loss.backward()
    return (loss.detach(),)


@torch.no_grad()
def evaluate(whole: Whole, x: Any, epoch: int = 0, step: int = 0) -> Tensor:
    """The network's outputs; it must be in evaluation mode. Raises RunError where one is not finite."""
    with whole.arithmetic.autocast():
        outputs: Tensor = prediction(call(whole.model, whole.arithmetic.move(x))).float()
    check_outputs("whole network", epoch, step, outputs)
    return outputs
