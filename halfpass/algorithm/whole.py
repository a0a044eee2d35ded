"""The centralized baseline: the uncut network, trained end to end on all data in one place."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.arithmetic.precision import Arithmetic
from halfpass.seed import derive_seed


@dataclass
class Whole:
    model: nn.Module  # (B, ...) → (B, classes)
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy  # of logits (B, classes) and labels (B,), their mean


def whole_step(whole: Whole, x: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"], epoch: int, step: int) -> float:
    """One step of plain end-to-end training; returns the loss."""
    torch.manual_seed(derive_seed(whole.seed, "whole", epoch, step))
    whole.optimizer.zero_grad(set_to_none=True)
    inputs = whole.arithmetic.move(x), whole.arithmetic.move(labels)
    (loss,), _ = whole.arithmetic.run(_learn, whole, *inputs)
    whole.optimizer.step()
    return loss.item()


def _learn(whole: Whole, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Adds up the gradients of the loss; returns that loss."""
    with whole.arithmetic.autocast():
        logits = whole.model(x)
    loss = whole.loss(logits.float(), labels)
    loss.backward()
    return (loss.detach(),)


@torch.no_grad()
def evaluate(whole: Whole, x: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"]) -> int:
    """How many samples the network gets right; it must be in evaluation mode."""
    with whole.arithmetic.autocast():
        logits = whole.model(whole.arithmetic.move(x))
    return int((logits.argmax(1) == whole.arithmetic.move(labels)).sum())
