"""Where a watched network can be cut and what crosses there; which cuts are refused. Tests: tests/test_replay.py.

Everything that ran when the layer returned for the last time is below, the rest above. What was made below of data,
weights or random numbers and is used above crosses; what depends on sizes and constants alone is made again above.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from halfpass.errors import InputError, near_miss
from halfpass.networks.observe import SENT, Call, Made, Observed, named_tensors, tensors_in
from halfpass.networks.replay import INPUTS, CutPlan, Pass, Value
from halfpass.tree import sample_count

DATA, MASK, WEIGHTS, TRAINED, DRAWN = "data", "mask", "weights", "trained", "drawn"  # what a value depends on


@dataclass(frozen=True)
class Sides:
    """A cut in one observed pass."""

    at: Pass
    client: dict[str, Tensor]  # weights and buffers that the client half uses, by name
    server: dict[str, Tensor]
    made: set[str]  # names of buffers that are made below, and take another's place


class Watched:
    """An observed pass, ready to be cut anywhere."""

    def __init__(self, seen: Observed, may_cross: Iterable[str] = ()) -> None:
        """`may_cross`: inputs that the server may see as they are, such as the edges of a graph."""
        self.seen, self.may_cross = seen, frozenset(may_cross)
        self.samples = sample_count(seen.inputs)
        self.names: dict[int, list[str]] = {}
        self.state: dict[int, Tensor] = {}
        before, after = dict(seen.state), dict(named_tensors(seen.network))
        for name, value in (*before.items(), *after.items()):
            if name not in (names := self.names.setdefault(id(value), [])):
                names.append(name)
            self.state[id(value)] = value
        self.inputs = {id(value): name for name, value in seen.inputs.items()}
        self.written = {name for each in seen.calls for value in each.writes for name in self.names.get(id(value), ())}
        """Names of what a pass writes, in place or by another in its place; of others too, after `share_written`."""
        self.written |= {name for name in before.keys() & after.keys() if before[name] is not after[name]}

    def depends(self, until: int) -> dict[int, set[str]]:
        """What each memory, by its identity, depends on after so many calls. Views share one."""
        found: dict[int, set[str]] = {}
        for name, tensor in self.seen.inputs.items():
            found[_memory(tensor)] = {MASK if is_mask(tensor) or name in self.may_cross else DATA}
        for value in self.state.values():
            found[_memory(value)] = self._of_state(value)
        for each in self.seen.calls[:until]:
            source = {DRAWN} if each.draws else set()
            for tensor in each.uses:
                source |= found.get(_memory(tensor), set())
            for tensor in (*each.makes, *each.writes):
                own = found.get(_memory(tensor), set())
                found[_memory(tensor)] = own | source
        return found

    def _of_state(self, value: Tensor) -> set[str]:
        trained = value.requires_grad or self._is_written(value)
        return ({WEIGHTS} if isinstance(value, nn.Parameter) else set()) | ({TRAINED} if trained else set())

    def _is_written(self, value: Tensor) -> bool:
        return any(name in self.written for name in self.names[id(value)])

    def cut(self, place: str, layer: str) -> Sides:
        """The cut behind the last return of `layer`; raises InputError where there can be none."""
        seen = self.seen
        if layer not in seen.returned:
            _refuse_name(place, seen, layer)
        until, output = seen.returned[layer][-1]
        below, above = seen.calls[:until], seen.calls[until:]
        made = {id(t): Made(INPUTS, leaf) for leaf, t in enumerate(seen.inputs.values())}
        made |= {id(t): Made(n, leaf, each.name) for n, each in enumerate(below) for leaf, t in enumerate(each.makes)}
        own = {id(t): i for i, t in reversed(list(enumerate(tensors_in(output))))}
        depends = self.depends(until)
        needed: dict[int, Tensor] = {}
        for tensor in (*(t for each in above for t in each.uses), *tensors_in(seen.outputs)):
            if id(tensor) not in self.state and (id(tensor) in made or id(tensor) in own):
                needed.setdefault(id(tensor), tensor)
        crossing = [t for t in needed.values() if depends.get(_memory(t), set()) - {WEIGHTS}]
        again_from = [t for t in needed.values() if not depends.get(_memory(t), set()) - {WEIGHTS}]
        again, reads = self._again(place, below, again_from, depends)
        self._refuse_raw(place, crossing, depends)
        crossing.sort(
            key=lambda t: (id(t) not in own, not t.is_floating_point(), own.get(id(t), 0), _place(made.get(id(t))))
        )
        if not crossing or id(crossing[0]) not in own:
            remedy = "cut at another layer"
            raise InputError(place, "an output that is used above the cut", "one that is not", remedy)
        changed = _changed(place, crossing, above)
        values = tuple(
            Value(own.get(id(t)), made.get(id(t)), tuple(t.shape), dtype_name(t), id(t) in changed,
                  depends[_memory(t)] <= {MASK}, memory_order(t))
            for t in crossing
        )
        repeated = [each for number, each in enumerate(below) if number in again]
        client, server = self._used(below), self._used([*above, *repeated])
        self._refuse_shared(place, client, server)
        at = Pass(len(seen.returned[layer]), values, tuple(sorted(again)), reads)
        new = {name for each in below for t in each.makes for name in self.names.get(id(t), ())}
        return Sides(at, client, server, new)

    def _again(
        self, place: str, below: Sequence[Call], wanted: Iterable[Tensor], depends: Mapping[int, set[str]]
    ) -> tuple[set[int], bool]:
        """The calls that the server half makes too, and whether values that Python read of data must be sent."""
        makers: dict[int, list[int]] = {}  # of each memory
        for number, each in enumerate(below):
            for tensor in (*each.makes, *each.writes):
                makers.setdefault(_memory(tensor), []).append(number)
        waiting, again, sent = list(wanted), set[int](), False
        for number, each in enumerate(below):
            if each.is_read:
                if any(depends.get(_memory(t), set()) - {WEIGHTS} for t in each.uses):
                    sent = True
                    self._check_sent(place, each)
                else:
                    again.add(number)
                    waiting += each.uses
        done: set[int] = set()
        while waiting:
            memory = _memory(waiting.pop())
            if memory in done:
                continue
            done.add(memory)
            for number in makers.get(memory, []):
                again.add(number)
                waiting += below[number].uses
        return again, sent

    def _check_sent(self, place: str, each: Call) -> None:
        if type(each.reads) not in SENT or abs(each.reads) > 2**53:
            found = f"{type(each.reads).__name__} by {each.name}()"
            remedy = "cut at another layer, or read it above the cut"
            raise InputError(place, "single numbers where Python reads values of data below the cut", found, remedy)

    def _refuse_raw(self, place: str, crossing: Iterable[Tensor], depends: Mapping[int, set[str]]) -> None:
        for tensor in crossing:
            if DATA in (found := depends[_memory(tensor)]) and WEIGHTS not in found:
                name = self.inputs.get(id(tensor))
                alone = "" if name is not None else " through operations without weights"
                what = f"the raw input{f' {name!r}' if name else ''}{alone}, {tuple(tensor.shape)}, used above the cut"
                named = "it" if name else f"the input, of {', '.join(filter(None, self.inputs.values()))}"
                unless = f", unless model.may_cross names {named}" if any(self.inputs.values()) else ""
                remedy = f"cut at another layer: the data itself must not cross{unless}"
                raise InputError(place, "values that the client half has learned", what, remedy)

    def _used(self, calls: Iterable[Call]) -> dict[str, Tensor]:
        found = {id(t): t for each in calls for t in (*each.uses, *each.writes) if id(t) in self.state}
        names = {name: value for key, value in found.items() for name in self.names[key]}
        order = [name for each in self.names.values() for name in each]
        return {name: names[name] for name in order if name in names}

    def _refuse_shared(self, place: str, client: Mapping[str, Tensor], server: Mapping[str, Tensor]) -> None:
        """A weight that is trained, or a buffer that is written, can have one owner alone."""
        theirs = {id(value) for value in server.values()}
        for name, value in client.items():
            if id(value) in theirs and (value.requires_grad or self._is_written(value)):
                others = [other for other in self.names[id(value)] if other in server and other != name]
                also = f" (above as {others[0]!r})" if others else ""
                raise InputError(
                    place, "weights and buffers that one half uses", f"{name!r} used by both halves{also}",
                    "cut where all its uses are on one side, or freeze it (model.freeze)",
                )  # fmt: skip


def share_written(watched: Iterable[Watched]) -> None:
    """What one pass writes counts as written in all of them, as where the first batch alone sets a buffer."""
    watched = list(watched)
    written = set().union(*(each.written for each in watched))
    for each in watched:
        each.written |= written


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Its dimensions as they lie in memory, the outermost first; None where that is their own order, or channels last,
    which arithmetic chooses."""
    usual = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return None if usual else tuple(sorted(range(tensor.ndim), key=lambda d: (-tensor.stride()[d], d)))


