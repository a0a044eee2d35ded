"""CUDA graphs: a step's passes recorded once and replayed, so that the GPU does not wait for Python to launch kernels.

A ResNet-110 in bf16 has some 2,000 kernels of a few microseconds in a step, and Python takes longer to launch one than
the GPU to run it. Tests: tests/test_graphs.py, on any machine, and tests/test_gpu.py, on one with a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfpass.errors import InputError, reason

WARM_UP = 2  # calls with inputs of a shape that are not recorded yet: kernels are compiled and chosen in them
RECORDED = 4  # shapes at most: a batch's, an epoch's last, and some for several clients' last

Pass = Callable[..., tuple[Tensor, ...]]
Backward = Callable[[Sequence[Tensor | None]], None]  # of a gradient for each output; not of those without a graph


class Graphs:
    """Of one side's passes, on its GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._calls: dict[Any, int] = {}
        self._graphs: dict[Any, _Recording] = {}

    def run(self, function: Pass, side: Any, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Backward]:
        """`function(side, *inputs)`, and what takes a gradient for each of its outputs and goes back through the graph
        of those that have one; no other call may come in between.

        The function must do the same whenever it gets inputs of these shapes, and may change no more than buffers and
        the gradients of the parameters that `side.optimizer` has, all None before. What is returned of a replay are
        copies, without a graph of their own. Raises InputError where the function cannot be recorded.
        """
        key = (function, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs))
        if key in self._graphs:
            return self._graphs[key].replay(inputs)
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= WARM_UP or len(self._graphs) == RECORDED:
            return self._unrecorded(function, side, inputs)
        self._graphs[key] = self._record(function, side, inputs)
        return self._graphs[key].replay(inputs)

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """It begins when the current stream is done so far, and that one waits for it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _unrecorded(
        self, function: Pass, side: Any, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Backward]:
        """The function as it is, on the stream on which it will be recorded, as PyTorch wants it."""
        with self._on_own_stream():
            outputs = function(side, *inputs)
        back = backward_of(outputs)

        def backward(gradients: Sequence[Tensor | None]) -> None:
            with self._on_own_stream():
                back(gradients)

        return outputs, backward

    def _record(self, function: Pass, side: Any, inputs: tuple[Tensor, ...]) -> "_Recording":
        parameters = [parameter for group in side.optimizer.param_groups for parameter in group["params"]]
        inputs = tuple(tensor.clone() for tensor in inputs)
        forward, outputs = self._recorded(lambda: function(side, *inputs))
        above, backward = [torch.zeros_like(tensor) if tensor.requires_grad else None for tensor in outputs], None
        if any(gradient is not None for gradient in above):
            backward, _ = self._recorded(lambda: backward_of(outputs)(above))
        outputs = tuple(tensor.detach() for tensor in outputs)
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        return _Recording(inputs, outputs, above, gradients, forward, backward)

    def _recorded(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What does the work again, and what it returned. Other threads may meanwhile use the GPU."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.stream(self._stream)  # which a recording that fails does not leave
        try:
            with stream, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                returned = work()
        except RuntimeError as error:
            # The end of a recording that failed fails too.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            found = f"another ({reason(first)})"
            raise InputError("train.compile", "a network that CUDA graphs can record", found, "leave it out") from error
        self._pool = self._pool or graph.pool()
        return graph.replay, returned


def backward_of(outputs: Sequence[Tensor]) -> Backward:
    """What takes a gradient for each of the outputs and goes back through the graph of those that have one."""

    def backward(gradients: Sequence[Tensor | None]) -> None:
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if pairs:
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])

    return backward


@dataclass(frozen=True)
class _Recording:
    """Graphs with the memory that they read and write."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    above: list[Tensor | None]  # gradients of the outputs that have a graph
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    forward: Callable[[], None]
    backward: Callable[[], None] | None

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Backward]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        for parameter, gradient in self.gradients:  # those of another recording, or none, until now
            parameter.grad = gradient
        self.forward()
        return tuple(tensor.clone() for tensor in self.outputs), self._replay_backward

    def _replay_backward(self, gradients: Sequence[Tensor | None]) -> None:
        for own, given in zip(self.above, gradients, strict=True):
            if own is not None and given is not None:
                own.copy_(given, non_blocking=True)
        if self.backward is not None:
            self.backward()
