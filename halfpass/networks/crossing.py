"""What crosses at a layer: where a traced network can be cut, and which cuts are refused. Tests: test_split.py."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor, fx

from halfpass.errors import InputError, near_miss
from halfpass.networks.trace import BY_HAND, Traced, is_element, is_plain, reads_batch_size, reads_size


@dataclass(frozen=True)
class Cut:
    """Which nodes of a trace are on which side."""

    layer: str
    client: tuple[fx.Node, ...]  # in order
    crossing: tuple[fx.Node, ...]  # computed by the client half, used by the server half; the layer's output first
    server: tuple[fx.Node, ...]  # in order, without what crosses
    batch_sizes: tuple[fx.Node, ...]  # sizes of other tensors that the server half reads off the first that crosses
    written: frozenset[fx.Node]  # of what crosses: changed in place above the cut
    also: tuple[str, ...] = ()  # other names for this cut, as `all_cuts` finds them


def find_cut(traced: Traced, layer: str) -> Cut:
    """The cut behind the last call of `layer`. Raises InputError for every cut that `split` refuses.

    Tensors cross; of a tuple (as from nn.LSTM) the used elements. What does not depend on the input (constants,
    parameters) and sizes of what crosses are computed again above, a batch size is read off what crosses.
    """
    place = f"model.cut {layer!r}"
    if layer not in traced.last:
        _refuse_name(place, traced, layer)
    nodes = traced.nodes
    below = _below(traced, nodes, layer)
    above = [node for node in nodes if node not in below]
    crossing, again, sizes = _used_above(traced, below, above)
    outputs = traced.outputs[layer]
    crossing.sort(key=lambda node: (not _is_part(node, outputs), nodes.index(node)))  # the layer's first
    batch_sizes = [size for size in sizes if size.args[0] not in crossing]
    _refuse_crossing(place, traced, crossing, batch_sizes, outputs)
    kept = set(crossing)  # below, without constants that only the server half needs
    for node in reversed(nodes):
        if node in below and (node in traced.from_input or traced.writes(node) or node in kept):
            kept |= {node, *node.all_input_nodes}
    again -= set(batch_sizes)
    cut = Cut(
        layer,
        client=tuple(node for node in nodes if node in kept),
        crossing=tuple(crossing),
        server=tuple(node for node in nodes if node in again or (node not in below and node not in batch_sizes)),
        batch_sizes=tuple(batch_sizes),
        written=_written(place, traced, crossing, above),
    )
    states = [{k: v for node in nodes for k, v in traced.state[node].items()} for nodes in (cut.client, cut.server)]
    refuse_shared(place, *states)
    refuse_untrainable(place, "server", states[1].values())
    return cut


def all_cuts(traced: Traced) -> list[Cut]:
    """Every valid cut in the order of the forward pass; of several names for one, the outermost module's."""
    cuts: dict[object, Cut] = {}
    for layer in traced.last:  # an outer module returns after its inner ones
        try:
            cut = find_cut(traced, layer)
        except InputError:
            continue
        key = (cut.crossing, cut.server)
        also = (cuts[key].layer, *cuts[key].also) if key in cuts else ()
        cuts[key] = replace(cut, also=also)
    return list(cuts.values())


def _below(traced: Traced, nodes: list[fx.Node], layer: str) -> set[fx.Node]:
    """What ran when the layer had returned, and the reads of a tuple's elements, where nothing else is done with it."""
    below = set(nodes[: nodes.index(traced.last[layer]) + 1])
    for node in nodes:
        if is_element(node) and node.args[0] in below:
            whole = node.all_input_nodes[0]
            if all(is_element(user) or user in below for user in whole.users):
                below.add(node)
    return below


