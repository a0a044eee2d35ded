"""The client's step. With `server.py` this is the whole algorithm.

Inputs and targets are trees: one tensor, or tuples and dicts of them (`halfpass/tree.py`).

Decoupled (Zihad et al., arXiv 2601.19261): the client learns from an auxiliary head at the cut, sends activations and
targets, and is done with the batch. Conventional (Gupta & Raskar, arXiv 1810.06060): it sends, keeps its graph, waits
for the gradient of the activations, and learns from that.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfpass.algorithm.learning import (
    Loss,
    check_optimizer,
    check_outputs,
    check_step,
    check_targets,
    mean_loss,
    probabilities,
)
from halfpass.arithmetic.graphs import Backward
from halfpass.arithmetic.precision import Arithmetic
from halfpass.cut import CutBatch, share_of_batch
from halfpass.errors import InputError
from halfpass.seed import derive_seed, seed_python
from halfpass.tree import Tree, call, prediction, sample_count


@dataclass
class Client:
    """What one data owner trains: the client half and, when decoupled, the auxiliary head."""

    half: nn.Module
    """(B, ...) → tuple of (B, ...): the values that are alive across the cut."""
    head: nn.Module | None
    """(B, *cut) → outputs (B, ...); None when conventional."""
    optimizer: torch.optim.Optimizer
    """Of the half and the head, each parameter once."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    """Precision and device."""
    index: int = 0
    """The client's number."""
    seed: int = 0
    """Dropout and other random numbers of a step follow from it."""
    loss: Loss = cross_entropy
    """Of outputs and targets: their mean, or a value per sample."""
    probabilities: Callable[[Tensor], Tensor] | None = probabilities
    """Of the head's outputs, sent in tests; None: not."""
    backward: Callable[[Tensor], None] = Tensor.backward
    """Of a loss: `fabric.backward` or `accelerator.backward` in a loop of theirs."""
    _checked: bool = field(default=False, init=False, repr=False)

    @functools.cached_property
    def frozen(self) -> bool:
        """Whether nothing of the half is trained: it then makes no backward pass and keeps no graph."""
        return not any(parameter.requires_grad for parameter in self.half.parameters())


def decoupled_step(
    client: Client, x: Any, targets: Any, epoch: int, step: int, before: int = 0, after: int = 0
) -> tuple[CutBatch, float]:
    """Trains client half and head on one batch by the local loss; returns what crosses the cut, and that loss.

    No gradient is waited for, so a batch can be worked off in micro-batches, each one's graph freed and its activations
    sent before the next is computed: `before` and `after` say how many of the batch's samples come before and after
    these. Gradients add up to the batch's, and its last micro-batch makes the optimizer step.
    """
    _check(client, x, targets)
    if client.head is None and not client.frozen:
        raise InputError("client.head", "an auxiliary head to learn from", "none", "build one with build_head")
    _seed_step(client, epoch, step, before)
    if before == 0:
        client.optimizer.zero_grad(set_to_none=True)
    inputs = client.arithmetic.move(x), client.arithmetic.move(targets)
    share = share_of_batch(before, sample_count(targets), after)
    if share == 1:
        (loss, *tensors), _ = client.arithmetic.run(_learn, client, *inputs)
    else:
        loss, *tensors = _learn(client, *inputs, share=share)
    batch = _cut_batch(client, tensors, targets, epoch, step, before, after)
    found = check_step(
        _side(client), epoch, step, None if client.head is None else loss, batch.tensors,
        client.optimizer if batch.last else None,
    )  # fmt: skip
    if batch.last:
        client.optimizer.step()
    return batch, found


def _learn(client: Client, x: Any, targets: Any, share: float = 1.0) -> tuple[Tensor, ...]:
    """Adds up the gradients of the local loss, a batch's `share` of it; returns that loss and what crosses the cut."""
    with client.arithmetic.autocast():
        tensors = _crossing(client, x)
        if client.head is None:  # the half is frozen: there is nothing to learn
            return tensors[0].new_full((), math.nan, dtype=torch.float32), *tensors
        outputs = client.head(tensors[0])
    loss = mean_loss(client.loss, outputs, targets)
    client.backward(loss * share)
    return loss.detach(), *(tensor.detach() for tensor in tensors)


@dataclass(frozen=True)
class Pending:
    """A batch on the client between the two halves of a conventional step: the graph waits for its gradient."""

    batch: CutBatch
    backward: Backward  # of the gradients of the local loss, which is None, and of the batch's tensors
    local_loss: float  # NaN without a head


