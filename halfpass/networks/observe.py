"""One forward pass of a network, watched: which call made each tensor, what each call used, where each module returned.

The network runs as it is, on samples; nothing is traced or rewritten. `replay.py` cuts by what is seen here, and
`split.py` keeps a torch.fx graph only where nothing was seen that a trace would lose. Tests: tests/test_replay.py.
"""

import copy
import dataclasses
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfpass.errors import InputError, reason
from halfpass.tree import Tree, call, flatten, map_leaves

# What gives Python a value out of a tensor. On stand-ins there is none, so the client half sends what it read.
READS = frozenset({
    "item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "equal", "allclose", "is_nonzero",
    "__contains__", "numpy", "__array__",
})  # fmt: skip
SENT = (bool, int, float)  # a read value that can be sent
# Calls that use the size and type of their first argument, and no value of it.
LIKE = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_full", "new_empty",
})  # fmt: skip


@dataclass(frozen=True)
class Made:
    """Names a tensor by what made it: the call of that number and name, and which of the tensors that it returned."""

    call: int
    leaf: int
    name: str = ""


@dataclass
class Call:
    """A call of a PyTorch function, method or attribute, of those that a function mode sees."""

    name: str
    uses: list[Tensor]  # the tensors among its arguments, whose values it uses
    makes: list[Tensor]  # the tensors that it returned
    writes: list[Tensor]  # the arguments that it changed in place
    draws: bool  # from PyTorch's random numbers
    reads: Any = None  # the plain value that it gave Python
    is_read: bool = False
    flops: int = 0  # where they are counted


@dataclass
class Observed:
    """What one pass showed. Tensors are kept, so that no two have one identity."""

    network: nn.Module  # the copy that ran
    inputs: dict[str, Tensor]  # by name, as the network got them
    state: list[tuple[str, Tensor]]  # weights and buffers by name, before the pass: it may put others in their places
    calls: list[Call] = field(default_factory=list)
    returned: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)  # (calls so far, output), by module name
    outputs: Any = None
    draws: bool = False  # random numbers, of whatever library
    lost: str | None = None  # what a trace would lose, in words; None where nothing was seen


def observe(
    model: nn.Module, inputs: Tree, *, training: bool, seed: int = 0, flops: Callable[[], int] = lambda: 0,
    copy_first: bool = True,
) -> Observed:  # fmt: skip
    """One pass of a copy of `model`, or of itself where it is one, in that mode on `inputs`; raises InputError where
    the network fails on them. `flops` says how many have been counted so far.
    """
    network = (copied(model) if copy_first else model).train(training)
    inputs = map_leaves(lambda leaf: leaf.clone(), inputs)
    seen = Observed(network, flatten(inputs), list(named_tensors(network)))
    seen.lost = _hooks(network)
    for name, part in network.named_modules():
        if part.training != training:
            seen.lost = seen.lost or f"{name or 'the network'} does not follow train() and eval()"
    before = _plain_state(network)
    with seeded_everything(seed), torch.enable_grad(), _noting_returns(network, seen):
        plain_draws = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[index]
        try:
            with _Watch(seen, flops):
                seen.outputs = call(network, inputs)
        except Exception as error:  # whatever the network raises
            shapes = {name: tuple(leaf.shape) for name, leaf in seen.inputs.items()}
            raise InputError(
                f"model {type(model).__name__}", f"a forward pass of {shapes.get('', shapes)}", reason(error),
                "choose samples that fit it",
            ) from error
        if plain_draws != (random.getstate(), np.random.get_state()[1].tobytes()):  # type: ignore[index]
            seen.draws, seen.lost = True, seen.lost or "it draws random numbers in Python or NumPy"
    seen.draws = seen.draws or any(each.draws for each in seen.calls)
    if before != _plain_state(network):
        seen.lost = seen.lost or "its forward changes its Python attributes"
    return seen


@contextmanager
def seeded_everything(seed: int) -> Iterator[None]:
    """PyTorch's, Python's and NumPy's random numbers begin at that seed; what they were comes back afterwards."""
    plain, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(array)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that keeps what `copy.deepcopy` drops: hooks and attributes of parameters. `memo` is deepcopy's.

    Raises InputError where it cannot be copied, and where a hook holds a part of the network in its closure: the hook
    of the copy would look at the original.
    """
    place = f"model {type(model).__name__}"
    _refuse_closures(place, model)
    try:
        new = copy.deepcopy(model, {} if memo is None else memo)
    except Exception as error:  # such as a weight that is computed, and so is no leaf
        remedy = "remove pruning or weight_norm's old form, e.g. by torch.nn.utils.parametrizations"
        raise InputError(place, "a network that can be copied", reason(error), remedy) from error
    for old, own in zip(model.parameters(), new.parameters(), strict=True):
        own.__dict__.update({name: value for name, value in old.__dict__.items() if name not in own.__dict__})
        for hook in (old._backward_hooks or {}).values():
            own.register_hook(hook)
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            own.register_post_accumulate_grad_hook(hook)
    return new


def named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers, under each of their names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _all_hooks(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every hook of its modules and parameters, with the name of its owner."""
    for name, part in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            for hook in getattr(part, kind).values():
                yield name or "the network", hook
    for name, parameter in model.named_parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(parameter, kind, None) or {}).values():
                yield name, hook


