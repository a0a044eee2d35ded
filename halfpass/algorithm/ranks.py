"""A server half that several processes train together, each on a device of its own: data parallelism.

Each learns from its part of a batch's samples, and PyTorch's DistributedDataParallel gives all of them the mean of
their gradients (Li et al., arXiv 2006.15704), so that every one makes the same step. Parts count by their samples. That
is the step of one process on the whole batch, to rounding, where a sample's loss depends on no other sample. It does
with BatchNorm, which normalizes each part by itself on CPUs; on GPUs it becomes SyncBatchNorm and sees the whole batch.
"""

from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halfpass.algorithm.server import Server
from halfpass.cut import CutBatch
from halfpass.tree import map_leaves, prediction

MIN_PART = 2  # samples that BatchNorm can normalize


@dataclass(frozen=True)
class Part:
    """What one process learns from: some of a batch's samples, or all of them where they are too few for everyone."""

    batch: CutBatch
    rank: int
    share: float  # of the batch's loss; those of all processes are 1
    weight: float  # of its gradients in the mean of all processes

    def mean(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch, of this part's."""
        whole = loss.detach().float() * self.share
        dist.all_reduce(whole)
        return whole


def parts_of(batch: CutBatch, count: int) -> list[Part]:
    """One for each of `count` processes, as even as can be, in the order of the samples."""
    samples, alike = len(batch), count * batch.share
    if samples < count * MIN_PART or batch.whole:
        return [Part(batch, rank, 1 / count, batch.share) for rank in range(count)]
    edges = [samples * rank // count for rank in range(count + 1)]
    parts = [(rank, slice(*edges[rank : rank + 2])) for rank in range(count)]
    shares = [(part.stop - part.start) / samples for _, part in parts]
    return [Part(_samples(batch, part), rank, shares[rank], shares[rank] * alike) for rank, part in parts]


def _samples(batch: CutBatch, part: slice) -> CutBatch:
    tensors = tuple(tensor[part].clone() for tensor in batch.tensors)  # a view would take all samples along
    return replace(batch, tensors=tensors, targets=map_leaves(lambda leaf: leaf[part].clone(), batch.targets))


class _Prediction(nn.Module):
    """What of a half's outputs the loss is made of: no gradient is waited for of what only the others need."""

    def __init__(self, half: nn.Module) -> None:
        super().__init__()
        self.of = half

    def forward(self, *tensors: Tensor) -> Tensor:
        return prediction(self.of(*tensors))


def learn_together(server: Server) -> None:
    """From now on its half learns together with those of the other processes, which call this too. All must have the
    same weights and the same memory in their optimizers."""
    if server.arithmetic.device.type == "cuda":
        server.half = nn.SyncBatchNorm.convert_sync_batchnorm(server.half)
    server.together = DistributedDataParallel(_Prediction(server.half), find_unused_parameters=True)
