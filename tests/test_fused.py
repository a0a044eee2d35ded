"""BatchNorm, addition and ReLU in one, against the three modules themselves."""

import copy

import pytest
import torch
from torch import nn

from halfpass.algorithm.edge import EdgeHalf
from halfpass.arithmetic import fused
from halfpass.arithmetic.fused import NormRelu, check_compiler, fuse
from halfpass.errors import InputError
from halfpass.networks.heads import build_head
from halfpass.networks.models import build_model
from halfpass.networks.split import split, split_twice


@pytest.fixture
def plain_kernels(monkeypatch):
    """The kernels' formulas by PyTorch's own operations: to compile takes a second each."""
    monkeypatch.setattr(fused, "_kernel", lambda function: function)


def pictures(batch, channels=5, height=3, width=7, seed=0):
    """With a mean far from 0, which a careless variance drowns in, and another one in each channel."""
    values = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
    return 3 * values + torch.arange(channels).view(-1, 1, 1) * 20


def fresh_norm():
    norm = nn.BatchNorm2d(5, momentum=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm


def step(function, norm, x, other):
    """Output and all gradients of one batch; `other` is given to both sides of it, but only added where asked for."""
    norm.zero_grad()
    x, other = (tensor.clone(memory_format=torch.channels_last).requires_grad_() for tensor in (x, other))
    out = function(x, other)
    (out.float() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, other.grad, norm.weight.grad, norm.bias.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [False, True])
def test_kernels_compute_what_the_modules_do(dtype, adds):
    plain = fresh_norm()
    ours = NormRelu.of(copy.deepcopy(plain))
    for batch in (6, 6, 4):  # the last one smaller, as in an epoch
        x, other = (pictures(batch, seed=seed).to(dtype) for seed in (batch, 100))
        added = other if adds else None
        expected = step(lambda x, other: torch.relu(plain(x) + (other if adds else 0)), plain, x, other - other.mean())
        found = step(lambda x, other: ours(x, other if adds else None), ours, x, other - other.mean())
        assert (added is None) == (found[2] is None)
        for ours_is, plain_is in zip(found, expected, strict=True):
            if ours_is is not None:
                assert ours_is.dtype == plain_is.dtype
                tolerance = 1e-3 if dtype == torch.float32 else 2e-2
                assert (ours_is.float() - plain_is.float()).abs().max() <= tolerance * plain_is.float().abs().max()
    assert torch.allclose(ours.running_mean, plain.running_mean, rtol=1e-4)
    assert torch.allclose(ours.running_var, plain.running_var, rtol=1e-3)
    assert ours.num_batches_tracked == plain.num_batches_tracked == 3
    assert not torch.allclose(ours.running_var, torch.ones(5), rtol=1e-1)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("used", [(1, 0), (0, 1), (1, 2)])
def test_two_outputs_take_the_sum_of_their_gradients(adds, used):
    """Of which one may not be used at all."""
    plain = fresh_norm()
    ours = NormRelu.of(copy.deepcopy(plain))
    x = pictures(6).to(torch.bfloat16)
    expected = step(lambda x, other: sum(used) * torch.relu(plain(x) + (other if adds else 0 * other)), plain, x, -x.mean() + x)

    def of_both(x, other):
        outputs = ours(x, other if adds else None, twice=True)
        return sum(times * out for times, out in zip(used, outputs, strict=True) if times) + 0 * other

    found = step(of_both, ours, x, -x.mean() + x)
    for ours_is, plain_is in zip(found, expected, strict=True):
        assert (ours_is.float() - plain_is.float()).abs().max() <= 2e-2 * plain_is.float().abs().max()


def test_it_evaluates_as_the_modules_do_bit_for_bit(plain_kernels):
    model = build_model("resnet20", (3, 32, 32), 10, seed=0)
    x = torch.randn(4, 3, 32, 32)
    model(x)  # running statistics of its own
    assert torch.equal(fuse(copy.deepcopy(model)).eval()(x), model.eval()(x))


def test_a_fused_network_learns_the_same(plain_kernels):
    plain = build_model("resnet20", (3, 32, 32), 10, seed=0)
    ours = fuse(plain)
    assert sum(type(module) is NormRelu for module in ours.modules()) == 19
    assert sum("twice" in node.kwargs for node in ours.graph.nodes) == 7  # all blocks but those before another width
    assert ours.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for network in (plain, ours):
        network(x).logsumexp(1).sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-2, atol=1e-4 * one.grad.abs().max()), name
    assert torch.allclose(plain.stem[1].running_var, ours.get_submodule("stem.1").running_var, rtol=1e-4)


def test_halves_and_heads_are_fused_and_stay_what_they_are(plain_kernels):
    halves = split(build_model("resnet20", (3, 32, 32), 10, seed=0), "stage_2.1.conv_2")
    head = build_head("tail", (32, 16, 16), 10, seed=0)
    for module, count in ((halves.client, 10), (halves.server, 9), (head, 2)):
        names = list(module.state_dict())
        ours = fuse(module)
        assert sum(type(part) is NormRelu for part in ours.modules()) == count
        assert list(ours.state_dict()) == names
    assert len(halves.client(torch.randn(2, 3, 32, 32))) == 2  # the shortcut crosses, too


