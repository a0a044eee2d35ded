"""The cut table: what every possible cut of a network costs, on the wire and on each side. See `halfpass cuts`."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from halfpass.errors import InputError, reason
from halfpass.networks.crossing import Cut, all_cuts, refuse_untrainable
from halfpass.networks.heads import HEADS, build_head
from halfpass.networks.models import build_model, choose
from halfpass.networks.observe import named_tensors, observe
from halfpass.networks.planning import Watched, make_plan, share_written
from halfpass.networks.pretrained import freeze
from halfpass.networks.replay import CutPlan
from halfpass.networks.trace import Traced, trace
from halfpass.tree import Tree, map_leaves

FLOAT32_BYTES = 4
SAMPLES = 2  # in the measured batch: one alone can be mistaken for a dimension without meaning


@dataclass(frozen=True)
class CutRow:
    """One cut. FLOPs are of one sample's forward pass: convolutions and matrix products, 2 per multiply-add."""

    layer: str
    activation_shapes: tuple[tuple[int, ...], ...]  # per sample, the named layer's output first
    activation_bytes_per_sample: int  # in float32
    client_parameters: int
    server_parameters: int
    client_flops: int
    server_flops: int
    head_parameters: int | None  # None where the head does not fit the cut
    head_flops: int | None
    client_trained: int = 0  # client's parameters that are not frozen: without any it makes no backward pass
    also: tuple[str, ...] = ()  # inner layers that name the same cut


def cut_table(
    model: str | nn.Module, sample_shape: Any, classes: int, head: str = "linear", seed: int = 0,
    samples: Tree | None = None, frozen: str | None = None, may_cross: Iterable[str] = (),
) -> list[CutRow]:  # fmt: skip
    """A row for every valid cut, in the order of the forward pass. `model` is a network, which stays as it is, or the
    name of one, as `build_model` takes it; `sample_shape` is a dict where inputs have names.

    Sizes and FLOPs are measured by one forward pass on the CPU: of a graph, node by node, or, where the network cannot
    be traced, of itself on `samples`, call by call. Raises InputError for a network that cannot be built, nor traced
    where there are no samples, for a pair of halves, which has no cuts, and for a head of unknown name.
    """
    if ":" not in head:
        choose("model.head", head, HEADS)
    place = f"model.name {model!r}" if isinstance(model, str) else f"network {type(model).__name__}"
    network = (
        build_model(model, sample_shape, classes, seed, example=samples)
        if isinstance(model, str)
        else copy.deepcopy(model).cpu()
    )
    if isinstance(network, tuple):
        raise InputError(place, "a whole network", "two halves", "it is cut already: there is nothing to list")
    if frozen is not None:
        freeze("model.freeze", network, frozen)
    heads = _Heads(head, classes, seed)
    try:
        if samples is not None and not isinstance(samples, Tensor):
            raise InputError(place, "one input", "several", "give samples of all")
        traced = trace(network)
        some = torch.zeros(SAMPLES, *sample_shape) if samples is None else samples[:SAMPLES]
        measured = _measure(place, traced, some)
    except InputError:
        if samples is None:
            raise
        return _watched_rows(network, samples, heads, may_cross)
    return [_row(traced, cut, measured, heads) for cut in all_cuts(traced) if _can_cross(cut, measured)]


def _watched_rows(model: nn.Module, samples: Tree, heads: "_Heads", may_cross: Iterable[str]) -> list[CutRow]:
    with _counted() as counter:
        passes = [
            Watched(observe(model, batch, training=False, flops=counter.get_total_flops), may_cross)
            for batch in (samples, map_leaves(lambda leaf: leaf[:-1], samples))
        ]
    share_written(passes)
    rows: dict[object, CutRow] = {}
    state = dict(named_tensors(passes[0].seen.network))
    for layer in passes[0].seen.returned:  # an outer module returns after its inner ones
        try:
            plan = make_plan(f"model.cut {layer!r}", layer, passes, passes)
            refuse_untrainable("", "server", [state[name] for name in plan.server])
        except InputError:
            continue
        key = (plan.client, tuple(value.made for value in plan.values))
        also = (rows[key].layer, *rows[key].also) if key in rows else ()
        rows[key] = _watched_row(passes[0], plan, state, heads, also)
    return list(rows.values())


