"""A server half that several processes train together, each on a device of its own: data parallelism.

Each learns from its part of a batch's samples, and all of them make their step from the mean of their gradients. Parts
count by their samples. That is the step of one process on the whole batch, to rounding, where a sample's loss depends
on no other sample. It does with BatchNorm, which normalizes each part by itself on CPUs; on GPUs it becomes
SyncBatchNorm, and looks at the whole batch.

Either each process has all weights (PyTorch's DistributedDataParallel; Li et al., arXiv 2006.15704), or a part of them
and of what the optimizer remembers (FSDP2; Zhao et al., arXiv 2304.11277).
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn
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
    same memory in their optimizers; they get the first one's weights."""
    server.half = _synchronized(server.half)
    server.together = DistributedDataParallel(_Prediction(server.half), find_unused_parameters=True)


def shard(half: nn.Module) -> None:
    """Of its weights this process keeps a part from now on, the others the rest: they have the same half, and call this
    too. What is called as a whole is put together when it is; the rest for as long as a step takes."""
    from torch.distributed.fsdp import fully_shard  # which takes long, and every command imports this file

    for part in _called(_synchronized(half)):
        fully_shard(part)
    fully_shard(half)


def _synchronized(half: nn.Module) -> nn.Module:
    on_gpu = any(parameter.is_cuda for parameter in half.parameters())
    return nn.SyncBatchNorm.convert_sync_batchnorm(half) if on_gpu else half


def _called(half: nn.Module) -> list[nn.Module]:
    """Modules in it that are called, with weights that nothing else reads."""
    nodes = list(half.graph.nodes) if isinstance(half, fx.GraphModule) else []
    names = [str(node.target) for node in nodes if node.op == "call_module"]
    found = list(half.children()) if isinstance(half, nn.Sequential) else [half.get_submodule(name) for name in names]
    modules = {id(module): module for module in found}.values()
    readers = Counter(id(weight) for module in modules for weight in module.parameters())
    read = {str(node.target) for node in nodes if node.op == "get_attr"}
    readers.update(id(weight) for name, weight in half.named_parameters() if name in read)
    return [
        module for module in modules
        if (weights := list(module.parameters())) and all(readers[id(weight)] == 1 for weight in weights)
    ]  # fmt: skip


def sharded_state(server: Server) -> dict[str, Any]:
    """What all processes have learned, on the CPU of the first; all must ask for it. Before its first step an optimizer
    has nothing, and PyTorch would make a step of zero gradients, whose weight decay stays in the momentum."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(server.half, options=options)
    stepped = bool(server.optimizer.state)
    memory = get_optimizer_state_dict(server.half, server.optimizer, options=options) if stepped else None
    return {"modules": [weights], "optimizer": memory}


def load_sharded_state(server: Server, state: dict[str, Any]) -> None:
    """The inverse of `sharded_state`, in all processes, each with all of it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(server.half, state["modules"][0], options=options)
    if state["optimizer"] is not None:  # which has nothing of a weight that never had a gradient
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(server.half, server.optimizer, state["optimizer"], options=options)
