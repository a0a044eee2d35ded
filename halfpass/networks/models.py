"""The networks we ship, by name, and the user's own as `module:function`.

A new network is a function of (sample shape, classes) in MODELS. Its layers have names that can be cut at (split.py).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfpass.errors import InputError, choice_error, reason
from halfpass.networks.pretrained import LIBRARIES, from_library
from halfpass.networks.resnet import ResNet50
from halfpass.networks.transformer import TextTransformer
from halfpass.networks.unet import UNet
from halfpass.plugin import call_plugin
from halfpass.seed import derive_seed
from halfpass.tree import Tree, call, flatten, map_leaves, prediction

Model = nn.Module | tuple[nn.Module, nn.Module]
Builder = Callable[[tuple[int, ...], int], nn.Module]  # (shape of a sample, classes) → network


def build_model(
    name: str, sample_shape: tuple[int, ...], outputs: int, seed: int, output_shape: tuple[int, ...] | None = None, *,
    pretrained: bool = False, example: Tree | None = None,
) -> Model:  # fmt: skip
    """The network of that name, with weights that depend on `seed` alone; the caller's random state is untouched.

    `name` is a key of MODELS, or `module:function` for a function of (sample_shape, outputs) that returns an
    nn.Module (B, *sample_shape) → (B, *output_shape), or the pair (client half, server half) of it; or a network of
    another library, `timm:NAME`, `torchvision:NAME` or `hf:FOLDER_OR_ID`, with its published weights where
    `pretrained`. `output_shape` is (outputs,) unless the task says otherwise; `example` is a batch to try it
    on, of zeros where there is none. Raises InputError for an unknown name, a
    sample shape that the network cannot take, and a function that fails.
    """
    place, shape = f"model.name {name!r}", output_shape or (outputs,)
    with seeded(seed, "model"):
        library = name.partition(":")[0] if ":" in name else ""
        if pretrained and library not in LIBRARIES:
            expected, remedy = f"a network of {', '.join(LIBRARIES)}", "leave it out, or give a file by model.weights"
            raise InputError("model.pretrained", expected, repr(name), remedy)
        if library in LIBRARIES:
            return from_library(place, name, sample_shape, outputs, pretrained=pretrained)
        if ":" not in name:
            build = choose("model.name", name, MODELS)
            answers = (outputs, *sample_shape[1:]) if name in DENSE else (outputs,)
            if shape != answers:
                remedy = "choose another task or network, e.g. your own as module:function"
                raise InputError(place, f"a network with outputs {shape} per sample", f"one with {answers}", remedy)
            return build(sample_shape, outputs)
        example = torch.zeros(2, *sample_shape) if example is None else example
        return _check_own_model(place, call_plugin(place, name, sample_shape, outputs), example, shape)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: (B, in, H, W) → (B, out, H/stride, W/stride), rounded up.

    He et al. 2015 (arXiv 1512.03385), section 3.3 and figure 2. No ReLU works in place: the block's output may be a
    cut, and is then used twice.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(out_channels)
        self.relu_1 = nn.ReLU()
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(out_channels)
        self.relu_2 = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else PaddedShortcut(out_channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu_1(self.norm_1(self.conv_1(x)))  # (B, out, H/stride, W/stride)
        out = self.norm_2(self.conv_2(out))
        return self.relu_2(out + (x if self.shortcut is None else self.shortcut(x)))


class PaddedShortcut(nn.Module):
    """Option A of He et al. 2015, section 3.3: no parameters, every `stride`-th pixel, zeros for the new channels.

    Written with the channels last, so that its gradient is in that order too: a ReLU that meets one in the other order
    takes many times as long.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        kept = x.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]  # (B, H/stride, W/stride, C)
        return F.pad(kept, (0, self.new_channels)).permute(0, 3, 1, 2)


