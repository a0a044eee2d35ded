"""The server's step, the other half of the algorithm in `client.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.arithmetic.precision import Arithmetic
from halfpass.cut import CutBatch
from halfpass.seed import derive_seed


@dataclass
class Server:
    """What the compute owner trains: the server half, by the true loss."""

    half: nn.Module  # forward(*tensors), each (B, ...) → (B, classes)
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy  # of logits (B, classes) and labels (B,), their mean


def decoupled_step(server: Server, batch: CutBatch, use: int = 0) -> float:
    """Trains the server half on one cut batch; returns the loss. No gradient of the activations is computed.

    Of a batch that comes in micro-batches the last one makes the optimizer step, as at the client. `use` counts how
    often it has been trained on before.
    """
    _begin(server, batch, use)
    inputs = server.arithmetic.move(batch.labels), *_tensors(server, batch)
    if batch.share == 1:
        (loss,), _ = server.arithmetic.run(_learn, server, *inputs)
    else:
        (loss,) = _learn(server, *inputs, share=batch.share)
    if batch.last:
        server.optimizer.step()
    return loss.item()


def conventional_step(server: Server, batch: CutBatch) -> tuple[tuple[Tensor, ...], float]:
    """Trains the server half on one cut batch; returns the loss's gradient by each of its tensors, and the loss."""
    _begin(server, batch)
    inputs = server.arithmetic.move(batch.labels), *_tensors(server, batch)
    (loss, *gradients), _ = server.arithmetic.run(_learn_and_return, server, *inputs)
    server.optimizer.step()
    return tuple(gradients), loss.item()


def _learn(server: Server, labels: Tensor, *tensors: Tensor, share: float = 1.0) -> tuple[Tensor, ...]:
    """Adds up the gradients of the loss, a batch's `share` of it; returns that loss."""
    with server.arithmetic.autocast():
        logits = server.half(*tensors)  # (B, classes)
    loss = server.loss(logits.float(), labels)
    (loss * share).backward()
    return (loss.detach(),)


def _learn_and_return(server: Server, labels: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradient by each of the tensors, which are not marked themselves: they may be the sender's."""
    tensors = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    (loss,) = _learn(server, labels, *tensors)
    return loss, *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors)


@torch.no_grad()
def evaluate(server: Server, batch: CutBatch) -> tuple[int, int | None]:
    """How many samples of the batch the server half gets right, and how many by the mean of its own and the client's
    class probabilities (None where the batch has no answers); the half must be in evaluation mode."""
    with server.arithmetic.autocast():
        logits = server.half(*_tensors(server, batch))  # (B, classes)
    labels = server.arithmetic.move(batch.labels)
    right = int((logits.argmax(1) == labels).sum())
    if batch.answers is None:
        return right, None
    both = logits.float().softmax(1) + server.arithmetic.move(batch.answers)
    return right, int((both.argmax(1) == labels).sum())


def _begin(server: Server, batch: CutBatch, use: int = 0) -> None:
    torch.manual_seed(derive_seed(server.seed, "server", batch.client, batch.epoch, batch.step, batch.before, use))
    if batch.before == 0:
        server.optimizer.zero_grad(set_to_none=True)


def _tensors(server: Server, batch: CutBatch) -> tuple[Tensor, ...]:
    return tuple(server.arithmetic.move(tensor) for tensor in batch.tensors)