def _place(made: Made | None) -> tuple[int, int]:
    return (-1, 0) if made is None else (made.call, made.leaf)


def _memory(tensor: Tensor) -> int:
    """The identity of its memory, which views share."""
    if tensor.layout != torch.strided:  # a sparse tensor has several memories, and no views
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)


def is_mask(tensor: Tensor) -> bool:
    """Whole numbers or truth values of which there are zeros and ones alone: it says where samples are."""
    if tensor.dtype == torch.bool:
        return True
    return not (tensor.is_floating_point() or tensor.is_complex()) and bool(((tensor == 0) | (tensor == 1)).all())


def _changed(place: str, crossing: Sequence[Tensor], above: Iterable[Call]) -> set[int]:
    """Those of what crosses that are changed in place above the cut, directly or through a view."""
    changed = {_memory(t) for each in above for t in each.writes}
    written = [t for t in crossing if _memory(t) in changed]
    if len({_memory(t) for t in written}) < len(written):
        raise InputError(
            place, "tensors of their own memory", "two that share it and are changed in place above the cut",
            "cut at another layer",
        )  # fmt: skip
    return {id(t) for t in written}


def _refuse_name(place: str, seen: Observed, layer: str) -> NoReturn:
    names = [name for name in seen.returned if name]
    known = layer and layer in dict(seen.network.named_modules())
    found = "a module that forward does not call by itself" if known else "no such layer"
    remedy = near_miss(layer, names, f"for instance {', '.join(names[:5])}")
    raise InputError(place, "the name of a layer", found, remedy)


