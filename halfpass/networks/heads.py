"""Auxiliary heads: the small network at the cut from which the client half learns (arXiv 2601.19261).

A new head is a function of (cut shape, outputs) in HEADS, and where it also answers for each pixel or token, one of
(cut shape, output shape) in DENSE. Local losses lose accuracy where the head is too weak; the
choices trade that against the client's work, and `halfpass cuts` prints what each costs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, log2, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfpass.errors import InputError
from halfpass.networks.models import BasicBlock, Builder, GlobalAverage, check_output, choose, init_convolutions, seeded
from halfpass.plugin import call_plugin

HIDDEN_LIMIT = 512  # hidden width of `mlp` at most, so that a wide cut does not make the head the larger part
TAIL_SIDE = 8  # pixels; where the CIFAR ResNets pool


def build_head(name: str, cut_shape: tuple[int, ...], outputs: int | tuple[int, ...], seed: int) -> nn.Module:
    """The head of that name: (B, *cut_shape) → (B, *outputs), the first of the tensors that cross the cut alone.

    `cut_shape` is (features,), (tokens, features) or (channels, height, width), as `split.cut_shapes` measured it;
    `outputs` a number, or the shape per sample: (outputs,), (outputs, height, width) or (tokens, outputs). `name` is a
    key of HEADS or `module:function` for a function of (cut_shape, outputs) that returns an nn.Module.
    Weights depend on `seed` alone; the caller's random state is untouched. Raises InputError for an unknown name and
    a head that does not fit.
    """
    place, shape = f"model.head {name!r}", (outputs,) if isinstance(outputs, int) else outputs
    with seeded(seed, "head"):
        if ":" in name:
            head = call_plugin(place, name, cut_shape, shape[0] if len(shape) == 1 else shape)
        elif len(shape) == 1:
            head = choose("model.head", name, HEADS)(cut_shape, shape[0])
        else:
            choose("model.head", name, HEADS)
            head = _dense(place, name, cut_shape, shape)
        if not isinstance(head, nn.Module):
            raise InputError(place, "an nn.Module", type(head).__name__, "return the head itself")
        check_output(place, head, torch.zeros(2, *cut_shape), shape)
    return head


def _linear(cut_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The paper's head: one fully connected layer (Zihad et al., arXiv 2601.19261)."""
    return FlatLinear(prod(cut_shape), _positions(cut_shape), classes)


def _pooled_linear(cut_shape: tuple[int, ...], classes: int) -> nn.Module:
    """The means of 2×2 pixels or of 2 tokens, then one fully connected layer: a quarter or half of its parameters."""
    _need("pooled-linear", cut_shape, (2, 3), "linear, mlp")
    *rest, last = cut_shape
    if len(cut_shape) == 3:
        pool: nn.Module = nn.AvgPool2d(2, ceil_mode=True)  # an odd last row or column is kept
        channels, positions = rest[0], _half(rest[1]) * _half(last)
    else:
        pool = nn.Sequential(SwapLast(), nn.AvgPool1d(2, ceil_mode=True))
        channels, positions = last, _half(rest[0])
    return nn.Sequential(pool, FlatLinear(channels * positions, positions, classes))


