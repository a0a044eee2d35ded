"""Where and how precisely a half computes: device, autocast, memory format."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfpass.errors import InputError
from halfpass.learn.fused import check_compiler, fuse


@dataclass(frozen=True)
class Arithmetic:
    """`device` of the weights, whether forward passes run under bfloat16 autocast, and whether they are compiled."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    compiled: bool = False

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass; the losses are computed in float32 outside of it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def place(self, module: nn.Module) -> nn.Module:
        """The module on the device, 4-D weights in channels-last order, which is the faster one on CPU and GPU; to be
        compiled when it is first called, on a CPU in parts (fused.py). Where it is another module, the first is void.
        """
        module.to(self.device)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        if self.compiled and self.device.type == "cpu":
            return fuse(module)
        if self.compiled:
            module.compile()  # anew for a second size of batches, such as an epoch's last, and then for any
        return module

    def move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def arithmetic(device: str, precision: str, compiled: bool = False) -> Arithmetic:
    """From settings; raises InputError when the device does not exist here, or nothing can be compiled for it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        reason = str(error).splitlines()[0]
        raise InputError("train.device", "a device of this machine", f"{device!r} ({reason})", "use cpu") from None
    if compiled and torch.device(device).type == "cpu":
        check_compiler()
    return Arithmetic(torch.device(device), precision == "bf16", compiled)
