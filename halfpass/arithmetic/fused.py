"""BatchNorm, the addition of a shortcut, and ReLU in one, for training on a CPU.

PyTorch reads and writes a layer's activations anew for each of the three, and again on the way back; in bf16 that takes
as long as the convolutions. Here each way is two passes over them: sums per channel, then the result. A way is one
kernel that torch.compile makes, which needs a C++ compiler. `fuse` puts them in place of the modules of a half or head.
Tests: tests/test_fused.py compares with the modules themselves.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from halfpass.errors import InputError, reason
from halfpass.networks.split import as_graph
from halfpass.networks.trace import update

KERNELS = 256  # of one function at most: one for each pair of channels and pixels that a network has


def fuse(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm2d whose output only a ReLU uses, at once or after one addition, as a NormRelu.

    A graph, such as a half, is changed in place. Of what is no graph, such as a head, a traced copy is returned, with
    the same state, or where it has nothing to replace or cannot be traced faithfully, the module itself.
    """
    graph = module if isinstance(module, fx.GraphModule) else _graph_of(module)
    if graph is None:
        return module
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    replaced = False
    for name in dict.fromkeys(str(node.target) for node in calls):
        norm = graph.get_submodule(name)
        if not _can_be_fused(norm):
            continue
        chains = [_chain(graph, node) for node in calls if node.target == name]
        nodes = [node for chain in chains for node in chain]
        if all(chains) and len(set(nodes)) == len(nodes):
            graph.set_submodule(name, NormRelu.of(norm))
            for chain in chains:
                _replace(graph.graph, chain)
            replaced = True
    _take_gradients_apart(graph)
    graph.recompile()
    return graph if replaced else module


