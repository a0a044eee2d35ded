"""Every head fits every cut shape it says it fits, trains all of itself, and depends on the seed alone.

The authors' released head was replaced after its optimizer had been built, and layers of it were never called:
here every parameter must get a gradient.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from halfpass.config import Config, ModelConfig
from halfpass.errors import InputError
from halfpass.networks.heads import HEADS, FlatLinear, build_head
from halfpass.run.network import build_network

IMAGES = [(16, 8, 8), (3, 5, 7), (8, 1, 1), (4, 1, 6)]
FITTING = [
    *((name, shape) for name in HEADS for shape in IMAGES),
    *((name, (5, 6)) for name in ("linear", "pooled-linear", "mlp")),
    *((name, (6,)) for name in ("linear", "mlp")),
]


def refusal(name: str, cut_shape: tuple[int, ...]) -> str:
    with pytest.raises(InputError) as error:
        build_head(name, cut_shape, 3, seed=0)
    return str(error.value)


@pytest.mark.parametrize(("name", "cut_shape"), FITTING)
def test_every_parameter_is_trained(name: str, cut_shape: tuple[int, ...]) -> None:
    head = build_head(name, cut_shape, 3, seed=0)
    assert head.training
    torch.manual_seed(0)
    z = torch.randn(4, *cut_shape) + 1
    before = z.clone()
    out = head(z)
    assert out.shape == (4, 3)
    (out * torch.randn(4, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert torch.equal(z, before)  # the same tensor crosses afterwards


def test_sizes_by_hand() -> None:
    """The paper's middle cut, 32×16×16, to 10 classes."""
    count = {name: sum(p.numel() for p in build_head(name, (32, 16, 16), 10, 0).parameters()) for name in HEADS}
    assert count == {
        "linear": 32 * 16 * 16 * 10 + 10,
        "pooled-linear": 32 * 8 * 8 * 10 + 10,
        "mlp": 128 * 128 + 128 + 128 * 10 + 10,
        "conv": 32 * 64 * 9 + 64 * 64 * 9 + 2 * 2 * 64 + 64 * 10 + 10,
        "tail": 32 * 64 * 9 + 64 * 64 * 9 + 2 * 2 * 64 + 64 * 10 + 10,
        "conv-2": 32 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 2 * 64 + 64 * 10 + 10,
        "tail-2": 32 * 64 * 9 + 3 * 64 * 64 * 9 + 4 * 2 * 64 + 64 * 10 + 10,
        "tail-3": 32 * 64 * 9 + 5 * 64 * 64 * 9 + 6 * 2 * 64 + 64 * 10 + 10,
    }


