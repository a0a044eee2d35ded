"""CutBatch: the one type that crosses the cut, from the client half to the server half."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfpass.errors import InputError
from halfpass.tree import flatten, unflatten


@dataclass(frozen=True)
class CutBatch:
    """One batch at the cut, or a micro-batch of it.

    `tensors` are all values of samples that are alive across the cut, each `(B, ...)` and of any dtype, the named
    layer's output first; `whole` are those that are of the batch as a whole, such as a bias made of weights, and what
    Python read of the data below the cut. They carry no graph: whoever makes a CutBatch detaches them. `targets` is a
    tree of tensors, samples first: class numbers `(B,)`, int64, or whatever the task has.
    `client`, `epoch` and `step` count from 0; `step` counts within the client's epoch. The micro-batches of a step
    cross in their order, and both halves learn from them in one optimizer step. In a test `answers` are the
    probabilities that the auxiliary head gives, where there is one and the task has any.
    """

    client: int
    epoch: int
    step: int
    tensors: tuple[Tensor, ...]  # each (B, ...)
    targets: Any  # a tree of (B, ...)
    before: int = 0  # samples of the step's batch in the micro-batches before this one
    after: int = 0  # and in those after it
    answers: Tensor | None = None  # (B, outputs) float
    whole: tuple[Tensor, ...] = ()
    exact: frozenset[int] = frozenset()  # of `tensors`: floating point values that no codec may change, such as masks

    def __post_init__(self) -> None:
        place = f"cut batch of client {self.client}, epoch {self.epoch}, step {self.step}"
        if not self.tensors:
            raise InputError(place, "at least one tensor", "none", "cut where a value goes on to the server half")
        samples = len(self.tensors[0]) if self.tensors[0].ndim else 0
        for name, target in flatten(self.targets).items():
            if target.ndim < 1 or len(target) != samples or samples == 0:
                found = f"{tuple(target.shape)} of {target.dtype}"
                where = f"{place}, targets {name}".rstrip()
                raise InputError(where, f"those of {samples} samples, at least one", found, "send one per sample")
        for i, tensor in enumerate(self.tensors):
            if tensor.ndim < 1 or tensor.shape[0] != samples:
                raise InputError(
                    f"{place}, tensor {i}", f"values of {samples} samples",
                    f"{tuple(tensor.shape)} of {tensor.dtype}", "keep the batch as the first dimension",
                )
        for i, tensor in enumerate(self.crossing):
            if tensor.requires_grad:
                raise InputError(f"{place}, tensor {i}", "a detached tensor", "one with a graph", "detach() it first")
        if self.answers is not None and (self.answers.ndim != 2 or len(self.answers) != samples):
            found = f"{tuple(self.answers.shape)}"
            raise InputError(f"{place}, answers", f"({samples}, outputs)", found, "give one row per sample")

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def crossing(self) -> tuple[Tensor, ...]:
        """All that crosses, as the halves return and take it."""
        return *self.tensors, *self.whole

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
    if first.whole:
        found, remedy = f"{len(first.whole)} values of whole batches", "leave server.merge out, or cut at another layer"
        raise InputError("batches to merge", "values of samples alone", found, remedy)
    tensors = tuple(torch.cat(parts) for parts in zip(*(batch.tensors for batch in batches), strict=True))
    named = [flatten(batch.targets) for batch in batches]
    targets = unflatten({name: torch.cat([each[name] for each in named]) for name in named[0]})
    return CutBatch(first.client, first.epoch, first.step, tensors, targets)