def _refuse_closures(place: str, model: nn.Module) -> None:
    own = {id(part) for part in model.modules()} | {id(value) for value in model.parameters()}
    for owner, hook in _all_hooks(model):
        cells = getattr(hook, "__closure__", None) or ()
        if isinstance(hook, types.FunctionType) and any(id(cell.cell_contents) in own for cell in cells):
            expected = "hooks that look at the module or gradient that they are given"
            remedy = "use the hook's first argument instead"
            raise InputError(f"{place}, a hook of {owner}", expected, "one that holds a part of the network", remedy)


def _hooks(model: nn.Module) -> str | None:
    found = next(_all_hooks(model), None)
    return None if found is None else f"{found[0]} has a hook"


def _plain_state(model: nn.Module) -> str:
    """The plain Python values among the attributes of all modules."""
    skipped = {"training", *nn.Module().__dict__}
    parts = [
        {key: value for key, value in part.__dict__.items() if key not in skipped and _is_plain(value)}
        for part in model.modules()
    ]
    return repr(parts)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return value is None or isinstance(value, (bool, int, float, str))


@contextmanager
def _noting_returns(network: nn.Module, seen: Observed) -> Iterator[None]:
    handles = []
    for name, part in network.named_modules(remove_duplicate=False):
        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            seen.returned.setdefault(name, []).append((len(seen.calls), output))

        handles.append(part.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Notes every call."""

    def __init__(self, seen: Observed, flops: Callable[[], int]) -> None:
        super().__init__()
        self.seen, self.flops, self.contexts = seen, flops, _contexts()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs))
        versions = [_version(tensor) for tensor in given]
        draws, flops = torch.default_generator.get_state(), self.flops()
        name = name_of(func)
        if name not in CONTEXT_CALLS and self.contexts != _contexts():
            self.seen.lost = self.seen.lost or "its forward changes the gradient mode, autocast or what autograd saves"
        output = func(*args, **(kwargs or {}))
        writes = [tensor for tensor, version in zip(given, versions, strict=True) if _version(tensor) != version]
        makes = tensors_in(output)
        is_read = name in READS
        if is_read:
            self.seen.lost = self.seen.lost or f"its forward reads a value of its data ({name})"
        metadata = not makes and not writes and not is_read
        uses = [] if metadata else used_by(name, args, kwargs)
        drawn = not torch.equal(draws, torch.default_generator.get_state())
        done = self.flops() - flops
        self.seen.calls.append(Call(name, uses, makes, writes, drawn, output if is_read else None, is_read, done))
        return output


CONTEXT_CALLS = frozenset({"_set_grad_enabled", "_is_any_autocast_enabled", "__get__", "__set__"})


def _contexts() -> tuple[Any, ...]:
    """What an operation's meaning depends on beside its arguments."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )  # fmt: skip


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def name_of(func: Any) -> str:
    """What a function mode's `func` is called; of an attribute the descriptor's method, as `__get__`."""
    return str(getattr(func, "__name__", type(func).__name__))


def used_by(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors whose values a call of that name uses."""
    return tensors_in((args[1:] if name in LIKE else args, kwargs))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_in(part)]
    if isinstance(value, Mapping):
        return [tensor for part in value.values() for tensor in tensors_in(part)]
    if isinstance(value, slice):
        return tensors_in((value.start, value.stop, value.step))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for part in dataclasses.fields(value) for tensor in tensors_in(getattr(value, part.name))]
    return []


def with_tensors(value: Any, replace: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with each tensor replaced; itself where none is."""
    if isinstance(value, Tensor):
        return replace(value)
    if isinstance(value, (tuple, list)):
        parts = [with_tensors(part, replace) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts)  # also torch.return_types
    if isinstance(value, slice):
        return slice(*(with_tensors(part, replace) for part in (value.start, value.stop, value.step)))
    if isinstance(value, Mapping):
        replaced = {key: with_tensors(part, replace) for key, part in value.items()}
        if all(replaced[key] is value[key] for key in replaced):
            return value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):  # transformers' ModelOutput
            return dataclasses.replace(value, **replaced)
        kind: Any = type(value)
        return kind(replaced) if kind is not dict else replaced
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {part.name: getattr(value, part.name) for part in dataclasses.fields(value) if part.init}
        replaced = {name: with_tensors(part, replace) for name, part in fields.items()}
        changed = {name: part for name, part in replaced.items() if part is not fields[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value