def _used_above(
    traced: Traced, below: set[fx.Node], above: list[fx.Node]
) -> tuple[list[fx.Node], set[fx.Node], list[fx.Node]]:
    """Tensors below that are used above, what can be computed again there, and reads of the sizes of tensors below."""
    crossing: list[fx.Node] = []
    again: set[fx.Node] = set()
    sizes: list[fx.Node] = []
    waiting = list(above)
    while waiting:
        node = waiting.pop()
        if reads_size(node) and node.args[0] in below and node.args[0] in traced.from_input:
            sizes.append(node)  # no use of the tensor itself
            continue
        for value in node.all_input_nodes:
            if value not in below or value in again or value in crossing:
                continue
            if value in traced.from_input and not is_plain(value):
                crossing.append(value)
            else:
                again.add(value)
                waiting.append(value)
    return crossing, again, sizes


def _is_part(node: fx.Node, outputs: tuple[fx.Node, ...]) -> bool:
    """Is the node one of the outputs, or an element of one?"""
    while node not in outputs and is_element(node):
        node = node.all_input_nodes[0]
    return node in outputs


def _written(place: str, traced: Traced, crossing: list[fx.Node], above: list[fx.Node]) -> frozenset[fx.Node]:
    """What crosses and may be changed in place above the cut, directly or through a view.

    The server half then works on a copy: the tensor may be shared with the client half, or need its gradient.
    """
    changed = {_memory(traced, node) for node in above if traced.writes(node)}
    written = [node for node in crossing if _memory(traced, node) in changed]
    if len({_memory(traced, node) for node in written}) < len(written):
        raise InputError(
            place, "tensors of their own memory", "two that may share it and are changed in place above the cut",
            "cut at another layer",
        )
    return frozenset(written)


def _memory(traced: Traced, node: fx.Node) -> fx.Node:
    """The node whose memory this one may share: a module with weights returns new memory, all else may be a view."""
    while not traced.state[node] and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


# --- what cannot be cut -----------------------------------------------------------------------------------------------


def _refuse_name(place: str, traced: Traced, layer: str) -> NoReturn:
    names = list(traced.last)
    known = layer and layer in dict(traced.model.named_modules())
    found = "a module that forward does not call by itself" if known else "no such layer"
    remedy = near_miss(layer, names, f"for instance {', '.join(names[:5])}")
    raise InputError(place, "the name of a layer", found, remedy)


def _refuse_crossing(
    place: str, traced: Traced, crossing: list[fx.Node], batch_sizes: list[fx.Node], outputs: tuple[fx.Node, ...]
) -> None:
    for size in batch_sizes:
        if not reads_batch_size(size):
            raise InputError(
                place, "sizes above the cut of tensors that cross it", f"a size of {size.args[0]} ({size})",
                "cut at another layer, or read that size above the cut",
            )
    for node in crossing:
        if node not in traced.learned:
            what = "the raw input" if node.op == "placeholder" else f"the raw input through {node} alone"
            raise InputError(
                place, "values that the client half has learned", f"{what}, used above the cut",
                "cut at another layer: the data itself must not cross",
            )
    if not crossing or not _is_part(crossing[0], outputs):
        raise InputError(place, "an output that is used above the cut", "one that is not", "cut at another layer")


def refuse_shared(place: str, client: dict[str, Tensor], server: dict[str, Tensor]) -> None:
    """Raises InputError where a tensor, or a name, is in the state of both halves."""
    names = {id(value): name for name, value in client.items()}
    for name, value in server.items():
        if id(value) in names or name in client:
            same = names.get(id(value), name)
            also = "" if same == name else f" (on the client as {same!r})"
            raise InputError(
                place, "weights and buffers that one half uses", f"{name!r} used by both halves{also}",
                f"cut where all its uses are on one side, {BY_HAND}",
            )


def refuse_untrainable(place: str, side: str, values: Iterable[Tensor]) -> None:
    """Raises InputError where none of a half's values is to be trained."""
    if not any(value.requires_grad for value in values):
        raise InputError(
            place, f"a {side} half with something to train", "no trainable parameter in it",
            "cut earlier, or freeze less",
        )  # fmt: skip