class GlobalAverage(nn.Module):
    """The mean over all pixels, (B, C, H, W) → (B, C); faster than AdaptiveAvgPool2d in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers, He et al. 2015, section 4.2: (B, C, H, W) → (B, classes).

    Cuts: `stem`, blocks `stage_1.0` … `stage_3.{n-1}` with 16, 32 and 64 channels, `pool`.
    """

    def __init__(self, in_channels: int, classes: int, n: int) -> None:
        super().__init__()
        self.stem = conv_norm_relu(in_channels, 16)
        self.stage_1 = _stage(16, 16, 1, n)  # (B, 16, H, W)
        self.stage_2 = _stage(16, 32, 2, n)  # (B, 32, H/2, W/2)
        self.stage_3 = _stage(32, 64, 2, n)  # (B, 64, H/4, W/4)
        self.pool = GlobalAverage()  # (B, 64)
        self.classifier = nn.Linear(64, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage_3(self.stage_2(self.stage_1(self.stem(x))))
        return self.classifier(self.pool(x))


class DigitsCNN(nn.Module):
    """A small network for images of about 8×8: (B, C, H, W) → (B, classes). Cuts: `block_1` … `block_4`, `pool`."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.block_1 = conv_norm_relu(in_channels, 32)  # (B, 32, H, W)
        self.block_2 = conv_norm_relu(32, 32)
        self.block_3 = conv_norm_relu(32, 64, stride=2)  # (B, 64, H/2, W/2)
        self.block_4 = conv_norm_relu(64, 64)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())  # (B, 64·2·2)
        self.classifier = nn.Linear(64 * 2 * 2, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_4(self.block_3(self.block_2(self.block_1(x))))
        return self.classifier(self.pool(x))


def conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3×3 convolution, BatchNorm, ReLU: (B, in, H, W) → (B, out, H/stride, W/stride), rounded up."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def init_convolutions(network: nn.Module) -> None:
    """Normal weights of variance 2 / fan out (He et al. 2015, arXiv 1502.01852, section 2.2, backward case)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(in_channels: int, out_channels: int, stride: int, n: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(n - 1)))


