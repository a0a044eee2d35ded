"""A part of a network that is the network itself, run up to a layer, or from it on.

Below its end a part runs the network's own forward, until the layer has returned for the last time; an exception stops
it there. Above its start it runs the same forward: below the layer on stand-ins without values, of whose sizes and
types PyTorch's fake tensors keep account; what was received takes their place, found by identity. So hooks, autocast,
checkpoints, loops, keyword arguments and Python state mean what they mean in the uncut network. What crosses, and what
the other side must be told, is a `CutPlan`, found in observed passes (`planning.py`). Tests: tests/test_replay.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from halfpass.errors import InputError, RunError
from halfpass.networks.group_norm import with_gradient
from halfpass.networks.observe import READS, Made, copied, name_of, named_tensors, tensors_in, used_by, with_tensors
from halfpass.tree import call, unflatten

MOST_STAND_INS = 2**15  # then all is forgotten: passes that are never the same leave theirs behind
REMEMBERED = 8  # passes below a cut: whole batches, a last smaller one, both modes, and micro-batches
INPUTS = -1  # the number of the call that made the network's inputs
MANY = frozenset({"tolist", "numpy", "__array__"})  # reads of more than a number: of constants alone, and made again
# Their fake kernels refuse what the real ones take, as PyTorch 2.13 does float32 on a CPU. Their outputs' sizes are not
# in any data.
BY_COMPUTING = frozenset({"_grouped_mm", "grouped_mm"})
TRUTHS = frozenset({"__bool__", "equal", "allclose", "is_nonzero", "__contains__"})


@dataclass(frozen=True)
class Value:
    """A tensor that crosses. On the wire its samples come first: dimension `dim` has `times` entries for each sample,
    one sample's after the other's, or where `mixed` all samples' first entries first."""

    output: int | None  # which tensor of the layer's output it is; None where it is none
    made: Made | None  # the call that made it; None where none was seen, as for a custom function's output
    shape: tuple[int, ...]  # per sample, as on the wire; of a `whole` one of all
    dtype: str
    written: bool = False  # changed in place above the cut, so that the server half works on a copy
    exact: bool = False  # floating point values that no codec may change, for they are a mask's
    order: tuple[int, ...] | None = None  # of its dimensions in memory, where that is not the usual one
    whole: bool = False  # of the batch as a whole, not of each sample
    dim: int = 0
    times: int = 1
    mixed: bool = False

    def samples_first(self, tensor: Tensor) -> Tensor:
        """As it goes on the wire: (B, *shape), dense in that order, or channels last. Its gradient then is so too,
        whether it comes from a wire or not."""
        if self.whole:
            return tensor if self.order is None else tensor.contiguous()
        if self.times > 1:
            sizes = (self.times, -1) if self.mixed else (-1, self.times)
            tensor = tensor.unflatten(self.dim, sizes)
        at = self.dim + (self.times > 1 and self.mixed)
        tensor = tensor.movedim(at, 0) if at else tensor
        return tensor if self.order is None and not at else tensor.contiguous()

    def as_in_network(self, tensor: Tensor) -> Tensor:
        """The inverse of `samples_first`; in memory as it was, for the kernels' last digits depend on it."""
        at = self.dim + (self.times > 1 and self.mixed)
        if not self.whole:
            tensor = tensor.movedim(0, at) if at else tensor
            tensor = tensor.flatten(self.dim, self.dim + 1) if self.times > 1 else tensor
        if self.order is not None:
            back = sorted(range(tensor.ndim), key=self.order.__getitem__)
            return tensor.permute(self.order).contiguous().permute(back)
        return tensor.contiguous() if at else tensor


@dataclass(frozen=True)
class Pass:
    """Where the cut lies in a forward pass of one mode."""

    returns: int  # how often the layer returns; the last time is the cut
    values: tuple[Value, ...]  # what crosses, the layer's own first
    again: tuple[int, ...] = ()  # calls below that the server half makes too: they depend on sizes and constants alone
    reads: bool = False  # whether Python reads values of data below the cut, which then cross too

    @property
    def counts(self) -> bool:
        """Whether the client half must count calls."""
        return self.reads or any(v.output is None and v.made and v.made.call != INPUTS for v in self.values)

    @property
    def whole(self) -> int:
        """How many tensors at the end of what crosses are of the batch as a whole: such values, and what was read."""
        return sum(value.whole for value in self.values) + self.reads


