"""Cutting a network at a named layer into a client half and a server half.

Everything that ran when the layer returned is the client half, the rest is the server half, and every tensor that was
computed before and is used after crosses. `trace.py` makes the network a graph, `crossing.py` finds what crosses in it.
Tests: tests/test_split.py.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfpass.errors import HalfpassError, InputError, reason
from halfpass.networks.checking import check_exact
from halfpass.networks.crossing import Cut, all_cuts, find_cut, refuse_shared, refuse_untrainable
from halfpass.networks.group_norm import guard_group_norms
from halfpass.networks.models import Model
from halfpass.networks.observe import copied, named_tensors, observe, seeded_everything
from halfpass.networks.planning import Watched, is_mask, make_plan, memory_order, share_written
from halfpass.networks.replay import CutPlan, Part, Value
from halfpass.networks.trace import BY_HAND, Traced, state_of, trace
from halfpass.tree import Tree, call, flatten, leaves, map_leaves, prediction, sample_count

HEAD = "auxiliary_head."  # begins the names of the head's weights where they are beside the halves'


@dataclass(frozen=True)
class Halves:
    """The two halves of one network. They share no tensor with each other nor with the network they were cut from."""

    client: nn.Module
    """forward(x) → every tensor that is alive across the cut, the named layer's output first; a tuple"""
    server: nn.Module
    """forward(*tensors) → what the network returns"""
    plan: CutPlan | None = None
    """How the network is replayed above and below the cut; None where the halves are graphs, or were given."""

    def __post_init__(self) -> None:
        for half in (self.client, self.server):
            guard_group_norms(half)


