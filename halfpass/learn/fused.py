"""BatchNorm, the addition of a shortcut, and ReLU in one, for training on a CPU.

PyTorch reads and writes a layer's activations anew for each of the three, and again on the way back; in bf16 that takes
as long as the convolutions. Here each way is two passes over them: sums per channel, then the result. Both are compiled
by torch.compile, which needs a C++ compiler. `fuse` puts them in place of the modules of a half or head.
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

from halfpass.errors import InputError
from halfpass.learn.edge import EdgeHalf
from halfpass.learn.reason import reason
from halfpass.learn.split import as_graph
from halfpass.learn.trace import update

KERNELS = 256  # of one function at most: one for each pair of channels and pixels that a network has


def fuse(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm2d whose output only a ReLU uses, at once or after one addition, as a NormRelu.

    A graph, such as a half, is changed in place. Of what is no graph, such as a head, a traced copy is returned, with
    the same state, or where it has nothing to replace or cannot be traced faithfully, the module itself.
    """
    if isinstance(module, EdgeHalf):
        module.between, module.head = fuse(module.between), fuse(module.head)
        return module
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


class NormRelu(nn.BatchNorm2d):
    """relu(BatchNorm(x) + other), or without `other`: (B, C, H, W) → (B, C, H, W)."""

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> "NormRelu":
        """With that module's own parameters and buffers, which stay shared."""
        fused = cls(norm.num_features, norm.eps, norm.momentum).train(norm.training)
        fused._parameters, fused._buffers = norm._parameters, norm._buffers
        return fused

    def forward(self, x: Tensor, other: Tensor | int | float | None = None) -> Tensor:
        if not self._takes(x, other):
            normalized = super().forward(x)
            return F.relu(normalized if other is None else normalized + other)
        out, mean, variance = _NormRelu.apply(x, other, self.weight, self.bias, self.running_mean, self.eps)
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return out

    def _takes(self, x: Tensor, other: Tensor | int | float | None) -> bool:
        """Training, on a CPU, of more than one sample, by weights in float32: what the kernels were made for."""
        training = self.training and torch.is_grad_enabled() and self.weight.dtype == torch.float32
        fits = x.device.type == "cpu" and x.ndim == 4 and len(x) > 1 and x.dtype in (torch.float32, torch.bfloat16)
        like_x = isinstance(other, Tensor) and other.shape == x.shape and other.dtype == x.dtype
        return training and fits and (other is None or like_x)


class _NormRelu(torch.autograd.Function):
    """Returns the output, and the mean and biased variance of each channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _rows(x)
        mean, variance, factor, scale, offset = _kernel(_statistics)(rows, shift, weight, bias, eps)
        if other is None:
            out = _kernel(_output)(rows, scale, offset)
            ctx.save_for_backward(rows, mean, factor, scale, offset)
        else:
            out = _kernel(_output_of_sum)(rows, _rows(other), scale, offset)
            ctx.save_for_backward(rows, mean, factor, scale, out)
        ctx.of_sum = other is not None
        ctx.mark_non_differentiable(mean, variance)
        return _pictures(out, x), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, mean, factor, scale, known = ctx.saved_tensors
        upper = _rows(gradient)
        sums, result = (_sums_of_sum, _gradients_of_sum) if ctx.of_sum else (_sums, _gradients)
        weight, bias, slope, level = _kernel(sums)(upper, rows, mean, factor, scale, known)
        x, *other = (_pictures(each, gradient) for each in _kernel(result)(upper, rows, scale, slope, level, known))
        return x, other[0] if other else None, weight, bias, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), a view of channels-last memory."""
    return x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _pictures(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


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
            if isinstance(value, Tensor) and value.ndim == 3:
                torch._dynamo.maybe_mark_dynamic(value, 0)  # one kernel for all sizes of batches
        return compiled(*values)

    return of_any_batch


# --- The kernels ------------------------------------------------------------------------------------------------------
# Of layers' values as `_rows` gives them, (B, pixels, C), and of values per channel, (C,), in float32. Formulas: Ioffe
# & Szegedy 2015 (arXiv 1502.03167), section 3.


def _statistics(
    rows: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean, biased variance, 1 / standard deviation; and scale and offset, with which x · scale + offset is BatchNorm's
    output. Sums are of differences from `shift`, the running mean, lest a large mean drown a small variance; in a
    network's first batches it is not there yet, and a mean of 1,000 standard deviations is too much."""
    count = rows.shape[0] * rows.shape[1]
    difference = rows.float() - shift
    first, second = _total(difference) / count, _total(difference * difference) / count
    variance = (second - first * first).clamp_min(0)
    mean, factor = shift + first, torch.rsqrt(variance + eps)
    scale = weight * factor
    return mean, variance, factor, scale, bias - mean * scale


def _total(values: Tensor) -> Tensor:
    """Sums over samples and pixels; in two steps, as one sum over everything is slower by far."""
    return values.sum(1).sum(0)


def _output(rows: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.relu(rows.float() * scale + offset).to(rows.dtype)


def _output_of_sum(rows: Tensor, other: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.relu(rows.float() * scale + offset + other.float()).to(rows.dtype)


def _sums(
    upper: Tensor, rows: Tensor, mean: Tensor, factor: Tensor, scale: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of weight and bias; and slope and level, with which passed · scale + x · slope + level is that of x."""
    return _sums_of(_passed(upper, rows.float() * scale + offset), rows, mean, factor, scale)


def _sums_of_sum(
    upper: Tensor, rows: Tensor, mean: Tensor, factor: Tensor, scale: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _sums_of(_passed(upper, out), rows, mean, factor, scale)


def _sums_of(
    passed: Tensor, rows: Tensor, mean: Tensor, factor: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = rows.shape[0] * rows.shape[1]
    bias_gradient = _total(passed)
    weight_gradient = _total(passed * (rows.float() - mean)) * factor
    slope = -scale * factor * weight_gradient / count
    return weight_gradient, bias_gradient, slope, -scale * bias_gradient / count - mean * slope


def _passed(upper: Tensor, out: Tensor) -> Tensor:
    """The gradient that the ReLU lets pass."""
    return torch.where(out > 0, upper.float(), 0.0)


def _gradients(
    upper: Tensor, rows: Tensor, scale: Tensor, slope: Tensor, level: Tensor, offset: Tensor
) -> tuple[Tensor]:
    """Of x."""
    passed = _passed(upper, rows.float() * scale + offset)
    return ((passed * scale + rows.float() * slope + level).to(rows.dtype),)


def _gradients_of_sum(
    upper: Tensor, rows: Tensor, scale: Tensor, slope: Tensor, level: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Of x, and of what was added to it."""
    passed = _passed(upper, out)
    return (passed * scale + rows.float() * slope + level).to(rows.dtype), passed.to(rows.dtype)
