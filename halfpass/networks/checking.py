"""Whether the halves of a network do exactly what it does: a training step and an evaluation of both, on copies.

Outputs, gradients, buffers and random numbers must be equal bit for bit. A difference that nobody is told of is the one
thing that may not happen. Tests: tests/test_replay.py.
"""

import copy
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from halfpass.errors import InputError, reason
from halfpass.networks.group_norm import guard_group_norms
from halfpass.networks.observe import copied, seeded_everything, tensors_in
from halfpass.tree import Tree, call, map_leaves, sample_count


@dataclass
class _Step:
    """What one step gave."""

    outputs: list[Tensor]
    state: dict[str, Tensor | None]  # gradients and buffers by name
    draws: tuple[Any, ...]  # where random numbers have got to
    draws_forward: tuple[Any, ...]  # and had before the backward pass


@dataclass(frozen=True)
class _Case:
    training: bool
    fewer: int = 0  # samples less than there are
    marked: bool = False  # what crosses takes a gradient, which then goes down, as in conventional training; else as in
    # decoupled training, of which only the server's step is of the network's own loss


USUAL = (
    _Case(True, marked=True), _Case(True), _Case(True, 1, marked=True), _Case(True, 2, marked=True),
    _Case(False), _Case(False, 1),
)  # fmt: skip
UNDER_MORE_SEEDS = (_Case(True, marked=True),) * 3


def check_exact(
    place: str, model: nn.Module, client: nn.Module, server: nn.Module, inputs: Tree, *, draws: bool, remedy: str
) -> None:
    """Raises InputError where `client` and `server` do something else than `model` on `inputs`: in training and in
    evaluation, with all samples, one and two less (kernels may be others for another number), and where `draws` says
    that it draws random numbers under more seeds.

    The three are copied once, and go through all cases one after the other, each on what the last one left behind. A
    network that does not repeat itself under one seed cannot be checked, and is refused.
    """
    network, twin, below, above = copied(model), copied(model), copy.deepcopy(client), copy.deepcopy(server)
    for module in (network, twin):
        guard_group_norms(module)
    samples = sample_count(inputs)
    for seed, case in enumerate((*USUAL, *UNDER_MORE_SEEDS) if draws else USUAL):
        count = samples - case.fewer
        if count < 2:  # BatchNorm cannot train on one
            continue
        batch = map_leaves(operator.itemgetter(slice(count)), inputs)
        when = f"in {'training' if case.training else 'evaluation'} mode with {count} samples"
        for module in (network, twin, below, above):
            module.train(case.training).zero_grad(set_to_none=True)
        try:
            expected = _uncut(network, batch, case, seed)
        except Exception as error:  # whatever the network or a hook of it raises
            wanted = "a network that runs and trains by itself"
            raise InputError(place, wanted, f"{reason(error)}, {when}", "make it train uncut first") from error
        if seed == 0 and (other := _difference(expected, _uncut(twin, batch, case, seed))) is not None:
            raise InputError(place, "a network that repeats itself under one seed", f"another {other} {when}", remedy)
        try:
            found = _cut(below, above, batch, case, seed)
        except InputError:
            raise
        except Exception as error:  # whatever the network raises on what it does not expect
            wanted = "halves that run as the network does"
            raise InputError(place, wanted, f"{reason(error)}, {when}", remedy) from error
        if (other := _difference(expected, found, whole=case.marked or not case.training)) is not None:
            wanted = "halves that do exactly what the network does"
            raise InputError(place, wanted, f"another {other} {when}", remedy)

    kept = {name for half in (below, above) for name, _ in half.named_buffers(remove_duplicate=False)}
    before = dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in network.named_buffers(remove_duplicate=False):
        if name in before and name not in kept and not _equal(before[name], buffer):
            raise InputError(place, "buffers that are written in place", f"{name!r} in neither half", "use copy_()")