def split(model: Model, layer: str, inputs: Tree | None = None, may_cross: Iterable[str] = ()) -> Halves:
    """Cut `model` where `layer`, a module's name such as `stage_2.8`, has returned for the last time.

    `inputs` is a batch of at least two samples as the network takes it: one tensor, a tuple, or a dict of keyword
    arguments. The halves then do exactly what the network does, in training and in evaluation, which is tried on
    copies; a network that a trace would change is run itself, on either side (`replay.py`). Without `inputs` only
    networks that torch.fx can trace are cut, and nothing is tried. `may_cross` names inputs that the server half may
    see as they are, such as the edges of a graph or what a decoder is given; they cross exactly.

    The halves' states have the names of the model's own state, each trained name in one half. They follow train() and
    eval(). A pair (client half, server half) needs no cut: `layer` is "", and names begin with `client.` and
    `server.`. Raises InputError for a name that is no layer, a weight needed on both sides, raw input needed above the
    cut, a half with nothing to train, and halves that would do something else than the network.
    """
    if isinstance(model, tuple):
        if may_cross := tuple(may_cross):
            expected, remedy = "none with two halves that are given", "let the client half return what is to cross"
            raise InputError("model.may_cross", expected, repr(may_cross[0]), remedy)
        return _split_pair(model, layer)
    if inputs is None:
        return _split_graph(model, layer)
    with _explained(f"model.cut {layer!r}"):
        return Watching(model, inputs, may_cross).split(layer)


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Raises InputError for whatever a network, or PyTorch on what is unusual in it, raises while it is watched."""
    try:
        yield
    except (HalfpassError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(place, "a network that can be watched and cut", reason(error), REMEDY) from error


def split_by(model: nn.Module, plan: CutPlan) -> Halves:
    """The halves by a plan that was made elsewhere, where the data are."""
    place = f"model.cut {plan.layer!r}"
    if plan.layer not in dict(model.named_modules()):
        raise InputError(place, "a layer of the network", "no such layer", "both sides must build the same network")
    _settle_attention(model)
    client = Part(copied(model), plan.client, None, plan).train(model.training)
    return Halves(client, Part(copied(model), plan.server, plan, None).train(model.training), plan)


class Watching:
    """A network that is run on samples in both modes, to be cut at one layer or at many."""

    def __init__(self, model: nn.Module, inputs: Tree, may_cross: Iterable[str] = ()) -> None:
        samples, names, may_cross = sample_count(inputs), list(flatten(inputs)), tuple(may_cross)
        if unknown := [name for name in may_cross if name not in names]:
            known = ", ".join(filter(None, names)) or "one input without a name"
            raise InputError("model.may_cross", f"names of inputs: {known}", repr(unknown[0]), "correct it")
        if samples < 2:
            raise InputError("inputs", "at least 2 samples", f"{samples}", "give a larger batch")
        self.model, self.inputs = model, inputs
        _settle_attention(model)
        fewer = map_leaves(lambda leaf: leaf[: samples - 1], inputs)
        networks = {mode: copied(model) for mode in (True, False)}

        def watch(mode: bool, batch: Tree, seed: int = 0) -> Watched:
            return Watched(observe(networks[mode], batch, training=mode, seed=seed, copy_first=False), may_cross)

        self.train, self.evaluation = ([watch(mode, batch) for batch in (inputs, fewer)] for mode in (True, False))
        if self.draws:  # it may decide by them
            self.train += [watch(True, inputs, seed) for seed in MORE_SEEDS]
        reads = any(each.is_read for watched in (*self.train, *self.evaluation) for each in watched.seen.calls)
        self.other_inputs = _other_masks(inputs) if reads else []

        def both(mode: bool, batch: Tree) -> list[Watched]:
            return [watch(mode, batch), watch(mode, map_leaves(lambda leaf: leaf[: samples - 1], batch))]

        self.others = [(both(True, batch), both(False, batch)) for batch in self.other_inputs]
        ways = (way for pair in self.others for way in pair)
        share_written(each for passes in (self.train, self.evaluation, *ways) for each in passes)

    @property
    def lost(self) -> str | None:
        """What a trace would lose, in words."""
        return next((each.seen.lost for each in (*self.train, *self.evaluation) if each.seen.lost), None)

    @property
    def draws(self) -> bool:
        """Whether a pass draws random numbers."""
        return any(each.seen.draws for each in (*self.train, *self.evaluation))

    def split(self, layer: str) -> Halves:
        """As `split` does."""
        place = f"model.cut {layer!r}"
        if self.lost is None and isinstance(self.inputs, Tensor):
            with suppress(Exception):  # torch.fx fails in many ways; then by running it
                halves = _split_graph(self.model, layer)
                self._check(place, halves)
                if self._usual(halves.client):
                    return halves
        halves = split_by(self.model, self.plan(place, layer))
        self._check(place, halves)
        return halves

    def _usual(self, client: nn.Module) -> bool:
        """Whether all that crosses is dense in its order, or channels last: on a wire it will be."""
        with torch.no_grad(), seeded_everything(0):
            crossing = call(copy.deepcopy(client), map_leaves(lambda leaf: leaf.clone(), self.inputs))
        return all(memory_order(tensor) is None for tensor in crossing)

    def split_twice(self, lower: str, upper: str) -> tuple[Halves, nn.Module, CutPlan | None]:
        """As `split_twice` does."""
        place = f"model.edge_cut {upper!r}"
        if self.lost is None and isinstance(self.inputs, Tensor):
            with suppress(Exception):  # as in `split`
                halves, between, plan = _graphs(self.model, lower, upper)
                self._check(place, Halves(halves.client, _Chain(between, halves.server)))
                return halves, between, plan
        plans = self.plan(f"model.cut {lower!r}", lower), self.plan(place, upper)
        halves, between, plan = _parts(self.model, *plans)
        self._check(place, Halves(halves.client, _Chain(between, halves.server)))
        return halves, between, plan

    def plan(self, place: str, layer: str) -> CutPlan:
        """How the network is replayed on either side of a cut; raises InputError where it cannot be cut there."""
        plan = make_plan(place, layer, self.train, self.evaluation, self.others)
        state = dict(named_tensors(self.train[0].seen.network))
        refuse_untrainable(place, "server", [state[name] for name in plan.server])
        if any(value.times > 1 for value in plan.values):
            plan = _arranged(plan, split_by(self.model, plan).client, self.inputs)
            if all(value.whole for value in plan.values):
                found = "values that depend on the sample's place in the batch"
                raise InputError(place, "an output of the layer that has a dimension of samples", found, REMEDY)
        return plan

    def _check(self, place: str, halves: Halves) -> None:
        for inputs in (self.inputs, *self.other_inputs):
            check_exact(place, self.model, halves.client, halves.server, inputs, draws=self.draws, remedy=REMEDY)


def _other_masks(inputs: Tree) -> list[Tree]:
    """The inputs with masks of ones alone, and with masks that end in zeros: networks leave out what masks nothing."""
    if not any(is_mask(leaf) for leaf in leaves(inputs)):
        return []

    def ending(leaf: Tensor) -> Tensor:
        leaf = leaf.clone()
        leaf[1:, ..., -1:] = 0
        return leaf

    ones = map_leaves(lambda leaf: torch.ones_like(leaf) if is_mask(leaf) else leaf, inputs)
    return [ones, map_leaves(lambda leaf: ending(leaf) if is_mask(leaf) and leaf.ndim > 1 else leaf, ones)]


MORE_SEEDS = (1, 2, 3)
REMEDY = f"cut at another layer, {BY_HAND}"


def _split_graph(model: nn.Module, layer: str) -> Halves:
    traced = trace(model)
    cut = find_cut(traced, layer)
    client, server = _client_half(traced, cut), _server_half(traced, cut)
    # one of the two is copied: modules without state, such as a ReLU, may be in both
    return Halves(client.train(model.training), copy.deepcopy(server).train(model.training))


def _settle_attention(model: nn.Module) -> None:
    """PyTorch's attention has another, fused path in evaluation, which it leaves where anyone looks on, as a half does;
    it differs in the last digits. All of this process goes the usual way from here on."""
    if any(isinstance(part, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for part in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)


def _arranged(plan: CutPlan, client: nn.Module, inputs: Tree) -> CutPlan:
    """The plan with the arrangement of values that have several entries for each sample: a sample's entries follow on
    each other, or the samples' first ones do. Told by samples in another order, in evaluation; where neither fits, or
    a value crosses in training alone, it is one of whole batches."""
    order = torch.arange(sample_count(inputs)).roll(1)
    half = copy.deepcopy(client).eval()
    with torch.no_grad(), seeded_everything(0):
        one = call(half, map_leaves(lambda leaf: leaf.clone(), inputs))
        other = call(half, map_leaves(lambda leaf: leaf[order], inputs))
    known = {
        (value.output, value.shape, value.times): _arrangement(value, a, b, order)
        for value, a, b in zip(plan.evaluation.values, one, other, strict=False)
    }
    passes = []
    for each in (plan.train, plan.evaluation):
        values = [_as_arranged(value, known.get((value.output, value.shape, value.times))) for value in each.values]
        passes.append(replace(each, values=tuple(sorted(values, key=lambda value: value.whole))))
    return replace(plan, train=passes[0], evaluation=passes[1])


def _arrangement(value: Value, one: Tensor, other: Tensor, order: Tensor) -> bool | None:
    """Whether the samples' first entries come first; None where neither order fits."""
    for mixed in (False, True):
        choice = replace(value, mixed=mixed)
        a, b = (choice.samples_first(value.as_in_network(tensor)) for tensor in (one, other))
        if value.times == 1 or value.whole or _close(a[order], b):
            return mixed
    return None


