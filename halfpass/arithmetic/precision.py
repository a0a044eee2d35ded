"""Where and how precisely a half computes: device, autocast, memory format, and what is compiled or recorded."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.arithmetic.fused import check_compiler, fuse
from halfpass.arithmetic.graphs import Backward, Graphs, Pass, backward_of
from halfpass.errors import InputError, reason
from halfpass.networks.group_norm import guard_group_norms
from halfpass.tree import flatten, map_leaves, unflatten


@dataclass(frozen=True)
class Arithmetic:
    """`device` of the weights, whether forward passes run under bfloat16 autocast, whether they are compiled, and what
    records those of one side, where they are recorded."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    compiled: bool = False
    graphs: Graphs | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass; the losses are computed in float32 outside of it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        """The module on the device, 4-D weights in channels-last order, which is the faster one on CPU and GPU; on a
        CPU with kernels that are compiled when they are first called (fused.py), perhaps as another module, which makes
        the first one void.
        """
        module.to(self.device)
        guard_group_norms(module)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return fuse(module) if self.compiled and self.device.type == "cpu" else module

    def move(self, tree: Any) -> Any:
        """A tree of tensors to the device."""
        return map_leaves(lambda tensor: tensor.to(self.device, non_blocking=True), tree)

    def run(self, function: Pass, side: Any, *inputs: Any) -> tuple[tuple[Tensor, ...], Backward]:
        """`function(side, *inputs)` of trees of tensors on the device, and what takes a gradient for each of its
        outputs and goes back through the graph of those that have one; recorded as CUDA graphs where there are any
        (graphs.py has the conditions)."""
        if self.graphs is not None:
            named = [flatten(tree) for tree in inputs]
            if not all(isinstance(tree, Tensor) for tree in inputs):
                function = _OfTrees(function, tuple(tuple(names) for names in named))
            return self.graphs.run(function, side, tuple(tensor for names in named for tensor in names.values()))
        outputs = function(side, *inputs)
        return outputs, backward_of(outputs)


@dataclass(frozen=True)
class _OfTrees:
    """A pass of trees as one of their tensors, which is what graphs record; equal where function and names are."""

    function: Pass
    names: tuple[tuple[str, ...], ...]  # of each tree's tensors

    def __call__(self, side: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        left = iter(tensors)
        return self.function(side, *(unflatten({name: next(left) for name in names}) for names in self.names))


def arithmetic(device: str, precision: str, compiled: bool = False) -> Arithmetic:
    """From settings; raises InputError when the device does not exist here, or nothing can be compiled for it."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        found = f"{device!r} ({reason(error)})"
        raise InputError("train.device", "a device of this machine", found, "use cpu") from None
    place = torch.device(device)
    if compiled and place.type == "cpu":
        check_compiler()
    graphs = Graphs(place) if compiled and place.type == "cuda" else None
    return Arithmetic(place, precision == "bf16", compiled, graphs)