def conventional_forward(client: Client, x: Any, targets: Any, epoch: int, step: int) -> Pending:
    """The first half of a conventional step: what crosses the cut, and the graph behind it.

    A decoupled client that gets a gradient back now and then (λ > 0 in the paper) has a head: that learns from the
    local loss as ever, but the client half from the server's loss alone.
    """
    _check(client, x, targets)
    _seed_step(client, epoch, step)
    client.optimizer.zero_grad(set_to_none=True)
    inputs = client.arithmetic.move(x), client.arithmetic.move(targets)
    (loss, *tensors), backward = client.arithmetic.run(_forward, client, *inputs)
    batch = _cut_batch(client, tensors, targets, epoch, step)
    found = check_step(_side(client), epoch, step, None if client.head is None else loss, batch.tensors)
    return Pending(batch, backward, found)


def _forward(client: Client, x: Any, targets: Any) -> tuple[Tensor, ...]:
    """The loss of the head, which learns, NaN without one; and what crosses the cut, with its graph."""
    with client.arithmetic.autocast():
        tensors = _crossing(client, x)
        if client.head is None:
            return tensors[0].new_full((), math.nan, dtype=torch.float32), *tensors
        outputs = client.head(tensors[0].detach())
    loss = mean_loss(client.loss, outputs, targets)
    client.backward(loss)
    return loss.detach(), *tensors


def conventional_backward(client: Client, pending: Pending, gradients: tuple[Tensor, ...]) -> None:
    """The second half: trains the client half by the gradients of its tensors, each of that tensor's shape."""
    given = iter(gradients)
    pairs = [next(given) if tensor.is_floating_point() else None for tensor in pending.batch.crossing]
    pending.backward([None, *(None if gradient is None else client.arithmetic.move(gradient) for gradient in pairs)])
    check_step(_side(client), pending.batch.epoch, pending.batch.step, None, (), client.optimizer)
    client.optimizer.step()


@torch.no_grad()
def evaluate(client: Client, x: Any, targets: Any, epoch: int, step: int) -> tuple[CutBatch, Tensor | None]:
    """The cut batch of test samples, the auxiliary head's answers with it where the task has any, and that head's
    outputs (None without a head). Raises RunError where something is not finite.

    The modules must be in evaluation mode.
    """
    with client.arithmetic.autocast():
        tensors = _crossing(client, client.arithmetic.move(x))
        outputs = None if client.head is None else prediction(client.head(tensors[0])).float()
    check_outputs(f"client {client.index}", epoch, step, tensors[0], outputs)
    answers = None if outputs is None or client.probabilities is None else client.probabilities(outputs)
    return replace(_cut_batch(client, tensors, targets, epoch, step), answers=answers), outputs


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


def _side(client: Client) -> str:
    return f"client {client.index}" + ("" if client.head is None else ", auxiliary loss")


def _check(client: Client, x: Any, targets: Any) -> None:
    """Raises InputError where a loop of one's own gives what cannot be learned from. Looks at the optimizer once."""
    check_targets(x, targets)
    for place, module in (("client.half", client.half), ("client.head", client.head)):
        if module is not None and not module.training:
            raise InputError(place, "training mode", "evaluation mode", "call client_steps.set_training(client, True)")
    if not client._checked:
        check_optimizer("client.optimizer", client.optimizer)
        held = {id(parameter) for group in client.optimizer.param_groups for parameter in group["params"]}
        for place, module in (("half", client.half), ("head", client.head)):
            named = [] if module is None else module.named_parameters()
            missing = [name for name, parameter in named if parameter.requires_grad and id(parameter) not in held]
            if missing:
                raise InputError(
                    "client.optimizer", "every parameter of client half and head",
                    f"none of {', '.join(missing[:3])} of the {place}", "make it of both modules' parameters",
                )  # fmt: skip
        client._checked = True


def _crossing(client: Client, x: Any) -> tuple[Tensor, ...]:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not client.frozen):
        tensors = call(client.half, x)
    if isinstance(tensors, Tensor):  # its samples would be taken for the values that cross
        raise InputError("client.half", "a tuple of the tensors that cross", "one tensor", "return it as (tensor,)")
    return tuple(tensors)


def _seed_step(client: Client, epoch: int, step: int, before: int = 0) -> None:
    """Dropout draws from (client, epoch, step, samples before), so it does not matter which process draws, or when."""
    torch.manual_seed(derive_seed(client.seed, "client", client.index, epoch, step, before))
    seed_python(client.seed, client.index, epoch, step, before)


def _cut_batch(
    client: Client, tensors: Sequence[Tensor], targets: Any, epoch: int, step: int, before: int = 0, after: int = 0
) -> CutBatch:
    crossing = tuple(t.detach() for t in tensors)
    samples = len(crossing) - getattr(client.half, "whole", 0)  # what is behind them is of the batch as a whole
    exact: frozenset[int] = getattr(client.half, "exact", frozenset())
    return CutBatch(
        client.index, epoch, step, crossing[:samples], targets, before, after, None, crossing[samples:], exact
    )