@dataclass(frozen=True)
class CutPlan:
    """How a network is cut behind `layer`. Both ends need the same; it is made where data are."""

    layer: str
    train: Pass
    evaluation: Pass
    inputs: dict[str, tuple[tuple[int, ...], str]]  # (shape per sample, dtype) by name
    client: tuple[str, ...]  # names of the weights and buffers of the client half
    server: tuple[str, ...]
    unused: tuple[str, ...] = ()  # those of either that no sample used of those on which it was made

    @property
    def values(self) -> tuple[Value, ...]:
        """What crosses in training; values of whole batches last. In evaluation it may be less, or more."""
        return self.train.values

    def of(self, training: bool) -> Pass:
        return self.train if training else self.evaluation


def plan_as_dict(plan: CutPlan) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(plan)


def plan_from_dict(values: Mapping[str, Any]) -> CutPlan:
    """The inverse of `plan_as_dict`; raises InputError where it is no plan."""
    try:
        inputs = {str(k): (tuple(map(int, shape)), str(dtype)) for k, (shape, dtype) in values["inputs"].items()}
        client, server, unused = (tuple(map(str, values[key])) for key in ("client", "server", "unused"))
        passes = _pass(values["train"]), _pass(values["evaluation"])
        return CutPlan(str(values["layer"]), *passes, inputs, client, server, unused)
    except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError) as error:  # int(1e999)
        remedy = "both sides must run the same halfpass"
        raise InputError("the plan of the cut", "one as halfpass makes it", repr(error)[:80], remedy) from None


def _pass(values: Mapping[str, Any]) -> Pass:
    crossing = tuple(map(_value, values["values"]))
    return Pass(int(values["returns"]), crossing, tuple(map(int, values["again"])), bool(values["reads"]))


def _value(values: Mapping[str, Any]) -> Value:
    made = None if values["made"] is None else Made(**values["made"])
    order = None if values["order"] is None else tuple(map(int, values["order"]))
    return Value(**{**values, "made": made, "shape": tuple(map(int, values["shape"])), "order": order})