# --- one plan from several passes -------------------------------------------------------------------------------------


Passes = Sequence[Watched]  # of two different numbers of samples, then of as many as the first under other seeds


def make_plan(
    place: str, layer: str, train: Passes, evaluation: Passes, others: Sequence[tuple[Passes, Passes]] = ()
) -> CutPlan:
    """The plan of the cut behind `layer`, from passes in training and evaluation; `others` are of other samples, by
    whose values Python may go another way.

    Raises InputError where the cut is refused, or passes differ in what crosses.
    """
    passes, client, server, made = list[Pass](), dict[str, Tensor](), dict[str, Tensor](), set[str]()
    for ways in zip((train, evaluation), *others, strict=True):
        found: list[Pass] = []
        for watched in ways:
            sides = [each.cut(place, layer) for each in watched]
            for side in sides:
                client, server, made = client | side.client, server | side.server, made | side.made
            found.append(_laid_out(place, sides, [each.samples for each in watched]))
        passes.append(functools.reduce(functools.partial(_both_ways, place), found))
    _refuse_difference(
        place, passes[0].values[:1], passes[1].values[:1], "in evaluation than in training", sizes=False
    )
    for name in client.keys() & server.keys():
        if client[name].requires_grad:
            raise InputError(
                place, "weights and buffers that one half uses", f"{name!r} used by both halves",
                "cut where all its uses are on one side, or freeze it (model.freeze)",
            )  # fmt: skip
    inputs = {
        name: (tuple(value.shape[1:]), dtype_name(value))
        for name, value in train[0].seen.inputs.items()
    }
    of_client, of_server = _unused(train[0], client, server, made)
    unused = (*of_client, *of_server)
    return CutPlan(layer, passes[0], passes[1], inputs, (*client, *of_client), (*server, *of_server), unused)


