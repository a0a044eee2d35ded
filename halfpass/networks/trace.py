"""Tracing a network: its forward pass as a torch.fx graph that follows train() and eval().

What a trace would silently change is refused here. `crossing.py` finds the cuts in the graph. Tests: test_split.py.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfpass.errors import InputError, reason

BY_HAND = "or give the two halves: --model.name module:function that returns (client half, server half)"


@dataclass(frozen=True)
class Traced:
    """The graph of one forward pass, both modes in one, and where in it each module returned."""

    model: nn.Module  # a copy, whose modules the nodes call
    graph: fx.Graph
    last: dict[str, fx.Node]  # the last node that existed when the module of that name returned for the last time
    outputs: dict[str, tuple[fx.Node, ...]]  # what it returned then

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.graph.nodes)

    @cached_property
    def state(self) -> dict[fx.Node, dict[str, Tensor]]:
        """The parameters and saved buffers that each node uses, by name."""
        return {node: _node_state(self.model, node) for node in self.nodes}

    @cached_property
    def from_input(self) -> set[fx.Node]:
        """The nodes that depend on the input."""
        return self._reached(lambda node: node.op == "placeholder")

    @cached_property
    def learned(self) -> set[fx.Node]:
        """The nodes that depend on a parameter."""
        return self._reached(lambda node: any(isinstance(v, nn.Parameter) for v in self.state[node].values()))

    def _reached(self, source: Callable[[fx.Node], bool]) -> set[fx.Node]:
        reached: set[fx.Node] = set()
        for node in self.nodes:
            if source(node) or any(value in reached for value in node.all_input_nodes):
                reached.add(node)
        return reached

    def writes(self, node: fx.Node) -> bool:
        """Does the node change its first argument in place?"""
        if node.op == "call_module":
            return bool(getattr(self.model.get_submodule(str(node.target)), "inplace", False))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        by_name = node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")
        return by_name or node.target is update or node.kwargs.get("inplace") is True


def trace(model: nn.Module) -> Traced:
    """The graph of `model(x)`; arguments with defaults keep them. `model` and the random state are left untouched.

    A trace takes constants as it meets them. So the model is traced three times, in training, evaluation and training
    mode: what differs between the modes becomes a choice by the half's own `training`, what differs between two
    traces in one mode cannot be cut. Raises InputError.
    """
    place = f"model {type(model).__name__}"
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        train, evaluation, again = (_trace_once(place, model, mode) for mode in (True, False, True))
    try:
        _merge(train, again, by_mode=False)
        _merge(train, evaluation, by_mode=True)
    except _DifferentTracesError as error:
        raise InputError(
            place, "one order of operations in every pass, in training and in evaluation", str(error),
            f"take the branch or the random number out of forward, {BY_HAND}",
        ) from error
    _tidy_sizes(train)
    return train


# --- one trace --------------------------------------------------------------------------------------------------------


def _trace_once(place: str, model: nn.Module, training: bool) -> Traced:
    tracer = _Tracer()
    copied = copy.deepcopy(model).train(training)
    for name, part in copied.named_modules():
        if part.training != training:  # as where train() is overridden to keep BatchNorm's statistics
            found = f"{name or 'itself'} in {'evaluation' if training else 'training'} mode behind train({training})"
            remedy = f"take the override of train() out, {BY_HAND}"
            raise InputError(place, "modules that follow train() and eval()", found, remedy)
    try:
        graph = tracer.trace(copied)
    except Exception as error:  # a TraceError, or whatever the forward raises when it meets a proxy
        raise InputError(
            place, "a forward that can be traced", reason(error),
            f"take what depends on values out of forward, {BY_HAND}",
        ) from error
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise InputError(place, "one output, the logits", "several", "return the logits alone")
    return Traced(copied, graph, tracer.last, tracer.outputs)


class _Tracer(fx.Tracer):
    """Notes where each module returned, and refuses the contexts that a trace would lose."""

    proxy_buffer_attributes = True  # else arithmetic on a buffer would be a constant of this moment

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, fx.Node] = {}
        self.outputs: dict[str, tuple[fx.Node, ...]] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        # only the first argument is the input; the others have the values that model(x) gives them
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise RuntimeError("`with torch.no_grad()` or `torch.autocast` inside forward would be lost")
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        name = self.path_of_module(m)
        for notes in (self.last, self.outputs):
            notes.pop(name, None)  # the last call counts, also for the order of the notes
        self.last[name] = next(iter(reversed(self.graph.nodes)))
        self.outputs[name] = tuple(proxy.node for proxy in _leaves(out) if isinstance(proxy, fx.Proxy))
        return out


class _Proxy(fx.Proxy):
    """Keeps `x += y` an operation in place, which torch.fx would trace as `x = x + y`: other names of x see it too."""


def _kept_in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", update, (proxy, name, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow"):
    setattr(_Proxy, f"__{_name}__", _kept_in_place(_name))


def update(value: Any, name: str, other: Any) -> Any:
    """`value += other` and its like. As a function of ours, since torch.fx's own code for it breaks plain numbers."""
    return getattr(operator, name)(value, other)


