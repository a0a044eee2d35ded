"""The server's step, the other half of the algorithm in `client.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.algorithm.learning import Loss, check_optimizer, check_outputs, check_step, mean_loss, probabilities
from halfpass.arithmetic.precision import Arithmetic
from halfpass.cut import CutBatch
from halfpass.errors import InputError
from halfpass.seed import derive_seed, seed_python
from halfpass.tree import prediction


@runtime_checkable
class Part(Protocol):
    """What one of several processes has of a batch (ranks.py)."""

    @property
    def rank(self) -> int: ...
    @property
    def weight(self) -> float: ...
    def mean(self, loss: Tensor) -> Tensor: ...


@dataclass
class Server:
    """What the compute owner trains: the server half, by the true loss."""

    half: nn.Module
    """forward(*tensors), each (B, ...) → outputs (B, ...)."""
    optimizer: torch.optim.Optimizer
    """Of the half."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    """Precision and device."""
    seed: int = 0
    """Dropout and other random numbers of a step follow from it."""
    loss: Loss = cross_entropy
    """Of outputs and targets: their mean, or a value per sample."""
    probabilities: Callable[[Tensor], Tensor] | None = probabilities
    """Of its outputs, to answer together with a head; None: not."""
    together: nn.Module | None = None
    """The half, where it learns together with those of other processes."""
    backward: Callable[[Tensor], None] = Tensor.backward
    """Of a loss: `fabric.backward` or `accelerator.backward` in a loop of theirs."""

    # What a run wants of a server, which several processes do otherwise (ranks.py).

    def learn(self, batch: CutBatch, use: int = 0) -> float:
        return decoupled_step(self, batch, use)

    def evaluate(self, batch: CutBatch) -> tuple[Tensor, Tensor | None]:
        return evaluate(self, batch)

    def state(self) -> dict[str, Any]:
        """What it learns, as `training_state` has it."""
        return training_state(self.optimizer, self.half)

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        load_training_state(state, self.optimizer, self.half)

    def weights(self) -> dict[str, Tensor]:
        return self.half.state_dict()

    def whole(self) -> bool:
        """Whether its weights can be had, whatever has happened."""
        return True


def decoupled_step(server: Server, batch: CutBatch, use: int = 0, part: Part | None = None) -> float:
    """Trains the server half on one cut batch; returns the loss. No gradient of the activations is computed.

    Of a batch that comes in micro-batches the last one makes the optimizer step, as at the client. `use` counts how
    often it has been trained on before. `part`: other processes learn from the other samples of its batch meanwhile.
    """
    _begin(server, batch, use, 0 if part is None else part.rank)
    inputs = server.arithmetic.move(batch.targets), *_tensors(server, batch)
    if part is not None:
        (loss,) = _learn(server, *inputs, share=part.weight)
        loss = part.mean(loss)
    elif batch.share == 1:
        (loss,), _ = server.arithmetic.run(_learn, server, *inputs)
    else:
        (loss,) = _learn(server, *inputs, share=batch.share)
    found = check_step(_side(batch), batch.epoch, batch.step, loss, (), server.optimizer if batch.last else None)
    if batch.last:
        server.optimizer.step()
    return found


def conventional_step(server: Server, batch: CutBatch) -> tuple[tuple[Tensor, ...], float]:
    """Trains the server half on one cut batch; returns the loss's gradient by each of its floating
    point tensors, and the loss."""
    _begin(server, batch)
    inputs = server.arithmetic.move(batch.targets), *_tensors(server, batch)
    (loss, *gradients), _ = server.arithmetic.run(_learn_and_return, server, *inputs)
    found = check_step(_side(batch), batch.epoch, batch.step, loss, (), server.optimizer)
    server.optimizer.step()
    return tuple(gradients), found


def _learn(server: Server, targets: Any, *tensors: Tensor, share: float = 1.0) -> tuple[Tensor, ...]:
    """Adds up the gradients of the loss, a batch's `share` of it; returns that loss."""
    half = server.half if server.together is None else server.together
    with server.arithmetic.autocast():
        outputs = half(*tensors)
    loss = mean_loss(server.loss, outputs, targets)
    server.backward(loss * share)
    return (loss.detach(),)


def _learn_and_return(server: Server, targets: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The loss, and its gradient by each of the tensors, which are not marked themselves: they may be the sender's."""
    tensors = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors)
    (loss,) = _learn(server, targets, *tensors)
    return loss, *(torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t.is_floating_point())


@torch.no_grad()
def evaluate(server: Server, batch: CutBatch) -> tuple[Tensor, Tensor | None]:
    """The server half's outputs, and the mean of its own and the head's probabilities (None where the batch has no
    answers); the half must be in evaluation mode. Raises RunError where an output is not finite."""
    with server.arithmetic.autocast():
        outputs = prediction(server.half(*_tensors(server, batch))).float()
    check_outputs(_side(batch), batch.epoch, batch.step, outputs)
    if batch.answers is None or server.probabilities is None:
        return outputs, None
    return outputs, (server.probabilities(outputs) + server.arithmetic.move(batch.answers)) / 2


def _side(batch: CutBatch) -> str:
    return f"server, batch of client {batch.client}"


def _begin(server: Server, batch: CutBatch, use: int = 0, rank: int = 0) -> None:
    if not server.half.training:
        raise InputError("server.half", "training mode", "evaluation mode", "call server.half.train()")
    check_optimizer("server.optimizer", server.optimizer)
    place = batch.client, batch.epoch, batch.step, batch.before, use
    torch.manual_seed(derive_seed(server.seed, "server", *place, *([rank] if rank else [])))  # no two drop out alike
    seed_python(server.seed, batch.client, batch.epoch, batch.step, batch.before)
    if batch.before == 0:
        server.optimizer.zero_grad(set_to_none=True)


def _tensors(server: Server, batch: CutBatch) -> tuple[Tensor, ...]:
    return tuple(server.arithmetic.move(tensor) for tensor in batch.crossing)