def _as_arranged(value: Value, mixed: bool | None) -> Value:
    if value.times == 1 or value.whole:
        return value
    inside = list(value.as_in_network(torch.empty((6, *value.shape), device="meta")).shape)  # of six samples
    if mixed is None:
        return replace(value, whole=True, shape=tuple(inside))
    arranged = replace(value, mixed=mixed)
    return replace(arranged, shape=tuple(arranged.samples_first(torch.empty(inside, device="meta")).shape[1:]))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.is_floating_point():
        return torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True)
    return torch.equal(one, other)


def split_twice(
    model: Model, lower: str, upper: str, inputs: Tree | None = None, plans: tuple[CutPlan, CutPlan] | None = None,
    may_cross: Iterable[str] = (),
) -> tuple[Halves, nn.Module, CutPlan | None]:
    """Cut `model` behind two layers: (what is below the lower cut and what is above the upper one, the part between,
    the plan of the upper cut).

    The part between takes what crosses the lower cut and returns a tuple of what crosses the upper one. `inputs` as in
    `split`; `plans` are those of the two cuts that were made elsewhere. Raises InputError as `split` does, and where
    the layers are not in that order or have nothing to train between them.
    """
    place = f"model.edge_cut {upper!r}"
    if isinstance(model, tuple):
        raise InputError(place, "one network that can be cut", "two halves", "give one network, or leave it out")
    if plans is not None:
        return _parts(model, *plans)
    if inputs is None:
        return _graphs(model, lower, upper)
    with _explained(place):
        return Watching(model, inputs, may_cross).split_twice(lower, upper)


