"""The server's step, the other half of the algorithm in `client.py`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.cut import CutBatch
from halfpass.learn.batches import micro_batches
from halfpass.learn.precision import Arithmetic
from halfpass.learn.seed import derive_seed


@dataclass
class Server:
    """What the compute owner trains: the server half, by the true loss."""

    half: nn.Module  # tuple of (B, ...) → (B, classes)
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    seed: int = 0


def decoupled_step(server: Server, batch: CutBatch, micro_batch: int | None = None, use: int = 0) -> float:
    """Trains the server half on one cut batch; returns the loss. No gradient of the activations is computed.

    `micro_batch` as in `client.decoupled_step`; `use` counts how often this batch has been trained on before.
    """
    return _learn(server, batch, _tensors(server, batch), micro_batch, use)


def conventional_step(server: Server, batch: CutBatch) -> tuple[tuple[Tensor, ...], float]:
    """Trains the server half on one cut batch; returns the loss's gradient by each of its tensors, and the loss."""
    tensors = tuple(tensor.requires_grad_() for tensor in _tensors(server, batch))
    loss = _learn(server, batch, tensors)
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors), loss


@torch.no_grad()
def evaluate(server: Server, batch: CutBatch) -> int:
    """How many samples of the batch the server half gets right; it must be in evaluation mode."""
    with server.arithmetic.autocast():
        logits = server.half(*_tensors(server, batch))  # (B, classes)
    return int((logits.argmax(1) == server.arithmetic.move(batch.labels)).sum())


def _learn(
    server: Server, batch: CutBatch, tensors: tuple[Tensor, ...], micro_batch: int | None = None, use: int = 0
) -> float:
    torch.manual_seed(derive_seed(server.seed, "server", batch.client, batch.epoch, batch.step, use))
    server.optimizer.zero_grad(set_to_none=True)
    labels, total = server.arithmetic.move(batch.labels), 0.0
    for part in micro_batches(len(batch), micro_batch):
        with server.arithmetic.autocast():
            # A slice of a leaf would cost conventional training a copy of the gradient.
            logits = server.half(*(tensors if micro_batch is None else [t[part] for t in tensors]))  # (b, classes)
        loss = cross_entropy(logits.float(), labels[part]) * (len(labels[part]) / len(labels))
        loss.backward()
        total += loss.item()
        del logits, loss
    server.optimizer.step()
    return total


def _tensors(server: Server, batch: CutBatch) -> tuple[Tensor, ...]:
    """Detached from the batch's own, so that asking for a gradient here does not mark the sender's tensors."""
    return tuple(server.arithmetic.move(tensor).detach() for tensor in batch.tensors)
