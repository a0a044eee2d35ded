"""The networks have the papers' sizes, learn, depend on the seed alone, and the user's own are checked."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from halfpass.config import Config, DataConfig, Method, ModelConfig, TrainConfig
from halfpass.errors import InputError
from halfpass.networks.heads import build_head
from halfpass.networks.models import DENSE, MIDDLE_CUTS, MODELS, GlobalAverage, PaddedShortcut, build_model
from halfpass.networks.split import cut_shapes, split
from halfpass.run.train import train

OWN = """
import torch
from torch import nn

def net(sample_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes), nn.BatchNorm1d(classes))

def pair(sample_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Linear(3, classes)

def number(sample_shape, classes):
    return 3

def wrong_classes(sample_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, classes + 1))

def wrong_shape(sample_shape, classes):
    return nn.Linear(9, classes)

def broken(sample_shape, classes):
    raise KeyError("oops")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own in the working directory."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def refusal(name: str, sample_shape: tuple[int, ...] = (1, 2, 2)) -> str:
    with pytest.raises(InputError) as error:
        build_model(name, sample_shape, 2, seed=0)
    return str(error.value)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnets_have_the_papers_number_of_parameters(depth: int, millions: float) -> None:
    """He et al. 2015, table 6, to its two digits."""
    model = build_model(f"resnet{depth}", (3, 32, 32), 10, seed=0)
    assert isinstance(model, nn.Module)
    assert float(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2g}") == millions
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


OF_PICTURES = [name for name in MODELS if name != "transformer"]


@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_network_takes_the_samples_channels_and_trains_all_of_itself(name: str) -> None:
    for shape in ((1, 8, 8), (4, 9, 7)):
        outputs = (5, *shape[1:]) if name in DENSE else (5,)
        model = build_model(name, shape, 5, 0, outputs)
        assert isinstance(model, nn.Module)
        model(torch.randn(3, *shape)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert not any(getattr(m, "inplace", False) for m in model.modules()) or name == "resnet50"


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build_model("resnet20", (3, 8, 8), 10, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    again, other = (build_model("resnet20", (3, 8, 8), 10, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)


def test_convolutions_have_he_variance() -> None:
    weight = build_model("resnet20", (3, 8, 8), 10, seed=0).stage_3[2].conv_2.weight
    assert weight.var().item() == pytest.approx(2 / (64 * 9), rel=0.05)


def test_gradients_keep_the_channels_last() -> None:
    """Of a step's layers those that meet a gradient in the other order take many times as long."""
    flat = build_head("linear", (4, 6, 6), outputs=3, seed=0)
    for layer in (PaddedShortcut(new_channels=4, stride=2), GlobalAverage(), flat):
        start = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
        x = start * 1  # a gradient in between, which nobody brings into another order
        orders = []
        x.register_hook(lambda gradient, orders=orders: orders.append(gradient.permute(0, 2, 3, 1).is_contiguous()))
        out = layer(x)
        (out * torch.randn_like(out)).sum().backward()
        assert orders == [True] or layer.__class__ is GlobalAverage  # one number per channel, expanded over all pixels
        plain = {
            PaddedShortcut: lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4)), GlobalAverage: lambda x: x.mean((2, 3)),
        }.get(type(layer), lambda x: (x * flat.scale).flatten(1) @ flat.linear.weight.T + flat.linear.bias)  # fmt: skip
        assert torch.allclose(out, plain(x), atol=1e-6)


def test_the_padded_shortcut_subsamples_and_adds_zero_channels() -> None:
    x = torch.arange(18.0).view(1, 2, 3, 3)
    out = PaddedShortcut(new_channels=2, stride=2)(x)
    assert torch.equal(out[0, :2], torch.tensor([[[0.0, 2], [6, 8]], [[9, 11], [15, 17]]]))
    assert torch.equal(out[0, 2:], torch.zeros(2, 2, 2))


@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_network_has_a_middle_cut(name: str) -> None:
    halves = split(build_model(name, (3, 8, 8), 10, 0, (10, 8, 8) if name in DENSE else None), MIDDLE_CUTS[name])
    known = {"digits-cnn": ((32, 8, 8),), "resnet50": ((1024, 1, 1),), "unet": cut_shapes(halves.client, (3, 8, 8))}
    assert cut_shapes(halves.client, (3, 8, 8)) == known.get(name, ((32, 4, 4),))
    assert len(cut_shapes(halves.client, (3, 8, 8))) == (2 if name == "unet" else 1)  # its skip crosses


# --- digits ---------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(values, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    x, order = (x - x.mean()) / x.std(), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1437]], y[order[:1437]], x[order[1437:]], y[order[1437:]]


@pytest.mark.parametrize(("decoupled", "bar"), [(False, 0.98), (True, 0.975)])
def test_the_digits_network_learns_digits_whole_and_cut(decoupled: bool, bar: float) -> None:
    """15 epochs, batch 32, SGD 0.1 with Nesterov 0.9, weight decay 5e-4, cosine: 98.9–99.4 % for both, seeds 0–3."""
    x, y, test_x, test_y = digits()
    model = build_model("digits-cnn", (1, 8, 8), 10, seed=0)
    halves, head = split(model, "block_2"), build_head("linear", (32, 8, 8), 10, seed=0)
    parameters = [p for part in (halves.client, halves.server, head) for p in part.parameters()]
    epochs, batch, random = 15, 32, torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // batch))
    for _ in range(epochs):
        for pick in torch.randperm(len(x), generator=random)[: len(x) // batch * batch].view(-1, batch):
            (z,) = halves.client(x[pick])
            loss = F.cross_entropy(halves.server(z.detach() if decoupled else z), y[pick])
            loss = loss + F.cross_entropy(head(z), y[pick]) if decoupled else loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    halves.client.eval(), halves.server.eval()
    with torch.no_grad():
        accuracy = (halves.server(*halves.client(test_x)).argmax(1) == test_y).float().mean().item()
    assert accuracy >= bar


# --- the user's own, and errors -------------------------------------------------------------------------------------


def test_a_function_of_ones_own_builds_the_network_or_its_halves(own: str) -> None:
    first, again = (build_model(f"{own}:net", (1, 2, 2), 2, seed=3) for _ in range(2))
    assert isinstance(first, nn.Module)
    assert first.training
    assert torch.equal(first[1].weight, again[1].weight)
    assert torch.equal(first[2].running_mean, torch.zeros(2))  # the check leaves statistics alone
    pair = build_model(f"{own}:pair", (1, 2, 2), 2, seed=3)
    assert isinstance(pair, tuple)
    assert split(pair, "").server(*split(pair, "").client(torch.ones(5, 1, 2, 2))).shape == (5, 2)


def test_errors_of_a_function_of_ones_own(own: str) -> None:
    def text(function: str) -> str:
        return refusal(f"{own}:{function}").removeprefix(f"model.name '{own}:{function}': expected ")

    assert text("number") == (
        "an nn.Module, or a pair of them (client half, server half), found int; return the network itself"
    )
    assert text("wrong_classes") == (
        "an output of (2, 2) for 2 samples, found (2, 3); end with one value per class"
    )
    assert text("wrong_shape").startswith("a forward pass of (2, 1, 2, 2), found RuntimeError: mat1 and mat2")
    assert text("broken") == (
        "a function that can be called with ((1, 2, 2), 2), found KeyError: 'oops'; correct the function"
    )
    assert text("pairs") == f"a function 'pairs' in '{own}', found none; did you mean 'pair'?"
    assert refusal("no_such_module_here:net") == (
        "model.name 'no_such_module_here:net': expected a module 'no_such_module_here' that can be imported, found "
        "ModuleNotFoundError: No module named 'no_such_module_here'; run from the module's directory, or install it"
    )


VOLUMES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 3, padding=1)
        self.stem.requires_grad_(False)  # as one that was trained before
        self.low = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten())
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.top = nn.Linear(4, classes)

    def forward(self, x):
        return self.top(self.other(self.one(self.pool(self.low(self.stem(x))))))