def _uncut(network: nn.Module, inputs: Tree, case: _Case, seed: int) -> _Step:
    with seeded_everything(seed), torch.set_grad_enabled(case.training):
        outputs = tensors_in(call(network, map_leaves(lambda leaf: leaf.clone(), inputs)))
        forward = _draws()
        if case.training:
            _backward(outputs)
        return _Step([each.detach() for each in outputs], _state(network), _draws(), forward)


def _cut(below: nn.Module, above: nn.Module, inputs: Tree, case: _Case, seed: int) -> _Step:
    with seeded_everything(seed), torch.set_grad_enabled(case.training):
        began = random.getstate(), np.random.get_state()
        crossing = call(below, map_leaves(lambda leaf: leaf.clone(), inputs))
        received = [_as_received(tensor, case.marked) for tensor in crossing]
        random.setstate(began[0])  # both halves go through the same Python, each from its beginning
        np.random.set_state(began[1])
        outputs = tensors_in(above(*received))
        forward = _draws()
        if case.training:
            _backward(outputs)
        if case.marked:
            pairs = [(z, r.grad) for z, r in zip(crossing, received, strict=True) if r.grad is not None]
            if pairs:
                torch.autograd.backward([z for z, _ in pairs], [gradient for _, gradient in pairs])
        state = _state(above) | (_state(below) if case.marked or not case.training else {})
        return _Step([each.detach() for each in outputs], state, _draws(), forward)


def _as_received(tensor: Tensor, marked: bool) -> Tensor:
    """As it comes out of the wire: dense, with no graph."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format
    return tensor.detach().clone(memory_format=form).requires_grad_(marked and tensor.requires_grad)


def _backward(outputs: Sequence[Tensor]) -> None:
    """Of a loss in which every output value has a weight of its own."""
    weights = torch.Generator().manual_seed(0)
    total: Tensor | None = None
    for tensor in outputs:
        parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        drawn = torch.randn(parts.shape, generator=weights, dtype=torch.float64)  # also for one that needs no gradient
        if tensor.requires_grad:  # such as one that crossed, in decoupled training
            loss = (parts.double() * drawn).sum()
            total = loss if total is None else total + loss
    if total is not None:
        total.backward()


def _state(module: nn.Module) -> dict[str, Tensor | None]:
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters(remove_duplicate=False)}
    buffers = {f"buffer {name}": buffer.detach() for name, buffer in module.named_buffers(remove_duplicate=False)}
    return {**gradients, **buffers}


def _draws() -> tuple[Any, ...]:
    array = np.random.get_state()
    return torch.default_generator.get_state(), random.getstate(), array[1].tobytes(), array[2]  # type: ignore[index, union-attr]


def _difference(expected: _Step, found: _Step, *, whole: bool = True) -> str | None:
    """The first thing that differs, by name; None where nothing does. `whole`: all that has a gradient is there, and
    every backward pass was done, which may draw random numbers too."""
    if len(expected.outputs) != len(found.outputs):
        return "number of outputs"
    for i, (one, other) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if not _equal(one, other):
            return f"output {i}"
    for name, tensor in found.state.items():
        if not _equal(expected.state.get(name), tensor):
            return name
    if whole:
        for name, tensor in expected.state.items():
            if tensor is not None and name.startswith("gradient") and name not in found.state:
                return name
    kinds = ("PyTorch", "Python", "NumPy", "NumPy")
    draws = (expected.draws, found.draws) if whole else (expected.draws_forward, found.draws_forward)
    for kind, one_draw, other_draw in zip(kinds, *draws, strict=True):
        if not (torch.equal(one_draw, other_draw) if isinstance(one_draw, Tensor) else one_draw == other_draw):
            return f"use of {kind}'s random numbers"
    return None


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is None and other is None
    if one.shape != other.shape or one.dtype != other.dtype or isinstance(other, FakeTensor):
        return False
    if one.is_floating_point() or one.is_complex():
        return torch.equal(one.isnan(), other.isnan()) and bool(((one == other) | one.isnan()).all())
    return torch.equal(one, other)