def strides(name: str, cut_shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Channels and stride of a head's blocks."""
    blocks = [layer for layer in build_head(name, cut_shape, 10, 0) if hasattr(layer, "conv_1")]
    return [(block.conv_2.out_channels, block.conv_1.stride[0]) for block in blocks]


def test_a_tail_has_blocks_for_each_stage_above_the_cut() -> None:
    """As many halvings as there are to 8×8 pixels; blocks of the same width where there is none, unlike `conv`."""
    assert strides("tail", (16, 32, 32)) == [(32, 2), (64, 2)]
    assert strides("tail-3", (16, 32, 32)) == [(32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)]
    assert strides("tail-2", (32, 16, 16)) == strides("conv-2", (32, 16, 16)) == [(64, 2), (64, 1)]
    assert (strides("tail-2", (64, 8, 8)), strides("tail", (64, 4, 4))) == ([(64, 1), (64, 1)], [(64, 1)])
    assert strides("conv-2", (64, 8, 8)) == [(128, 2), (128, 1)]
    assert strides("tail", (8, 40, 17)) == [(16, 2), (32, 2), (64, 2)]


def test_tail_2_at_the_deep_cut_is_the_server_half() -> None:
    """ResNet-20 behind stage_3.0: what the client half learns from there is what the server half does with it."""
    network = build_network(Config(model=ModelConfig("resnet20", "stage_3.0", "tail-2")), (3, 32, 32), 10)
    head, server = ([p.shape for p in half.parameters()] for half in (network.head, network.halves.server))
    assert head == server


def test_pooled_linear_averages_squares_and_neighbouring_tokens() -> None:
    for shape in ((1, 2, 2), (2, 1)):
        pooled = build_head("pooled-linear", shape, 2, seed=0)
        values = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(1, *shape)
        assert torch.equal(pooled[0](values).flatten(1), values.mean().view(1, 1))


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = build_head("conv", (4, 4, 4), 3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    again, other = (build_head("conv", (4, 4, 4), 3, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first[-1].weight, other[-1].weight)
    assert torch.equal(first[0].norm_1.running_var, torch.ones(8))


def test_a_head_that_does_not_fit_is_refused() -> None:
    assert refusal("conv", (64,)) == (
        "model.head 'conv': expected a cut of shape (channels, height, width), found (64,); "
        "take another head (linear, mlp), or cut elsewhere"
    )
    assert refusal("pooled-linear", (64,)) == (
        "model.head 'pooled-linear': expected a cut of shape (tokens, features) or (channels, height, width), "
        "found (64,); take another head (linear, mlp), or cut elsewhere"
    )


def test_a_wrong_name_gets_the_near_miss() -> None:
    assert refusal("pooled_linear", (6,)) == (
        "model.head: expected one of linear, pooled-linear, mlp, conv, conv-2, tail, tail-2, "
        "tail-3, module:function, found 'pooled_linear'; "
        "did you mean 'pooled-linear'?"
    )


def test_a_head_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_heads.py").write_text(
        "from torch import nn\n"
        "def fits(cut_shape, classes): return nn.Linear(cut_shape[0], classes)\n"
        "def wide(cut_shape, classes): return nn.Linear(cut_shape[0], classes + 1)\n"
        "def fails(cut_shape, classes): return nn.Linear(cut_shape[0] + 1, classes)\n"
        "def none(cut_shape, classes): pass\n"
    )
    head = build_head("own_heads:fits", (6,), 3, seed=0)
    assert isinstance(head, nn.Linear)
    assert torch.equal(head.weight, build_head("own_heads:fits", (6,), 3, seed=0).weight)
    assert refusal("own_heads:wide", (6,)) == (
        "model.head 'own_heads:wide': expected an output of (2, 3) for 2 samples, found (2, 4); "
        "end with one value per class"
    )
    assert refusal("own_heads:fails", (6,)).startswith(
        "model.head 'own_heads:fails': expected a forward pass of (2, 6), found RuntimeError: mat1 and mat2 shapes"
    )
    assert refusal("own_heads:none", (6,)) == (
        "model.head 'own_heads:none': expected an nn.Module, found NoneType; return the head itself"
    )


def test_flat_linear_is_nn_linear_with_a_learning_rate_divided_by_the_positions():
    """The same function and steps as the plain layer; at the network's own rate the plain one would differ."""
    torch.manual_seed(0)
    scaled = FlatLinear(32 * 16, 16, 10)
    assert not scaled.linear.weight.any()
    nn.init.normal_(scaled.linear.weight, std=0.1)
    z, y = torch.randn(8, 32, 4, 4).relu() + 0.3, torch.randint(0, 10, (8,))
    plain = {rate: nn.Sequential(nn.Flatten(), nn.Linear(32 * 16, 10)) for rate in (0.1 / 16, 0.1)}
    for layer in plain.values():
        layer[1].load_state_dict({"weight": scaled.linear.weight / 4, "bias": scaled.linear.bias})
    assert torch.allclose(scaled(z), plain[0.1](z), atol=1e-6)
    for head, parameters in [
        (scaled, [{"params": scaled.parameters(), "lr": 0.1}]),
        *((p, [{"params": p[1].weight, "lr": rate}, {"params": p[1].bias, "lr": 0.1}]) for rate, p in plain.items()),
    ]:
        optimizer = torch.optim.SGD(parameters, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(z), y).backward()
            optimizer.step()
    assert torch.allclose(scaled(z), plain[0.1 / 16](z), atol=1e-4)
    assert not torch.allclose(scaled(z), plain[0.1](z), atol=1e-1)