def _graphs(model: nn.Module, lower: str, upper: str) -> tuple[Halves, nn.Module, None]:
    place = f"model.edge_cut {upper!r}"
    traced = trace(model)
    below, above = find_cut(traced, lower), find_cut(traced, upper)
    if not set(below.client) < set(above.client):
        raise InputError(place, f"a layer behind {lower}", "one that is not", "choose a later one")
    parts = [_client_half(traced, below), _part_between(traced, below, above), _server_half(traced, above)]
    client, between, server = (copy.deepcopy(part).train(model.training) for part in parts)
    refuse_untrainable(place, "edge", between.parameters())
    return Halves(client, server), between, None


def _parts(model: nn.Module, lower: CutPlan, upper: CutPlan) -> tuple[Halves, nn.Module, CutPlan]:
    place = f"model.edge_cut {upper.layer!r}"
    if not set(lower.client) <= set(upper.client) or upper.layer == lower.layer:
        raise InputError(place, f"a layer behind {lower.layer}", "one that is not", "choose a later one")
    own = [name for name in lower.server if name in set(upper.client)]
    between = Part(copied(model), own, lower, upper).train(model.training)
    refuse_untrainable(place, "edge", between.parameters())
    ends = split_by(model, lower).client, split_by(model, upper).server
    return Halves(*ends, lower), between, upper