def _unused(
    watched: Watched, client: Iterable[str], server: Iterable[str], made: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Weights and buffers that no pass used, by side, such as those of an expert that few samples go to: each is where
    it is `made`, or where the others of the smallest module around it are, and with the server where that is on both
    sides."""
    sides = (set(client), set(server))
    found: tuple[list[str], list[str]] = ([], [])
    for names in watched.names.values():
        if any(name in side for side in (*sides, *found) for name in names):
            continue
        if any(name in made for name in names):
            found[0].extend(names)
            continue
        module = names[0]
        owners = [False, True]
        while module:
            module = module.rpartition(".")[0]
            around = [any(name.startswith(f"{module}.") for name in side) for side in sides] if module else [True, True]
            if any(around):
                owners = around
                break
        found[0 if owners == [True, False] else 1].extend(names)
    return found


def _both_ways(place: str, one: Pass, other: Pass) -> Pass:
    """A pass in which the values of both cross, where Python decides by its data which way to go."""
    own = [[value for value in each.values if value.output is not None] for each in (one, other)]
    _refuse_difference(place, own[0], own[1], "for other samples")
    known = {value.made for value in one.values}
    new = [value for value in other.values if value.output is None and value.made not in known]
    values = tuple(sorted((*one.values, *new), key=lambda value: value.whole))
    again = tuple(sorted({*one.again, *other.again}))
    return replace(one, values=values, again=again, reads=one.reads or other.reads)


def _laid_out(place: str, sides: Sequence[Sides], samples: Sequence[int]) -> Pass:
    """One pass out of two with other numbers of samples, which tell each value's dimension of samples."""
    first, second, *others = (side.at for side in sides)
    for other in others:
        _refuse_difference(place, first.values, other.values, "under another seed")
        if [v.made for v in first.values if v.output is None] != [v.made for v in other.values if v.output is None]:
            remedy = "turn off what skips layers at random, or cut at another layer"
            raise InputError(place, "one order of calls below the cut", "another under another seed", remedy)
    _refuse_difference(place, first.values, second.values, "for another number of samples", shapes=False)
    if any(v.output is None for v in first.values) and first.again != second.again:
        remedy = "cut at another layer"
        raise InputError(place, "the same calls for any number of samples", "others", remedy)
    values = tuple(
        _lay_out(a, a.shape, b.shape, samples) for a, b in zip(first.values, second.values, strict=True)
    )
    if values[0].whole:
        found, remedy = f"{first.values[0].shape}, of none", "cut at another layer"
        raise InputError(place, "an output of the layer that has a dimension of samples", found, remedy)
    values = tuple(sorted(values, key=lambda value: value.whole))
    return replace(first, values=values, reads=any(side.at.reads for side in sides))


def _lay_out(value: Value, one: tuple[int, ...], other: tuple[int, ...], samples: Sequence[int]) -> Value:
    grows = [d for d, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    if len(grows) == 1:
        dim = grows[0]
        times, rest = divmod(one[dim], samples[0])
        if rest == 0 and times * samples[1] == other[dim] and times > 0:
            laid = replace(value, dim=dim, times=times)
            meta = torch.empty(one, device="meta")
            return replace(laid, shape=tuple(laid.samples_first(meta).shape[1:]))
    return replace(value, whole=True)


def _refuse_difference(
    place: str, ones: Sequence[Value], others: Sequence[Value], when: str, *, shapes: bool = True, sizes: bool = True
) -> None:
    """`shapes`: how samples lie in them counts too; `sizes`: and how large each is."""

    def key(value: Value) -> tuple[object, ...]:
        shape = value.shape if sizes else len(value.shape)
        laid = (shape, value.dim, value.times, value.whole) if shapes else len(value.shape)
        return value.dtype, value.output, laid

    if list(map(key, ones)) != list(map(key, others)):
        found = f"{[v.shape for v in others]} for {[v.shape for v in ones]} {when}"
        raise InputError(place, "the same values across the cut in every pass", found, "cut at another layer")
