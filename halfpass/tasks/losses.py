"""Losses of the tasks, as modules: what they hold, such as weights, moves to a side's device with them."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEVER = -100  # PyTorch's own ignore_index: no class number


class CrossEntropy(nn.Module):
    """F.cross_entropy, where `classes_last` of (B, T, classes). What is ignored has no part in the mean; where all of a
    batch is, the loss is 0."""

    def __init__(
        self, weight: Tensor | None = None, ignore_index: int | None = None, label_smoothing: float = 0.0,
        classes_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing, self.classes_last = ignore_index, label_smoothing, classes_last

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.classes_last:
            outputs = outputs.movedim(-1, 1)
        if targets.ndim > 1:  # masks are kept as bytes
            targets = targets.long()
        ignored = NEVER if self.ignore_index is None else self.ignore_index
        weight = self.get_buffer("weight") if self._buffers["weight"] is not None else None
        loss = F.cross_entropy(
            outputs, targets, weight, ignore_index=ignored, label_smoothing=self.label_smoothing
        )
        if self.ignore_index is None:
            return loss
        return torch.where((targets != ignored).any(), loss, outputs.sum() * 0)


class BinaryCrossEntropy(nn.Module):
    """Of (B, labels), the mean over the labels that are known: those that are NaN are not."""

    def __init__(self, weight: Tensor | None, positive_weight: Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("positive_weight", positive_weight)
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.float()
        known = ~targets.isnan()
        smoothed = targets.nan_to_num() * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(
            outputs, smoothed, self._buffers["weight"], pos_weight=self._buffers["positive_weight"], reduction="none"
        )
        return mean_of_known(losses, known)


class Distance(nn.Module):
    """Of (B, columns), the mean over the values that are known: those that are NaN are not."""

    FUNCTIONS: ClassVar[dict[str, Callable[..., Tensor]]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}

    def __init__(self, name: str, weight: Tensor | None) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("weight", weight)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.dtype).reshape(outputs.shape)  # (B,) is (B, 1)
        losses = self.FUNCTIONS[self.name](outputs, targets.nan_to_num(), reduction="none")
        weight = self._buffers["weight"]
        return mean_of_known(losses if weight is None else losses * weight, ~targets.isnan())


def mean_of_known(losses: Tensor, known: Tensor) -> Tensor:
    """0 where none is."""
    return (losses * known).sum() / known.sum().clamp(min=1)