class Part(nn.Module):
    """The network from behind one layer (`start`; None: from its inputs) to another (`end`; None: to its outputs).

    Its parameters, buffers and state are those that the part uses, under the network's own names; the others take no
    room. The network is shared with nobody.
    """

    own: frozenset[str]

    def __init__(self, network: nn.Module, own: Iterable[str], start: CutPlan | None, end: CutPlan | None) -> None:
        super().__init__()
        self.network, self.own, self.start, self.end = network, frozenset(own), start, end
        self._memory = _Memory()
        _shrink(network, self.own)
        unused = {name for plan in (start, end) if plan is not None for name in plan.unused}
        self.looks_out = any(
            value.dtype == torch.bool or name in unused
            for name, value in named_tensors(network) if name not in self.own
        )  # fmt: skip
        """Whether calls are watched for what the part does not have. Most of it shows if it is used: it is NaN, or of
        integers the least."""

    def foreign(self) -> dict[int, str]:
        """Names of what the part does not have, by identity."""
        named = list(named_tensors(self.network))
        mine = {id(value) for name, value in named if name in self.own}
        return {id(value): name for name, value in named if id(value) not in mine}

    @property
    def whole(self) -> int:
        """How many tensors at the end of what it returns, in its mode, are of the batch as a whole."""
        return 0 if self.end is None else self.end.of(self.training).whole

    @property
    def exact(self) -> frozenset[int]:
        """Which of what it returns are floating point values that no codec may change."""
        values = () if self.end is None else self.end.of(self.training).values
        return frozenset(i for i, value in enumerate(values) if value.exact)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs, or what crossed → the network's outputs, or the tuple of what crosses."""
        if len(self._memory.fakes) > MOST_STAND_INS:
            self._memory = _Memory()
        run = _Run(self, args)
        given: Any = kwargs or args
        if self.start is not None:
            given = self._memory.inputs(self.start, run.samples, run.device)
        run.take_inputs(given)
        handles = [self.network.get_submodule(plan.layer).register_forward_hook(run.returned)
                   for plan in (self.start, self.end) if plan is not None]  # fmt: skip
        try:
            if run.watches:
                with run:
                    output = call(self.network, given)
            else:
                output = call(self.network, given)
        except _Stopped as stop:
            if stop.run is not run:
                raise
            return run.crossing
        finally:
            for handle in handles:
                handle.remove()
        if self.end is not None:
            raise RunError(
                f"layer {self.end.layer}", f"{self.end.of(self.training).returns} returns, as at the start",
                "fewer", "cut at a layer that every batch goes through",
            )  # fmt: skip
        return run.real_output(output)

    # Only what is the part's own is seen from outside.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._own(self.network.named_parameters("", recurse, remove_duplicate), prefix)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from self._own(self.network.named_buffers("", recurse, remove_duplicate), prefix)

    def _own(self, named: Iterable[tuple[str, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in named:
            if name in self.own:
                yield (f"{prefix}.{name}" if prefix else name), value

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        state = self.network.state_dict(keep_vars=keep_vars)
        found = {f"{prefix}{name}": value for name, value in state.items() if name in self.own}
        if destination is None:
            return found
        destination.update(found)
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        known = self.state_dict().keys()
        missing, unexpected = [n for n in known if n not in state_dict], [n for n in state_dict if n not in known]
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing keys {missing[:3]}, unexpected keys {unexpected[:3]} in the state of a half")
        self.network.load_state_dict({n: v for n, v in state_dict.items() if n in known}, strict=False, assign=assign)
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """As a module's part, such as an edge's."""
        names = [name for name in self.state_dict() if f"{prefix}{name}" in state_dict]
        self.load_state_dict({name: state_dict.pop(f"{prefix}{name}") for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Part":
        for parameter in self.parameters():
            parameter.data = fn(parameter.data)
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad.data)
        for buffer in self.buffers():
            buffer.data = fn(buffer.data)
        self._memory = _Memory()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        others = [v for n, v in named_tensors(self.network) if n not in self.own]
        for value in others:  # else each would be made in full
            small = _small(value)
            memo[id(value)] = nn.Parameter(small, value.requires_grad) if isinstance(value, nn.Parameter) else small
        new = Part(copied(self.network, memo), self.own, self.start, self.end)
        new.training = self.training
        return new


@contextmanager
def untraced() -> Iterator[None]:
    """What is computed of sizes alone has no place in a trace, as ONNX is made of."""
    tracing, put = torch._C._get_tracing_state(), torch._C._set_tracing_state  # type: ignore[attr-defined]
    put(None)
    try:
        yield
    finally:
        put(tracing)


def _small(value: Tensor) -> Tensor:
    """One element that looks like the whole; no number, so that nothing can be computed of it without a word."""
    if value.is_floating_point() or value.is_complex():
        nothing: float = float("nan")
    else:
        nothing = 0 if value.dtype == torch.bool else torch.iinfo(value.dtype).min or torch.iinfo(value.dtype).max
    return torch.full((), nothing, dtype=value.dtype, device=value.device).expand(value.shape)


def _shrink(network: nn.Module, own: frozenset[str]) -> None:
    kept = {id(value) for name, value in named_tensors(network) if name in own}
    for _, value in named_tensors(network):
        if id(value) not in kept and value.numel() > 1:
            value.data = _small(value)


class _Stopped(BaseException):  # no forward's `except Exception` may take it
    """The end of the part was reached."""

    def __init__(self, run: "_Run") -> None:
        super().__init__()
        self.run = run


@dataclass
class _Remembered:
    """A call below the cut, and what it gave."""

    func: Any
    args: Any
    kwargs: Any
    output: Any
    versions: list[int]  # of the tensors in it, where they are real

    def is_of(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the same call would give the same, and nobody has changed that since."""
        same = self.func is func and _same(self.args, args) and _same(self.kwargs, kwargs)
        return same and self.versions == _versions(self.output)


class _Memory:
    """What a part needs not do again: the calls below its start, by mode and sizes."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.fakes: dict[int, Tensor] = {}  # by the identity of the stand-in, or of the other side's weight
        self._stand_ins: dict[int, Tensor] = {}  # by that of the fake; both tables keep what they name alive
        self._weights: list[Tensor] = []  # kept alive too: a forward may put another buffer in the place of its own
        self._calls: dict[Any, list[_Remembered]] = {}
        self._inputs: dict[Any, Any] = {}

    def inputs(self, plan: CutPlan, samples: int, device: torch.device) -> Any:
        """Stand-ins for so many samples."""
        key = (samples, device)
        if key not in self._inputs:
            with untraced(), self.mode:
                named = {
                    name: torch.empty((samples, *shape), dtype=getattr(torch, dtype), device=device)
                    for name, (shape, dtype) in plan.inputs.items()
                }
            _forget_oldest(self._inputs)
            self._inputs[key] = unflatten({name: self.stand_in(fake) for name, fake in named.items()})
        return self._inputs[key]

    def stand_in(self, fake: Tensor) -> Tensor:
        """A plain tensor for a fake one: networks look whether they are run on fakes, and then go other ways."""
        if not isinstance(fake, FakeTensor):
            return fake
        if id(fake) not in self._stand_ins:
            plain = _small(fake)
            self._stand_ins[id(fake)], self.fakes[id(plain)] = plain, fake
        return self._stand_ins[id(fake)]

    def calls(self, key: Any) -> list[_Remembered]:
        if key not in self._calls:
            _forget_oldest(self._calls)
            self._calls[key] = []
        return self._calls[key]

    def fake_weight(self, value: Tensor, device: torch.device) -> Tensor:
        """For a weight of the other side."""
        if id(value) not in self.fakes:
            with untraced(), self.mode, torch.no_grad():
                like = torch.empty(value.shape, dtype=value.dtype, device=device)
            is_parameter = isinstance(value, nn.Parameter)
            self._weights.append(value)
            self.fakes[id(value)] = nn.Parameter(like, value.requires_grad) if is_parameter else like
        return self.fakes[id(value)]


def _forget_oldest(table: dict[Any, Any]) -> None:
    while len(table) >= REMEMBERED:
        del table[next(iter(table))]


class _Run(TorchFunctionMode):
    """One forward pass of a part."""

    def __init__(self, part: Part, args: Sequence[Any]) -> None:
        super().__init__()
        self.part, training = part, part.training
        self.start = None if part.start is None else part.start.of(training)
        self.end = None if part.end is None else part.end.of(training)
        self.above = self.start is None  # of the start
        self.watches = self.start is not None or (self.end is not None and self.end.counts) or part.looks_out
        self.foreign = part.foreign() if self.watches else {}
        self.number, self.returns = 0, {"start": 0, "end": 0}
        self.grabbed: dict[Made, Tensor] = {}
        self.wanted = {v.made.call for v in self.end.values if v.made} if self.end else set()
        self.sent_reads: list[bool | int | float] = []
        self.crossing: tuple[Tensor, ...] = ()
        if self.start is not None:
            self.memory = part._memory
            self.reads = self.start.reads
            self.device = next(iter(args)).device
            self._receive(args)
            self.again = frozenset(self.start.again)
            key = (training, self.samples, torch.is_grad_enabled(), torch.is_autocast_enabled(self.device.type))
            self.remembered = self.memory.calls(key)

    def _receive(self, args: Sequence[Tensor]) -> None:
        assert self.start is not None
        values = self.start.values
        if len(args) != len(values) + self.reads:
            expected = f"{len(values) + self.reads} tensors that cross"
            raise InputError("the server half", expected, f"{len(args)}", "give what the client half returned")
        self.given = [value.as_in_network(tensor) for value, tensor in zip(values, args, strict=False)]
        self.given = [t.clone() if v.written else t for v, t in zip(values, self.given, strict=True)]
        self.read_values = iter(args[-1].view(torch.float64).tolist() if self.reads else ())
        self.put: dict[int, Tensor] = {}
        self.kept: list[Any] = []  # so that no other tensor has the identity of one of them
        pairs = zip(values, self.given, strict=True)
        self.places = {v.made: t for v, t in pairs if v.made and (v.output is None or self.end is not None)}
        first = next(i for i, value in enumerate(values) if not value.whole)
        self.samples = len(args[first])

    def take_inputs(self, inputs: Any) -> None:
        """Inputs that cross, such as masks, count as what call INPUTS made."""
        for leaf, tensor in enumerate(tensors_in(inputs)):
            self.grabbed[Made(INPUTS, leaf)] = tensor
        self._placed(INPUTS, "", inputs)

    # --- calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.number = self.number, self.number + 1
        kwargs = kwargs or {}
        if not self.above:
            return self._below(number, func, args, kwargs)
        if self.start is not None:
            args, kwargs = with_tensors(args, self._real), with_tensors(kwargs, self._real)
        used = used_by(name_of(func), args, kwargs) if self.foreign or self.start is not None else []
        if self.start is not None:
            if any(id(tensor) in self.memory.fakes for tensor in used):
                return self._of_stand_ins(func, args, kwargs)
            if name_of(func) == "group_norm" and args and any(tensor.requires_grad for tensor in used[1:]):
                args = (with_gradient(args[0]), *args[1:])
        # the name of a weight or buffer that this part does not have, where the call may use one
        foreign = next((self.foreign[id(t)] for t in used if id(t) in self.foreign), None)
        try:
            output = func(*args, **kwargs)
        except Exception as error:
            if foreign is not None:  # such as an index that is the least number
                raise self._not_had(func, foreign) from error
            raise
        if foreign is not None and (tensors_in(output) or name_of(func) in READS):
            raise self._not_had(func, foreign)
        if self.end is not None:
            if number in self.wanted:
                for leaf, tensor in enumerate(tensors_in(output)):
                    self.grabbed[Made(number, leaf, name_of(func))] = tensor
            if self.end.reads and name_of(func) in READS and name_of(func) not in MANY:
                self.sent_reads.append(output)  # of constants too: which calls they are differs from way to way
        return output

    def _not_had(self, func: Any, name: str) -> RunError:
        side = "client" if self.part.start is None else "server"
        expected = "weights and buffers that it has, and had when the cut was tried on the first samples"
        remedy = "cut at another layer: which half uses that depends on the samples"
        return RunError(f"the {side} half, {name_of(func)}", expected, f"{name!r}, which it has not", remedy)

    def _below(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        assert self.start is not None
        name = name_of(func)
        again = number in self.again and not any(id(t) in self.memory.fakes for t in used_by(name, args, kwargs))
        if name in READS and (not again or (self.reads and name not in MANY)):
            return self._received_read(func, args)
        done = self.remembered[number] if number < len(self.remembered) else None
        if done is not None and done.is_of(func, args, kwargs):
            return self._placed(number, name, done.output)
        del self.remembered[number:]
        if again:
            output = func(*args, **kwargs)
        else:
            output = with_tensors(self._on_fakes(func, args, kwargs), self.memory.stand_in)
        if number == len(self.remembered):
            self.remembered.append(_Remembered(func, args, kwargs, output, _versions(output)))
        return self._placed(number, name, output)

    def _placed(self, number: int, name: str, output: Any) -> Any:
        """Where an output is to be replaced by what was received, notes it."""
        if self.start is not None and self.places:
            for leaf, tensor in enumerate(tensors_in(output)):
                if (received := self.places.get(Made(number, leaf, name))) is not None:
                    self._put(tensor, received)
        return output

    def _put(self, stand_in: Tensor, received: Tensor) -> None:
        self.put[id(stand_in)] = received
        self.kept.append(stand_in)

    def _real(self, tensor: Tensor) -> Tensor:
        return self.put.get(id(tensor), tensor)

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self.foreign:
            return self.memory.fake_weight(tensor, self.device)
        return self.memory.fakes.get(id(tensor), tensor)

    def _on_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = with_tensors(args, self._fake), with_tensors(kwargs, self._fake)
        if name_of(func) in BY_COMPUTING:
            return self._on_zeros(func, args, kwargs)
        with untraced(), self.memory.mode:
            return func(*args, **kwargs)

    def _on_zeros(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A fake of what `func` gives for tensors of zeros."""
        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)

        with torch.no_grad():
            output = func(*with_tensors(args, zeros), **with_tensors(kwargs, zeros))
        return with_tensors(output, self.memory.mode.from_tensor)

    def _of_stand_ins(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A size or type of what did not cross is known above the cut, a value is not."""
        output = None if name_of(func) in READS else self._on_fakes(func, args, kwargs)
        if name_of(func) in READS or tensors_in(output):
            found = "one that was computed below the cut and did not cross"
            raise RunError(f"the server half, {name_of(func)}", "values that crossed", found, "cut at another layer")
        return output

    def _received_read(self, func: Any, args: Any) -> Any:
        value = next(self.read_values, None)
        if value is None:
            found, remedy = "one more", "both sides must run the same network"
            raise RunError("the server half", "the values that the client half read below the cut", found, remedy)
        name, read = name_of(func), self._fake(args[0])
        if name in TRUTHS or (name == "item" and read.dtype == torch.bool):
            return bool(value)
        whole = name in ("__int__", "__index__") or (name == "item" and not read.is_floating_point())
        return int(value) if whole else value

    # --- returns of layers

    def returned(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook of the layers at the part's start and end."""
        if self.part.start is not None and module is self.part.network.get_submodule(self.part.start.layer):
            assert self.start is not None
            self.returns["start"] += 1
            if self.returns["start"] == self.start.returns:
                output = self._pass_start(output)
        if self.part.end is not None and module is self.part.network.get_submodule(self.part.end.layer):
            assert self.end is not None
            self.returns["end"] += 1
            if self.returns["end"] == self.end.returns:
                self.crossing = self._crossing(self.end, output)
                raise _Stopped(self)
        return output

    def _pass_start(self, output: Any) -> Any:
        """What was received takes the place of the layer's output."""
        assert self.start is not None
        self.above = True
        received = {v.output: t for v, t in zip(self.start.values, self.given, strict=True) if v.output is not None}
        leaves = tensors_in(output)
        for leaf, tensor in received.items():
            self._put(leaves[leaf], tensor)
        return with_tensors(output, self._real)

    def _crossing(self, end: Pass, output: Any) -> tuple[Tensor, ...]:
        leaves = tensors_in(output)
        found: list[Tensor] = []
        for value in end.values:
            tensor = self._made(value.made) if value.output is None else leaves[value.output]
            if tensor is None:  # this batch takes a way on which it is not made, nor used above
                found.append(self._nothing(end, value, found))
                continue
            found.append(value.samples_first(self._real(tensor) if self.start else tensor))
        if end.reads:
            found.append(torch.tensor(self.sent_reads, dtype=torch.float64).view(torch.int64))  # its bits: no gradient
        return tuple(found)

    def _nothing(self, end: Pass, value: Value, before: Sequence[Tensor]) -> Tensor:
        """In the place of a value that is not made. What Python read of the data decides the way, alike on either side;
        where it read nothing there is one way alone."""
        if not end.reads:
            place, expected = f"value {len(before)} that crosses the cut", "the call that made it at the start"
            raise RunError(place, expected, "another order of calls", "cut at another layer")
        shape = value.shape if value.whole else (len(before[0]), *value.shape)
        return torch.zeros(shape, dtype=getattr(torch, value.dtype), device=before[0].device)

    def _made(self, made: Made | None) -> Tensor | None:
        """What that call made here, or what was received at the start: it crosses both cuts."""
        assert made is not None
        received = None if self.start is None else self.places.get(made)
        return self.grabbed.get(made) if received is None else received

    def real_output(self, output: Any) -> Any:
        """The network's outputs, in which nothing may be a stand-in."""
        output = with_tensors(output, self._real)
        if self.start is not None and any(id(tensor) in self.memory.fakes for tensor in tensors_in(output)):
            found, remedy = "one that was computed below the cut and did not cross", "cut at another layer"
            raise RunError("the server half", "outputs that it computed", found, remedy)
        return output


def _same(one: Any, other: Any) -> bool:
    """Surely the same arguments: tensors and objects themselves, plain values of one type and equal."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(part, other[key]) for key, part in one.items())
    if isinstance(one, slice):
        return _same((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    plain = (bool, int, float, str, torch.dtype, torch.device, torch.Size, torch.memory_format)
    return isinstance(one, plain) and bool(one == other)


def _versions(output: Any) -> list[int]:
    return [t._version for t in tensors_in(output) if not isinstance(t, FakeTensor) and not t.is_inference()]