def _resnet(n: int, sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return CifarResNet(_image_channels(f"resnet{6 * n + 2}", sample_shape), classes, n)


def _digits_cnn(sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return DigitsCNN(_image_channels("digits-cnn", sample_shape), classes)


def _resnet50(sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return ResNet50(_image_channels("resnet50", sample_shape), classes)


def _unet(sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    return UNet(_image_channels("unet", sample_shape), classes)


def _transformer(sample_shape: tuple[int, ...], classes: int) -> nn.Module:
    if len(sample_shape) != 1:
        raise InputError(
            "model.name 'transformer'", "samples of (bytes,)", f"samples of shape {tuple(sample_shape)}",
            "choose a network for such samples, or a data set of text",
        )
    return TextTransformer(sample_shape[0], classes)


MODELS: dict[str, Builder] = {
    **{f"resnet{6 * n + 2}": partial(_resnet, n) for n in (3, 5, 7, 9, 18)},
    "resnet50": _resnet50,
    "digits-cnn": _digits_cnn,
    "unet": _unet,
    "transformer": _transformer,
}
DENSE = ("unet",)  # those that answer for each pixel
MIDDLE_CUTS: dict[str, str] = {  # the default cut of each; ResNet-110's is the paper's, behind 26 of 54 blocks
    **{f"resnet{6 * n + 2}": f"stage_2.{(n - 1) // 2}" for n in (3, 5, 7, 9)},
    "resnet110": "stage_2.7",
    "resnet50": "layer3.0",  # behind 8 of 16 blocks
    "unet": "down_2",
    "digits-cnn": "block_2",
    "transformer": "blocks.1",
}


def _image_channels(name: str, sample_shape: tuple[int, ...]) -> int:
    if len(sample_shape) != 3:
        raise InputError(
            f"model.name {name!r}", "samples (channels, height, width)", f"samples of shape {tuple(sample_shape)}",
            "choose a network for such samples, e.g. your own as module:function",
        )
    return sample_shape[0]


@contextmanager
def seeded(seed: int, stream: str) -> Iterator[None]:
    """New weights are drawn from `derive_seed(seed, stream)`; the caller's random state comes back afterwards.

    Networks are built on the CPU. The generators of GPUs are left alone, so that asking does not start one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, stream))
        yield


def choose(place: str, name: str, table: dict[str, Builder]) -> Builder:
    """The entry of that name; InputError names all choices and the near miss."""
    if name not in table:
        raise choice_error(place, [*table, "module:function"], name)
    return table[name]


def _check_own_model(
    place: str, model: object, example: Tree, output_shape: tuple[int, ...]
) -> Model:
    expected = "an nn.Module, or a pair of them (client half, server half)"
    if isinstance(model, tuple) and len(model) == 2 and all(isinstance(half, nn.Module) for half in model):
        for half in model:
            _check_kind(place, half)
        check_output(place, Pair(*model), example, output_shape)
        return model
    if isinstance(model, nn.Module):
        _check_kind(place, model)
        check_output(place, model, example, output_shape)
        return model
    raise InputError(place, expected, f"{type(model).__name__}", "return the network itself")


def _check_kind(place: str, module: nn.Module) -> None:
    """Refuses what would fail later without a word of its cause."""
    if (returned := module.train(module.training)) is not module:
        remedy = "end it with return self"
        raise InputError(f"{place}, train()", "the module returned", type(returned).__name__, remedy)
    for name, value in module.named_parameters():
        if value.is_complex() or value.dtype == torch.float64:
            remedy = "keep two real ones, and view_as_complex in forward" if value.is_complex() else "call .float()"
            raise InputError(place, "parameters of 32 or 16 bits", f"{name} of {value.dtype}", remedy)
    for layer, part in module.named_modules():
        for name, held in vars(part).items():
            if isinstance(held, Tensor) and held.grad_fn is not None:  # it cannot be copied
                remedy = "make it one: prune.remove, or parametrizations.weight_norm instead of weight_norm"
                found = f"{f'{layer}.{name}'.lstrip('.')}, computed from others as by pruning or weight_norm"
                raise InputError(place, "tensors that are parameters or buffers", found, remedy)


class Pair(nn.Module):
    """A client half and a server half, one after the other: (B, ...) → (B, classes). One tensor or a tuple crosses."""

    def __init__(self, client: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.client, self.server = client, server

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        crossing = self.client(*args, **kwargs)
        return self.server(*crossing) if isinstance(crossing, tuple) else self.server(crossing)


def check_output(place: str, module: nn.Module, example: Tree, output_shape: tuple[int, ...]) -> None:
    """Refuse a module that does not map a batch like `example` to (B, *output_shape). Tried on a copy, for a forward
    may settle things by its first batch; on the module itself where it has lazy layers, which get their shapes here."""
    lazy = any(nn.parameter.is_lazy(value) for value in (*module.parameters(), *module.buffers()))
    if not lazy:
        with suppress(Exception):  # what cannot be copied is refused later, by name
            module = copy.deepcopy(module)
    modes = {part: part.training for part in module.modules()}
    samples = map_leaves(lambda leaf: leaf[:2].clone(), example)
    try:
        with torch.no_grad():
            out = prediction(call(module.eval(), samples))
    except Exception as error:  # whatever the module raises
        shapes = {name: tuple(leaf.shape) for name, leaf in flatten(samples).items()}
        wanted = f"a forward pass of {shapes.get('', shapes)}"
        raise InputError(place, wanted, reason(error), "fit its layers to that shape") from error
    finally:
        for part, training in modes.items():
            part.training = training
    found, expected = f"{tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__, (2, *output_shape)
    if found != f"{expected}":
        remedy = "end with one value per class" if len(output_shape) == 1 else "end with outputs of that shape"
        raise InputError(place, f"an output of {expected} for 2 samples", found, remedy)