def _mlp(cut_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Pooling to at most 2×2, then one hidden layer; after the auxiliary networks of DGL, which averages to 2×2 and
    goes on with fully connected layers (Belilovsky et al. 2020, arXiv 1901.08164). Tokens are averaged."""
    _need("mlp", cut_shape, (1, 2, 3), "linear")
    pool: nn.Module = nn.Identity()
    features = cut_shape[-1]
    if len(cut_shape) == 2:
        pool = nn.Sequential(SwapLast(), nn.AdaptiveAvgPool1d(1))
    if len(cut_shape) == 3:
        side = tuple(min(2, length) for length in cut_shape[1:])
        pool, features = nn.AdaptiveAvgPool2d(side), cut_shape[0] * prod(side)
    hidden = min(features, HIDDEN_LIMIT)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def _conv(cut_shape: tuple[int, ...], classes: int, blocks: int = 1) -> nn.Module:
    """Residual blocks, the first with stride 2 and twice the channels, pooling, one fully connected layer.

    A short, faster narrowing copy of what the server half does, in the spirit of DGL's convolutional auxiliary networks
    (arXiv 1901.08164) and of AugLocal, which builds them from the layers above (Ma et al. 2024, arXiv 2402.17318).
    """
    _need("conv", cut_shape, (3,), "linear, mlp")
    return _residual(cut_shape[0], [2] + [1] * (blocks - 1), classes)


def _tail(cut_shape: tuple[int, ...], classes: int, blocks: int = 1) -> nn.Module:
    """`blocks` residual blocks for each stage that a CIFAR ResNet has above the cut: with stride 2 and twice the
    channels for each halving that is left down to TAIL_SIDE pixels, as they are where none is left. So an early cut has
    the longer head, and a late one the shape of the server half. Sources as for `_conv`."""
    _need("tail", cut_shape, (3,), "linear, mlp")
    halvings = ceil(log2(max(cut_shape[1:]) / TAIL_SIDE))
    stage = [2 if halvings > 0 else 1] + [1] * (blocks - 1)
    return _residual(cut_shape[0], stage * max(1, halvings), classes)


def _residual(channels: int, strides: Sequence[int], classes: int) -> nn.Module:
    """(B, C, H, W) → a block for each stride, of as many times the channels → means of pixels → (B, classes)"""
    layers: list[nn.Module] = []
    for stride in strides:
        layers.append(BasicBlock(channels, channels * stride, stride=stride))
        channels *= stride
    head = nn.Sequential(*layers, GlobalAverage(), nn.Linear(channels, classes))
    init_convolutions(head)
    return head


HEADS: dict[str, Builder] = {
    "linear": _linear,
    "pooled-linear": _pooled_linear,
    "mlp": _mlp,
    "conv": _conv,
    "conv-2": partial(_conv, blocks=2),
    "tail": _tail,
    "tail-2": partial(_tail, blocks=2),
    "tail-3": partial(_tail, blocks=3),
}


class FlatLinear(nn.Module):
    """Flatten and one fully connected layer, (B, *shape) → (B, classes), conditioned like the layers below it.

    The layer's weight is stored times √positions and divided by it in use: nn.Linear's function, but an SGD step moves
    it by 1/positions as much. Neighbouring positions say nearly the same, so the loss is about that much steeper in
    this layer than in a convolution. At a learning rate that trains the network, an nn.Linear on 32×16×16 activations
    diverges and takes the client half with it (the paper's rate is 0.001).

    It starts at zero, so that the client half's first gradients are not those of a random projection. ResNet-20 on
    CIFAR-10, one seed: 82.26 % against 81.62 % from a random start after 6 epochs (validation split), but 85.82 %
    against 86.15 % after 12 (test set), so whether it helps is open.
    """

    def __init__(self, features: int, positions: int, classes: int) -> None:
        super().__init__()
        self.scale = positions**-0.5
        self.linear = nn.Linear(features, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        weight = self.linear.weight
        if z.ndim == 4:  # channels last, as they are in memory, and as the layers below want their gradient
            weight = weight.unflatten(1, z.shape[1:]).permute(0, 2, 3, 1).flatten(1)
            z = z.permute(0, 2, 3, 1)
        return F.linear(z.flatten(1) * self.scale, weight, self.linear.bias)


def _positions(cut_shape: tuple[int, ...]) -> int:
    """Pixels, voxels or tokens of a cut; 1 where there are only features."""
    return cut_shape[0] if len(cut_shape) == 2 else prod(cut_shape[1:])


# --- an answer for each pixel or token --------------------------------------------------------------------------------


def _dense(place: str, name: str, cut_shape: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """(C, h, w) → (outputs, H, W), or (T, D) → (T, outputs)."""
    build = DENSE.get((name, len(shape)))
    if build is None:
        names = [choice for choice, dimensions in DENSE if dimensions == len(shape)]
        expected = f"a head with outputs {shape} per sample ({', '.join(names) or 'module:function'})"
        raise InputError(place, expected, "one of a sample as a whole", "take another head")
    if len(cut_shape) != len(shape) or (len(shape) == 2 and cut_shape[0] != shape[0]):
        expected = "a cut (channels, height, width)" if len(shape) == 3 else f"a cut ({shape[0]} tokens, features)"
        raise InputError(place, expected, f"{cut_shape}", "cut elsewhere, or give a head of your own")
    return build(cut_shape, shape)


def _linear_map(cut_shape: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    """One fully connected layer over each pixel's channels, then as large as the targets."""
    return nn.Sequential(_zero(nn.Conv2d(cut_shape[0], shape[0], 1)), Resize(shape[1:]))


def _mlp_map(cut_shape: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    channels = cut_shape[0]
    hidden = min(channels, HIDDEN_LIMIT)
    layers = nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, shape[0], 1)
    return nn.Sequential(*layers, Resize(shape[1:]))


def _conv_map(cut_shape: tuple[int, ...], shape: tuple[int, ...], blocks: int = 1) -> nn.Module:
    """Residual blocks at the cut's own size, since nothing is pooled in the end."""
    channels = cut_shape[0]
    layers = [BasicBlock(channels, channels) for _ in range(blocks)]
    head = nn.Sequential(*layers, nn.Conv2d(channels, shape[0], 1), Resize(shape[1:]))
    init_convolutions(head)
    return head


def _linear_tokens(cut_shape: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    return _zero(nn.Linear(cut_shape[1], shape[1]))


def _mlp_tokens(cut_shape: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
    features = cut_shape[1]
    hidden = min(features, HIDDEN_LIMIT)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, shape[1]))


def _zero(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """It starts at zero, as FlatLinear does."""
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Resize(nn.Module):
    """(B, K, h, w) → (B, K, *size), bilinear."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        same = tuple(x.shape[2:]) == self.size
        return x if same else F.interpolate(x, self.size, mode="bilinear", align_corners=False)


DENSE: dict[tuple[str, int], Callable[[tuple[int, ...], tuple[int, ...]], nn.Module]] = {
    # name of a head, dimensions of a sample's outputs
    ("linear", 3): _linear_map, ("mlp", 3): _mlp_map, ("linear", 2): _linear_tokens, ("mlp", 2): _mlp_tokens,
    **{(name, 3): partial(_conv_map, blocks=blocks) for name, blocks in (
        ("conv", 1), ("conv-2", 2), ("tail", 1), ("tail-2", 2), ("tail-3", 3),
    )},
}  # fmt: skip

SHAPES = {1: "(features,)", 2: "(tokens, features)", 3: "(channels, height, width)"}


class SwapLast(nn.Module):
    """(B, T, D) → (B, D, T), as pooling over tokens wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _half(length: int) -> int:
    return -(-length // 2)


def _need(head: str, cut_shape: tuple[int, ...], dimensions: tuple[int, ...], instead: str) -> None:
    if len(cut_shape) not in dimensions:
        raise InputError(
            f"model.head {head!r}", f"a cut of shape {' or '.join(SHAPES[d] for d in dimensions)}",
            f"{tuple(cut_shape)}", f"take another head ({instead}), or cut elsewhere",
        )