def _leaves(value: Any) -> list[Any]:
    """The values in nested tuples, lists, dicts and slices, in order."""
    found: list[Any] = []
    fx.node.map_aggregate(value, found.append)
    return found


def _with_leaves(value: Any, leaves: Iterator[Any]) -> Any:
    return fx.node.map_aggregate(value, lambda _: next(leaves))


# --- two traces as one ------------------------------------------------------------------------------------------------


class _DifferentTracesError(Exception):
    """Two traces of one model differ in more than constants."""


def choose(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The constant that the model's forward used in that mode, e.g. in `F.dropout(x, training=self.training)`."""
    return in_training if training else in_evaluation


def _merge(one: Traced, other: Traced, *, by_mode: bool) -> None:
    """Go through two traces node by node. A constant that differs becomes a choice in `one`, if `by_mode`."""
    if len(one.nodes) != len(other.nodes):
        raise _DifferentTracesError(f"{len(one.nodes)} operations and {len(other.nodes)}")
    for a, b in zip(one.nodes, other.nodes, strict=True):
        if (a.op, a.target, a.name, a.kwargs.keys()) != (b.op, b.target, b.name, b.kwargs.keys()):
            raise _DifferentTracesError(f"{a.name} and {b.name} in one place")
        if a.op == "get_attr" and not torch.equal(value_of(one.model, a), value_of(other.model, b)):
            raise _DifferentTracesError(f"a tensor made in forward, {a.name}, with other values each time")
        ours, theirs = _leaves((a.args, a.kwargs)), _leaves((b.args, b.kwargs))
        if len(ours) != len(theirs):
            raise _DifferentTracesError(f"other arguments of {a.name}")
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            if any(isinstance(value, fx.Node) for value in pair):
                if str(pair[0]) != str(pair[1]):
                    raise _DifferentTracesError(f"{pair[0]} and {pair[1]} as arguments of {a.name}")
            elif pair[0] != pair[1]:
                if not by_mode or not all(isinstance(v, (fx.node.base_types, type(None))) for v in pair):
                    raise _DifferentTracesError(f"{pair[0]!r} and then {pair[1]!r} in {a.name}")
                with one.graph.inserting_before(a):
                    training = one.graph.create_node("get_attr", "training")  # of the half: train(), eval() rule it
                    ours[i] = one.graph.call_function(choose, (training, *pair))
        a.args, a.kwargs = _with_leaves((a.args, a.kwargs), iter(ours))


# --- sizes and state in a graph ---------------------------------------------------------------------------------------


def _tidy_sizes(traced: Traced) -> None:
    """One form for every dimension that is read, `x.size(k)`; no unused reads."""
    for node in traced.nodes:
        if is_element(node) and _is_shape(shape := node.all_input_nodes[0]):
            with traced.graph.inserting_before(node):
                node.replace_all_uses_with(traced.graph.call_method("size", (shape.args[0], node.args[1])))
    for node in reversed(traced.nodes):
        if not node.users and (is_element(node) or reads_size(node)):
            for name in [name for name, last in traced.last.items() if last is node]:
                traced.last[name] = node.prev
            traced.graph.erase_node(node)


def is_element(node: fx.Node) -> bool:
    """`value[k]`, also of a tuple that is unpacked."""
    return node.target is operator.getitem and isinstance(node.args[1], int)


def _is_shape(node: fx.Node) -> bool:
    """`x.shape`, or `x.size()` without an argument."""
    whole = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    return whole or (node.target is getattr and node.args[1] == "shape")


def reads_size(node: fx.Node) -> bool:
    """A plain value, not a tensor, read from a tensor: its size, dtype or device."""
    attribute = node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")
    return attribute or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def reads_batch_size(node: fx.Node) -> bool:
    """`x.size(0)`."""
    return node.op == "call_method" and node.target == "size" and (*node.args[1:], *node.kwargs.values()) == (0,)


def is_plain(node: fx.Node) -> bool:
    """A value that is surely no tensor: a size, or arithmetic on sizes."""
    if reads_size(node):
        return True
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins", __name__)
    return arithmetic and bool(node.all_input_nodes) and all(map(is_plain, node.all_input_nodes))


def value_of(model: nn.Module, node: fx.Node) -> Tensor:
    """The tensor that a `get_attr` node reads."""
    return operator.attrgetter(str(node.target))(model)


def state_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and saved buffers by name, themselves; a tensor with two names is there twice."""
    state = module.state_dict(prefix=prefix, keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _node_state(model: nn.Module, node: fx.Node) -> dict[str, Tensor]:
    target = str(node.target)
    if node.op == "call_module":
        return state_of(model.get_submodule(target), f"{target}.")
    owner, _, name = target.rpartition(".")
    if node.op == "get_attr" and name in model.get_submodule(owner).state_dict():
        return {target: value_of(model, node)}
    return {}
