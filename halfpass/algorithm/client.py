"""The client's step. With `server.py` this is the whole algorithm.

Decoupled (Zihad et al., arXiv 2601.19261): the client learns from an auxiliary head at the cut, sends activations and
labels, and is done with the batch. Conventional (Gupta & Raskar, arXiv 1810.06060): it sends, keeps its graph, waits
for the gradient of the activations, and learns from that.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.arithmetic.graphs import Backward
from halfpass.arithmetic.precision import Arithmetic
from halfpass.cut import CutBatch, share_of_batch
from halfpass.errors import InputError
from halfpass.seed import derive_seed
from halfpass.tree import Tree, call


@dataclass
class Client:
    """What one data owner trains: the client half and, when decoupled, the auxiliary head.

    `optimizer` holds the parameters of both, each once.
    """

    half: nn.Module  # (B, ...) → tuple of (B, ...): the values that are alive across the cut
    head: nn.Module | None  # (B, *cut) → (B, classes); None when conventional
    optimizer: torch.optim.Optimizer
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    index: int = 0
    seed: int = 0
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy  # of logits (B, classes) and labels (B,), their mean


def decoupled_step(
    client: Client,
    x: Float[Tensor, "b ..."],
    labels: Int64[Tensor, " b"],
    epoch: int,
    step: int,
    before: int = 0,
    after: int = 0,
) -> tuple[CutBatch, float]:
    """Trains client half and head on one batch by the local loss; returns what crosses the cut, and that loss.

    No gradient is waited for, so a batch can be worked off in micro-batches, each one's graph freed and its activations
    sent before the next is computed: `before` and `after` say how many of the batch's samples come before and after
    these. Gradients add up to the batch's, and its last micro-batch makes the optimizer step.
    """
    if client.head is None:
        raise InputError("client.head", "an auxiliary head to learn from", "none", "build one with build_head")
    _seed_step(client, epoch, step, before)
    if before == 0:
        client.optimizer.zero_grad(set_to_none=True)
    inputs = client.arithmetic.move(x), client.arithmetic.move(labels)
    share = share_of_batch(before, len(labels), after)
    if share == 1:
        (loss, *tensors), _ = client.arithmetic.run(_learn, client, *inputs)
    else:
        loss, *tensors = _learn(client, *inputs, share=share)
    batch = _cut_batch(client, tensors, labels, epoch, step, before, after)
    if batch.last:
        client.optimizer.step()
    return batch, loss.item()


def _learn(client: Client, x: Tensor, labels: Tensor, share: float = 1.0) -> tuple[Tensor, ...]:
    """Adds up the gradients of the local loss, a batch's `share` of it; returns that loss and what crosses the cut."""
    assert client.head is not None
    with client.arithmetic.autocast():
        tensors = _crossing(client, x)
        logits = client.head(tensors[0])  # (B, classes)
    loss = client.loss(logits.float(), labels)
    (loss * share).backward()
    return loss.detach(), *(tensor.detach() for tensor in tensors)


@dataclass(frozen=True)
class Pending:
    """A batch on the client between the two halves of a conventional step: the graph waits for its gradient."""

    batch: CutBatch
    backward: Backward  # of the gradients of the local loss, which is None, and of the batch's tensors
    local_loss: float  # NaN without a head


def conventional_forward(
    client: Client, x: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"], epoch: int, step: int
) -> Pending:
    """The first half of a conventional step: what crosses the cut, and the graph behind it.

    A decoupled client that gets a gradient back now and then (λ > 0 in the paper) has a head: that learns from the
    local loss as ever, but the client half from the server's loss alone.
    """
    _seed_step(client, epoch, step)
    client.optimizer.zero_grad(set_to_none=True)
    inputs = client.arithmetic.move(x), client.arithmetic.move(labels)
    (loss, *tensors), backward = client.arithmetic.run(_forward, client, *inputs)
    return Pending(_cut_batch(client, tensors, labels, epoch, step), backward, loss.item())


def _forward(client: Client, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """The loss of the head, which learns, NaN without one; and what crosses the cut, with its graph."""
    with client.arithmetic.autocast():
        tensors = _crossing(client, x)
        if client.head is None:
            return labels.new_full((), math.nan, dtype=torch.float32), *tensors
        logits = client.head(tensors[0].detach())
    loss = client.loss(logits.float(), labels)
    loss.backward()
    return loss.detach(), *tensors


def conventional_backward(client: Client, pending: Pending, gradients: tuple[Tensor, ...]) -> None:
    """The second half: trains the client half by the gradients of its tensors, each of that tensor's shape."""
    pending.backward([None, *(client.arithmetic.move(gradient) for gradient in gradients)])
    client.optimizer.step()


@torch.no_grad()
def evaluate(
    client: Client, x: Float[Tensor, "b ..."], labels: Int64[Tensor, " b"], epoch: int, step: int
) -> tuple[CutBatch, int]:
    """The cut batch of test samples, the auxiliary head's answers with it, and how many of them that gets right (None
    and 0 without a head).

    The modules must be in evaluation mode.
    """
    with client.arithmetic.autocast():
        tensors = _crossing(client, client.arithmetic.move(x))
        logits = None if client.head is None else client.head(tensors[0])
    correct = 0 if logits is None else int((logits.argmax(1) == client.arithmetic.move(labels)).sum())
    answers = None if logits is None else logits.float().softmax(1)
    return replace(_cut_batch(client, tensors, labels, epoch, step), answers=answers), correct


def set_training(client: Client, training: bool) -> None:
    client.half.train(training)
    if client.head is not None:
        client.head.train(training)


def unreached_parameters(half: nn.Module, head: nn.Module, x: Tree) -> list[str]:
    """Names of the parameters of half and head that the local loss gives no gradient: they would never move. Those that
    are frozen are meant not to."""
    named = list(half.named_parameters()) + [(f"head.{name}", p) for name, p in head.named_parameters()]
    named = [(name, p) for name, p in named if p.requires_grad]
    total = head(call(half, x)[0]).float().sum()
    if not total.requires_grad:
        return [name for name, _ in named]
    gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def _crossing(client: Client, x: Tensor) -> tuple[Tensor, ...]:
    tensors = client.half(x)
    if isinstance(tensors, Tensor):  # its samples would be taken for the values that cross
        raise InputError("client.half", "a tuple of the tensors that cross", "one tensor", "return it as (tensor,)")
    return tuple(tensors)


def _seed_step(client: Client, epoch: int, step: int, before: int = 0) -> None:
    """Dropout draws from (client, epoch, step, samples before), so it does not matter which process draws, or when."""
    torch.manual_seed(derive_seed(client.seed, "client", client.index, epoch, step, before))


def _cut_batch(
    client: Client, tensors: Sequence[Tensor], labels: Tensor, epoch: int, step: int, before: int = 0, after: int = 0
) -> CutBatch:
    return CutBatch(client.index, epoch, step, tuple(t.detach() for t in tensors), labels, before, after)