def _watched_row(
    watched: Watched, plan: CutPlan, state: dict[str, Tensor], heads: "_Heads", also: tuple[str, ...]
) -> CutRow:
    until = watched.seen.returned[plan.layer][-1][0]
    flops = [call.flops // watched.samples for call in watched.seen.calls]
    shapes = tuple(value.shape for value in plan.values)
    sizes = [prod(value.shape) * getattr(torch, value.dtype).itemsize for value in plan.values if not value.whole]
    head_parameters, head_flops = heads.cost(shapes[0])
    return CutRow(
        plan.layer, shapes, sum(sizes), _count(state[name] for name in plan.client),
        _count(state[name] for name in plan.server), sum(flops[:until]), sum(flops[until:]), head_parameters,
        head_flops, _count((state[name] for name in plan.client), trained=True), also,
    )  # fmt: skip


def _count(values: Iterable[Tensor], *, trained: bool = False) -> int:
    """Numbers in the parameters among the values, each once."""
    parameters = {id(value): value for value in values if isinstance(value, nn.Parameter)}
    return sum(p.numel() for p in parameters.values() if p.requires_grad or not trained)


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    """Counts FLOPs; attention's too, whose fused kernels on the CPU the counter does not know."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


class _Measured(fx.Interpreter):
    """One forward pass that keeps the value's shape and the FLOPs of every node."""

    def __init__(self, traced: Traced) -> None:
        super().__init__(fx.GraphModule(traced.model, traced.graph))
        self.shapes: dict[str, tuple[int, ...] | None] = {}  # by node name; None for what cannot cross
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with _counted() as counter:
            out = super().run_node(n)
        self.flops[n.name] = counter.get_total_flops() // SAMPLES
        crosses = isinstance(out, Tensor) and out.is_floating_point() and out.ndim > 0 and len(out) == SAMPLES
        self.shapes[n.name] = tuple(out.shape[1:]) if crosses else None
        return out


def _measure(place: str, traced: Traced, samples: Tensor) -> _Measured:
    traced.model.eval()
    measured = _Measured(traced)
    measured.module.eval()
    try:
        measured.run(samples)
    except Exception as error:  # whatever the model raises
        raise InputError(
            place, f"a forward pass of {tuple(samples.shape)}", reason(error), "choose samples that fit it"
        ) from error
    return measured


def _can_cross(cut: Cut, measured: _Measured) -> bool:
    return all(measured.shapes[node.name] is not None for node in cut.crossing)


def _row(traced: Traced, cut: Cut, measured: _Measured, heads: "_Heads") -> CutRow:
    shapes = tuple(measured.shapes[node.name] or () for node in cut.crossing)
    head_parameters, head_flops = heads.cost(shapes[0])
    return CutRow(
        cut.layer,
        shapes,
        FLOAT32_BYTES * sum(prod(shape) for shape in shapes),
        _parameters(traced, cut.client),
        _parameters(traced, cut.server),
        sum(measured.flops[node.name] for node in cut.client),
        sum(measured.flops[node.name] for node in cut.server),
        head_parameters,
        head_flops,
        _parameters(traced, cut.client, trained=True),
        cut.also,
    )


def _parameters(traced: Traced, nodes: Iterable[fx.Node], *, trained: bool = False) -> int:
    return _count((value for node in nodes for value in traced.state[node].values()), trained=trained)


class _Heads:
    """What the head costs at a cut of a shape; measured once for each shape."""

    def __init__(self, name: str, classes: int, seed: int) -> None:
        self.name, self.classes, self.seed = name, classes, seed
        self.costs: dict[tuple[int, ...], tuple[int | None, int | None]] = {}

    def cost(self, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
        """(parameters, FLOPs per sample), or None for both where the head does not fit."""
        if shape not in self.costs:
            self.costs[shape] = self._measure(shape)
        return self.costs[shape]

    def _measure(self, shape: tuple[int, ...]) -> tuple[int | None, int | None]:
        try:
            head = build_head(self.name, shape, self.classes, self.seed).eval()
        except InputError:
            return None, None
        with _counted() as counter:
            head(torch.zeros(SAMPLES, *shape))
        return sum(p.numel() for p in head.parameters()), counter.get_total_flops() // SAMPLES
