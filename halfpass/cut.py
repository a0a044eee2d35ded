"""CutBatch: the one type that crosses the cut, from the client half to the server half."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpass.errors import InputError


@dataclass(frozen=True)
class CutBatch:
    """One batch at the cut, or a micro-batch of it.

    `tensors` are all values that are alive across the cut, each `(B, ...)` and floating point, the named layer's
    output first. They carry no graph: whoever makes a CutBatch detaches them. `labels` is `(B,)`, int64.
    `client`, `epoch` and `step` count from 0; `step` counts within the client's epoch. The micro-batches of a step
    cross in their order, and both halves learn from them in one optimizer step. In a test `answers` are the class
    probabilities that the auxiliary head gives, where there is one.
    """

    client: int
    epoch: int
    step: int
    tensors: tuple[Tensor, ...]  # each (B, ...)
    labels: Tensor  # (B,) int64
    before: int = 0  # samples of the step's batch in the micro-batches before this one
    after: int = 0  # and in those after it
    answers: Tensor | None = None  # (B, classes) float

    def __post_init__(self) -> None:
        place = f"cut batch of client {self.client}, epoch {self.epoch}, step {self.step}"
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1 or len(self.labels) == 0:
            raise InputError(
                place, "labels (B,) of int64 with B > 0", f"{tuple(self.labels.shape)} of {self.labels.dtype}",
                "send class numbers, one per sample",
            )
        if not self.tensors:
            raise InputError(place, "at least one tensor", "none", "cut where a value goes on to the server half")
        for i, tensor in enumerate(self.tensors):
            if tensor.ndim < 1 or tensor.shape[0] != len(self.labels) or not tensor.is_floating_point():
                raise InputError(
                    f"{place}, tensor {i}", f"floating point values of {len(self.labels)} samples",
                    f"{tuple(tensor.shape)} of {tensor.dtype}", "keep the batch as the first dimension",
                )
            if tensor.requires_grad:
                raise InputError(f"{place}, tensor {i}", "a detached tensor", "one with a graph", "detach() it first")
        if self.answers is not None and (self.answers.ndim != 2 or len(self.answers) != len(self.labels)):
            found = f"{tuple(self.answers.shape)}"
            raise InputError(f"{place}, answers", f"({len(self.labels)}, classes)", found, "give one row per sample")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def last(self) -> bool:
        """Whether it completes its step's batch."""
        return self.after == 0

    @property
    def share(self) -> float:
        """Its part of the samples of its step's batch, and so of the mean loss over them."""
        return share_of_batch(self.before, len(self), self.after)


def share_of_batch(before: int, samples: int, after: int) -> float:
    """What so many samples are of a step's batch that has others before and after them."""
    return samples / (before + samples + after)


def merge(batches: Sequence[CutBatch]) -> CutBatch:
    """One batch of the samples of several whole ones, in their order, named like the first; of one, that itself."""
    first = batches[0]
    if len(batches) == 1:
        return first
    tensors = tuple(torch.cat(parts) for parts in zip(*(batch.tensors for batch in batches), strict=True))
    labels = torch.cat([batch.labels for batch in batches])
    return CutBatch(first.client, first.epoch, first.step, tensors, labels)