class _Chain(nn.Module):
    """Two parts, one after the other, with the names of both."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, *tensors: Tensor) -> Any:
        return self.second(*self.first(*tensors))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return itertools.chain(*(part.named_parameters(*args, **kwargs) for part in (self.first, self.second)))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return itertools.chain(*(part.named_buffers(*args, **kwargs) for part in (self.first, self.second)))


def as_graph(model: nn.Module) -> fx.GraphModule:
    """A copy of the uncut `model` as one graph, with the state that it uses; raises InputError as `split` does."""
    traced = trace(model)
    return _Half(traced.model, traced.graph, type(model).__name__).train(model.training)


def layer_names(model: Model) -> list[str]:
    """Every layer that `model` can be cut at, in the order of the forward pass; of names for one cut, the outermost."""
    return [] if isinstance(model, tuple) else [cut.layer for cut in all_cuts(trace(model))]


def crossing_values(halves: Halves, sample_shape: Any, inputs: Tree | None = None) -> tuple[Value, ...]:
    """What crosses between the halves. Of graphs and given halves it is measured, on `inputs` where there are some."""
    if halves.plan is not None:
        return halves.plan.values
    shapes = cut_shapes(halves.client, sample_shape, inputs)
    return tuple(Value(i, None, shape, "float32") for i, shape in enumerate(shapes))


def cut_shapes(
    client_half: nn.Module, sample_shape: tuple[int, ...], inputs: Tree | None = None
) -> tuple[tuple[int, ...], ...]:
    """The shapes per sample of the tensors that cross, measured on a copy with a batch of two zero samples, or with two
    of `inputs`.

    Raises InputError if the half cannot take such samples, or if something else than (B, ...) floats would cross.
    """
    half = copy.deepcopy(client_half).eval()  # a copy, so that no mode and no buffer changes
    device = next((p.device for p in half.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            zeros = torch.zeros(2, *sample_shape, device=device) if inputs is None else None
            tensors = half(zeros) if inputs is None else call(half, map_leaves(lambda leaf: leaf[:2], inputs))
    except InputError:
        raise
    except Exception as error:  # whatever a user's half raises
        raise InputError(
            "the client half", f"a forward pass of (2, {', '.join(map(str, sample_shape))})", reason(error),
            "choose a network for such samples",
        ) from error
    return tuple(_sample_shape(i, tensor) for i, tensor in enumerate(tensors))


def _sample_shape(i: int, value: object) -> tuple[int, ...]:
    place, expected = f"value {i} that crosses the cut", "floats of shape (B, ...)"
    if not isinstance(value, Tensor):
        raise InputError(place, expected, type(value).__name__, "cut at another layer")
    if not value.is_floating_point() or value.ndim < 1 or value.shape[0] != 2:
        found = f"{tuple(value.shape)} of {value.dtype} for 2 samples"
        raise InputError(place, expected, found, "cut at another layer")
    return tuple(value.shape[1:])


def check_same(place: str, model: nn.Module, halves: Halves, sample_shape: tuple[int, ...]) -> None:
    """Raises InputError where the halves of `model` compute something else than it does, as where its forward changes a
    tensor in place in a way that a trace does not see. On two random samples from 0 to 1, in evaluation mode."""
    x = torch.rand(2, *sample_shape, generator=torch.Generator().manual_seed(0))
    uncut, joined = (copy.deepcopy(module).eval() for module in (model, whole(halves)))
    try:
        with torch.no_grad():
            expected, again, found = (module(x.clone()) for module in (uncut, uncut, joined))
    except Exception as error:  # whatever the model raises
        remedy = "choose samples that fit it"
        raise InputError(place, f"a forward pass of {tuple(x.shape)}", reason(error), remedy) from error
    if torch.equal(expected, again) and not torch.allclose(expected, found, rtol=1e-3, atol=1e-5, equal_nan=True):
        remedy = f"take what changes a tensor in place out of forward, {BY_HAND}"
        raise InputError(place, "halves that compute what the network does", "other outputs", remedy)


def join_state(
    client_state: dict[str, Tensor], server_state: dict[str, Tensor], model: nn.Module | None = None
) -> dict[str, Tensor]:
    """The state of the whole: a cut model's own names, so that it loads into it; for a pair, into `whole`. Where a
    tensor has several names in `model`, as of one module under two names, it gets all of them, and what its forward
    never uses is as it is there; without `model` both are missing (`strict=False` then). Raises InputError where a name
    is in both halves."""
    both = sorted(client_state.keys() & server_state.keys())
    if both:
        raise InputError(
            "joining the halves", "names that are in one half only", f"{both[0]!r} in both",
            "join the two halves of one split",
        )
    joined = {**client_state, **server_state}
    names: dict[int, list[str]] = {}  # of each tensor of the model
    for name, value in ({} if model is None else model.state_dict(keep_vars=True)).items():
        names.setdefault(id(value), []).append(name)
    for same in names.values():
        if held := next((name for name in same if name in joined), None):
            joined |= {name: joined[held] for name in same if name not in joined}
    unused = {} if model is None else {n: v for n, v in model.state_dict().items() if n not in joined}
    return {**joined, **unused}


def head_prefix(names: Iterable[str]) -> str:
    """What begins the names of the head's weights beside these: HEAD, or longer where the network has a layer of that
    name."""
    names, prefix = list(names), HEAD
    while any(name.startswith(prefix) for name in names):
        prefix = f"{prefix[:-1]}_."
    return prefix


def whole(halves: Halves) -> nn.Module:
    """Both halves as one module, inputs → what the network returns. It shares their weights; its state is the joined
    one."""
    return _Whole(halves)


def joint(halves: Halves, head: nn.Module) -> nn.Module:
    """Both halves and the auxiliary head as one module: x → logarithms (B, classes) of the mean of the server half's
    and the head's class probabilities. Its state is the joined one, and the head's under `auxiliary_head.`."""
    return _Joint(halves, head)


class _Whole(nn.Module):
    def __init__(self, halves: Halves) -> None:
        super().__init__()
        self.client, self.server = halves.client, halves.server

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.server(*self.client(*args, **kwargs))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return join_state(self.client.state_dict(*args, **kwargs), self.server.state_dict(*args, **kwargs))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        server = self.server.state_dict().keys()
        of_server = {name: value for name, value in state_dict.items() if name in server}
        of_client = {name: value for name, value in state_dict.items() if name not in server}
        found = (
            self.client.load_state_dict(of_client, strict, assign),
            self.server.load_state_dict(of_server, strict, assign),
        )
        missing, unexpected = ([*a, *b] for a, b in zip(*found, strict=True))
        return type(found[0])(missing, unexpected)


class _Joint(_Whole):
    def __init__(self, halves: Halves, head: nn.Module) -> None:
        super().__init__(halves)
        self.auxiliary_head = head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        crossing = self.client(*args, **kwargs)
        logits = (prediction(self.server(*crossing)), prediction(self.auxiliary_head(crossing[0])))
        return torch.logaddexp(*(each.float().log_softmax(1) for each in logits)) - math.log(2)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        head = self.auxiliary_head.state_dict(keep_vars=bool(kwargs.get("keep_vars")))
        halves = super().state_dict(*args, **kwargs)
        prefix = head_prefix(halves)
        return join_state(halves, {f"{prefix}{name}": value for name, value in head.items()})

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        prefix = head_prefix(super().state_dict())
        head = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        others = {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
        of_head = self.auxiliary_head.load_state_dict(head, strict, assign)
        missing, unexpected = super().load_state_dict(others, strict, assign)
        named = ([f"{prefix}{name}" for name in names] for names in of_head)
        return type(of_head)(*([*a, *b] for a, b in zip((missing, unexpected), named, strict=True)))


# --- two halves given directly ----------------------------------------------------------------------------------------


class _ClientOfPair(nn.Module):
    def __init__(self, client: nn.Module) -> None:
        super().__init__()
        self.client = client

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        crossing = self.client(x)
        return tuple(crossing) if isinstance(crossing, (tuple, list)) else (crossing,)


class _ServerOfPair(nn.Module):
    def __init__(self, server: nn.Module) -> None:
        super().__init__()
        self.server = server

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.server(*tensors)


def _split_pair(pair: tuple[nn.Module, nn.Module], layer: str) -> Halves:
    place = f"model.cut {layer!r}"
    if layer:
        raise InputError(place, 'no layer ("") for two halves that are given', f"{layer!r}", "leave model.cut empty")
    refuse_shared(place, state_of(pair[0], "client."), state_of(pair[1], "server."))
    refuse_untrainable(place, "server", pair[1].parameters())
    client, server = _ClientOfPair(copy.deepcopy(pair[0])), _ServerOfPair(copy.deepcopy(pair[1]))
    return Halves(client, server)


# --- building the halves ----------------------------------------------------------------------------------------------


class _Half(fx.GraphModule):
    """A GraphModule that saves the buffers that the model saves, and no others, also after a deepcopy."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "Half") -> None:
        super().__init__(root, graph, class_name)
        saved = root.state_dict().keys()
        for name in [name for name, _ in self.named_buffers(remove_duplicate=False) if name not in saved]:
            owner, _, own_name = name.rpartition(".")
            self.get_submodule(owner)._non_persistent_buffers_set.add(own_name)

    def _deepcopy_init(self) -> Any:
        return _Half.__init__