def _graph_of(module: nn.Module) -> fx.GraphModule | None:
    """A traced copy that does all that the module does, in both modes; None where there is none."""
    inputs = list(inspect.signature(module.forward).parameters.values())
    if len(inputs) != 1 or inputs[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    if any(type(part).train is not nn.Module.train for part in module.modules()):
        return None
    try:
        graph = as_graph(module)
    except InputError:
        return None
    return graph if list(graph.state_dict()) == list(module.state_dict()) else None


def _can_be_fused(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    if type(module) is not nn.BatchNorm2d or module.running_mean is None or not module.momentum:
        return False
    return module.weight is not None and module.bias is not None


def _chain(module: fx.GraphModule, norm: fx.Node) -> list[fx.Node]:
    """BatchNorm, perhaps an addition, and ReLU, where only each next one uses what the one before returns; or []."""
    if len(norm.args) != 1 or norm.kwargs:
        return []
    chain = [norm]
    while len(chain) < 3:
        users = list(chain[-1].users)
        if len(users) != 1:
            return []
        chain += users
        if _is_relu(module, users[0]):
            return chain
        if not _is_sum(users[0]) and not _adds_to(chain[-2], users[0]):
            return []
    return []


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def _is_sum(node: fx.Node) -> bool:
    """`a + b` of two values of the graph."""
    return node.target in (operator.add, torch.add) and len(node.args) == 2 == len(_operands(node)) and not node.kwargs


def _adds_to(node: fx.Node, user: fx.Node) -> bool:
    """`node += a` of another value of the graph."""
    return user.target is update and user.args[:2] == (node, "iadd") and len(_operands(user)) == 2


def _operands(node: fx.Node) -> set[fx.Node]:
    return {value for value in node.args if isinstance(value, fx.Node)}


def _replace(graph: fx.Graph, chain: list[fx.Node]) -> None:
    """A call of the fused module, which has the BatchNorm's name, in place of the chain's nodes."""
    norm, *totals, relu = chain
    others = [value for total in totals for value in _operands(total) if value is not norm]
    with graph.inserting_before(chain[-2]):
        relu.replace_all_uses_with(graph.call_module(str(norm.target), (norm.args[0], *others)))
    for node in reversed(chain):
        graph.erase_node(node)


def _take_gradients_apart(module: fx.GraphModule) -> None:
    """A block's output goes to the next block's first layer and to its shortcut. Returned twice, once for either, it
    gets their two gradients, whose sum the kernel computes in passing; autograd would write it out first."""
    for node in list(module.graph.nodes):
        users = list(node.users)
        if not _calls(module, node, NormRelu) or len(users) != 2:
            continue
        if not all(_calls(module, user, NormRelu, nn.Conv2d) for user in users):
            continue
        for index, user in enumerate(users):
            with module.graph.inserting_before(user):
                copy = module.graph.call_function(operator.getitem, (node, index))
            user.replace_input_with(node, copy)
        node.kwargs = {"twice": True}


def _calls(module: fx.GraphModule, node: fx.Node, *types: type[nn.Module]) -> bool:
    return node.op == "call_module" and type(module.get_submodule(str(node.target))) in types


class NormRelu(nn.BatchNorm2d):
    """relu(BatchNorm(x) + other), or without `other`: (B, C, H, W) → (B, C, H, W), or two of the same."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "NormRelu":
        """With that module's own parameters and buffers, which stay shared."""
        fused = cls(norm.num_features, norm.eps, norm.momentum).train(norm.training)
        fused._parameters, fused._buffers = norm._parameters, norm._buffers
        return fused

    def forward(self, x: Tensor, other: Tensor | int | float | None = None, twice: bool = False) -> Any:
        if self._takes(x, other):
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            settings = (self.running_mean, self.running_var, self.momentum, self.eps)
            outputs: tuple[Tensor, Tensor] = _NormRelu.apply(x, other, self.weight, self.bias, *settings)
            return outputs if twice else outputs[0]
        normalized = super().forward(x)
        out = F.relu(normalized if other is None else normalized + other)
        return (out, out) if twice else out

    def _takes(self, x: Tensor, other: Tensor | int | float | None) -> bool:
        """Training, on a CPU, of more than one sample, by weights in float32: what the kernels were made for."""
        training = self.training and torch.is_grad_enabled() and self.weight.dtype == torch.float32
        fits = x.device.type == "cpu" and x.ndim == 4 and len(x) > 1 and x.dtype in (torch.float32, torch.bfloat16)
        like_x = isinstance(other, Tensor) and other.shape == x.shape and other.dtype == x.dtype
        return training and fits and (other is None or like_x)


class _NormRelu(torch.autograd.Function):
    """Returns the output twice; updates the running statistics."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        x, other = _channels_last(x), None if other is None else _channels_last(other)
        out, mean, factor, scale, offset = _kernel(_forward)(x, other, weight, bias, *settings)
        ctx.save_for_backward(x, mean, factor, scale, offset if other is None else out)
        ctx.adds = other is not None
        ctx.set_materialize_grads(False)
        return out, out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [_channels_last(gradient) for gradient in gradients if gradient is not None]
        kernel = _backward_of_sums if ctx.adds or len(given) == 2 else _backward
        x, other, weight, bias = _kernel(kernel)(*ctx.saved_tensors, *given)
        return x, other if ctx.adds else None, weight, bias, None, None, None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.detach().contiguous(memory_format=torch.channels_last)


@functools.cache
def check_compiler() -> None:
    """Raises InputError where torch.compile can make no kernel for the CPU."""
    try:
        torch.compile(torch.neg, fullgraph=True)(torch.ones(2))
    except Exception as error:  # of torch's several, by what is missing
        remedy = "install g++ and Python's header files, or leave it out"
        raise InputError("train.compile", "a C++ compiler for torch.compile", reason(error), remedy) from error


@functools.cache
def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(  # type: ignore[call-overload]  # whose types do not know recompile_limit yet
        function, fullgraph=True, dynamic=False, recompile_limit=KERNELS
    )

    def of_any_batch(*values: Any) -> Any:
        for value in values:
            if isinstance(value, Tensor) and value.ndim == 4:
                torch._dynamo.maybe_mark_dynamic(value, 0)  # one kernel for all sizes of batches
        return compiled(*values)

    return of_any_batch


# --- The kernels ------------------------------------------------------------------------------------------------------
# Of layers' values, (B, C, H, W) in channels-last memory, and of values per channel, (C,), in float32. Formulas: Ioffe
# & Szegedy 2015 (arXiv 1502.03167), section 3.


def _forward(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor,
    running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, mean, 1 / standard deviation; and scale and offset, with which x · scale + offset is BatchNorm's output.
    Sums are of differences from the running mean, lest a large mean drown a small variance; in a network's first
    batches it is not there yet, and a mean of 1,000 standard deviations is too much."""
    rows = _rows(x)
    count = rows.shape[0] * rows.shape[1]
    difference = rows.float() - running_mean
    first, second = (values.sum(1).sum(0) / count for values in (difference, difference * difference))
    variance = (second - first * first).clamp_min(0)
    mean, factor = running_mean + first, torch.rsqrt(variance + eps)
    scale = weight * factor
    offset = bias - mean * scale
    out = rows.float() * scale + offset
    out = torch.relu(out if other is None else out + _rows(other).float())
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(variance * (count / (count - 1)), momentum)
    return _pictures(out.to(x.dtype), x), mean, factor, scale, offset


def _backward(
    x: Tensor, mean: Tensor, factor: Tensor, scale: Tensor, known: Tensor, upper: Tensor
) -> tuple[Tensor, None, Tensor, Tensor]:
    """Gradients of x, of nothing else, of weight and of bias. `known` is the offset."""
    rows = _rows(x)
    passed = torch.where(rows.float() * scale + known > 0, _rows(upper).float(), 0.0)
    x_gradient, weight_gradient, bias_gradient = _gradients(passed, rows, mean, factor, scale)
    return _pictures(x_gradient, x), None, weight_gradient, bias_gradient


def _backward_of_sums(
    x: Tensor, mean: Tensor, factor: Tensor, scale: Tensor, known: Tensor, *uppers: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of what was added to it, of weight and of bias, from one or two gradients of the output. `known`
    is the output, or the offset where nothing was added. What the ReLU lets pass is written in the first pass over the
    values and read in the second."""
    rows = _rows(x)
    out = _rows(known) if known.ndim == 4 else rows.float() * scale + known
    upper = sum(_rows(each).float() for each in uppers)
    passed = torch.where(out > 0, upper, 0.0).to(x.dtype)
    x_gradient, weight_gradient, bias_gradient = _gradients(passed.float(), rows, mean, factor, scale)
    return _pictures(x_gradient, x), _pictures(passed, x), weight_gradient, bias_gradient


def _gradients(
    passed: Tensor, rows: Tensor, mean: Tensor, factor: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias, from what the ReLU lets pass. That of x is passed · scale + x · slope + level. Slope and
    level are taken as sums over samples, like the others, since torch.compile keeps a sum, and would compute anything
    else anew for each value."""
    per_value = -scale / (rows.shape[0] * rows.shape[1])
    sums, products = passed.sum(1), (passed * (rows.float() - mean)).sum(1) * factor  # (B, C)
    slope = (products * (per_value * factor)).sum(0)
    level = (sums * per_value - products * (per_value * factor * mean)).sum(0)
    return (passed * scale + rows.float() * slope + level).to(rows.dtype), products.sum(0), sums.sum(0)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C). Sums over samples and pixels are taken in two steps, pixels first: in one,
    torch.compile goes through them value by value."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pictures(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)