def net(sample_shape, classes):
    return Net(classes)

def data():
    torch.manual_seed(0)
    made = [(torch.rand(1, 4, 5, 6), i % 2) for i in range(24)]
    return made, made
"""


@pytest.mark.parametrize("method", ["decoupled", "conventional", "centralized"])
def test_volumes_frozen_layers_and_tied_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """What other people's networks have: 5-D weights, a frozen stem, two names for one weight."""
    name = f"volumes_{method}"
    (tmp_path / f"{name}.py").write_text(VOLUMES)
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(f"{name}:net", None if method == "centralized" else "low")
    recipe = TrainConfig(epochs=1, batch_size=8, threads=1)
    train(Config(method=method, data=DataConfig(f"{name}:data"), model=model, train=recipe, out="run"))
    file, part = ("whole", "whole.") if method == "centralized" else ("client-0", "client_half.")
    saved = load_file(tmp_path / "run" / f"{file}.safetensors")
    start = build_model(f"{name}:net", (1, 4, 5, 6), 2, seed=0)
    assert isinstance(start, nn.Module)
    before = start.state_dict()
    assert torch.equal(saved[f"{part}stem.weight"], before["stem.weight"])
    assert not torch.equal(saved[f"{part}low.0.weight"], before["low.0.weight"])
    upper = saved if method == "centralized" else load_file(tmp_path / "run" / "server.safetensors")
    names = [key for key in upper if key.endswith((".one.weight", ".other.weight"))]
    assert len(names) == 2
    assert torch.equal(*(upper[key] for key in names))


def test_a_wrong_name_gets_the_near_miss_and_the_choices() -> None:
    choices = ", ".join([*MODELS, "module:function"])
    assert refusal("resnet-20") == f"model.name: expected one of {choices}, found 'resnet-20'; did you mean 'resnet20'?"
    assert refusal("vgg").endswith("found 'vgg'; use one of those")


def test_samples_that_are_no_images_are_refused() -> None:
    assert refusal("resnet20", (64,)) == (
        "model.name 'resnet20': expected samples (channels, height, width), found samples of shape (64,); "
        "choose a network for such samples, e.g. your own as module:function"
    )