def _client_half(traced: Traced, cut: Cut) -> nn.Module:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    _add_nodes(graph, copies, cut.client)
    _add_output(graph, copies, cut)
    return _Half(traced.model, graph, "ClientHalf")


def _part_between(traced: Traced, lower: Cut, upper: Cut) -> nn.Module:
    graph = fx.Graph()
    copies = _add_inputs(graph, lower)
    below_upper = set(upper.client)
    _add_nodes(graph, copies, [node for node in lower.server if node in below_upper])
    _add_output(graph, copies, upper)
    return _Half(traced.model, graph, "PartBetween")


def _server_half(traced: Traced, cut: Cut) -> nn.Module:
    graph = fx.Graph()
    copies = _add_inputs(graph, cut)
    _add_nodes(graph, copies, cut.server)
    return _Half(traced.model, graph, "ServerHalf")


Copies = dict[fx.Node, fx.Node]  # node of the trace → node of the half


def _add_inputs(graph: fx.Graph, cut: Cut) -> Copies:
    """What crosses the cut comes in."""
    inputs = [graph.placeholder(node.name) for node in cut.crossing]
    copies = dict(zip(cut.crossing, inputs, strict=True))
    for node in cut.crossing:
        if node in cut.written:
            copies[node] = graph.call_method("clone", (copies[node],))
    for size in cut.batch_sizes:
        copies[size] = graph.call_method("size", (inputs[0], 0))
    return copies


def _add_nodes(graph: fx.Graph, copies: Copies, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])


def _add_output(graph: fx.Graph, copies: Copies, cut: Cut) -> None:
    """What crosses the cut goes out."""
    for below in dict.fromkeys(size.all_input_nodes[0] for size in cut.batch_sizes):
        size = graph.call_method("size", (copies[below], 0))
        graph.call_function(check_batch_size, (size, copies[cut.crossing[0]], str(below)))
    graph.output(tuple(copies[node] for node in cut.crossing))


def check_batch_size(size: int, crossing: Tensor, name: str) -> None:
    """The server half takes `size` of a tensor below the cut to be the number of samples that cross. Hold it true."""
    if size != crossing.shape[0]:
        raise InputError(
            "the cut", f"{crossing.shape[0]} samples, as {name}.size(0) is used above it", f"a size of {size}",
            "cut at another layer: that tensor is not (B, ...)",
        )