class Chain(nn.Module):
    """BatchNorm and ReLU, in the way that `forward` puts them together."""

    def __init__(self, forward):
        super().__init__()
        self.conv, self.norm, self.relu, self.drop = nn.Conv2d(3, 5, 1), fresh_norm(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.way = forward

    def forward(self, x):
        return self.way(self, self.conv(x))


def add_in_place(self, x):
    out = self.norm(x)
    out += x
    return self.relu(out)


def add_to_the_shortcut(self, x):
    twice = x * 2
    twice += self.norm(x)
    return self.relu(twice) + twice


def used_twice(self, x):
    out = self.norm(x)
    return self.relu(out) + out


def sum_used_twice(self, x):
    out = self.norm(x) + x
    return torch.relu(out) + out


def with_itself(self, x):
    out = self.norm(x)
    return torch.relu(out + out)


def called_twice(self, x):
    return torch.relu(self.norm(x)) + self.norm(x)


def two_norms_of_one(self, x):
    return torch.relu(self.norm(x) + torch.relu(self.norm(x + 1)))


def one_sum_of_two(self, x):
    return torch.relu(self.norm(x) + self.norm(x + 1))


def plus_a_number(self, x):
    return torch.relu(self.norm(x) + x.size(0))


def by_name(self, x):
    return self.relu(self.norm(input=x))


@pytest.mark.parametrize(("way", "count"), [
    (lambda self, x: self.relu(self.norm(x)), 1), (lambda self, x: torch.relu(x + self.norm(x)), 1), (add_in_place, 1),
    (two_norms_of_one, 1), (add_to_the_shortcut, 0), (used_twice, 0), (sum_used_twice, 0), (with_itself, 0),
    (called_twice, 0), (one_sum_of_two, 0), (plus_a_number, 1), (by_name, 0), (lambda self, x: torch.relu(self.norm(x) + 1), 0), (lambda self, x: self.norm(x), 0),
])  # fmt: skip
def test_only_what_means_the_same_is_replaced(way, count, plain_kernels):
    plain = Chain(way)
    ours = fuse(copy.deepcopy(plain))
    assert sum(type(module) is NormRelu for module in ours.modules()) == count
    x = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        assert torch.allclose(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(ours.norm.running_var, plain.norm.running_var, rtol=1e-4)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5, affine=False), nn.BatchNorm2d(5, bias=False), nn.BatchNorm2d(5, track_running_stats=False), nn.GroupNorm(1, 5)])
def test_other_norms_are_left_alone(norm):
    ours = fuse(nn.Sequential(norm, nn.ReLU()))
    assert not any(type(module) is NormRelu for module in ours.modules())


def test_what_cannot_be_traced_is_left_alone_and_modes_are_followed(plain_kernels):
    assert fuse(only_relu := nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())) is only_relu
    untraceable = Chain(lambda self, x: self.relu(self.norm(x)) if x.sum() > 0 else x)
    assert fuse(untraceable) is untraceable
    ours = fuse(Chain(lambda self, x: self.drop(self.relu(self.norm(x)))))
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(ours.eval()(x), ours(x))
    assert not torch.equal(ours.train()(x), ours(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_computed_by_the_modules(dtype):
    plain = fresh_norm().to(dtype)
    ours, x = NormRelu.of(copy.deepcopy(plain)), pictures(4).to(dtype)
    assert torch.equal(ours(x, x), torch.relu(plain(x) + x))


class OfTwo(nn.Module):
    """Its second input is not always given."""

    def __init__(self):
        super().__init__()
        self.norm = fresh_norm()

    def forward(self, x, skip=None):
        return torch.relu(self.norm(x) if skip is None else self.norm(x) + skip)


class OfAny(OfTwo):
    def forward(self, *tensors):
        return super().forward(*tensors)


class Frozen(Chain):
    def train(self, mode=True):
        return super().train(False)


def test_what_a_trace_would_lose_is_left_alone():
    spare = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
    spare.register_buffer("unused", torch.zeros(1))
    for module in (OfTwo(), OfAny(), Frozen(lambda self, x: self.relu(self.norm(x))), spare):
        assert fuse(module) is module


def test_an_edge_is_fused_part_by_part(plain_kernels):
    halves, between, _ = split_twice(build_model("resnet20", (3, 32, 32), 10, seed=0), "stage_1.0", "stage_2.1")
    edge = EdgeHalf(fuse(between), fuse(build_head("tail", (32, 16, 16), 10, seed=0)))
    assert sum(type(module) is NormRelu for module in edge.modules()) == 8 + 2
    edge(*halves.client(torch.randn(2, 3, 32, 32)))
    assert len(edge.crossing) == 1


def test_without_a_compiler_it_says_so(monkeypatch):
    def compile_nothing(*_, **__):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with pytest.raises(InputError) as caught:
        check_compiler.__wrapped__()
    assert str(caught.value) == (
        "train.compile: expected a C++ compiler for torch.compile, found RuntimeError: No working C++ compiler found; "
        "install g++ and Python's header files, or leave it out"
    )
