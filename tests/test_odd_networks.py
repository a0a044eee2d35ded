"""Networks with a peculiarity: one module under two names, a layer called as the head is, and what cannot be trained,
which is refused with its cause."""

import copy

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune, weight_norm

from halfpass import (
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    WireConfig,
    build_head,
    build_model,
    export,
    join_state,
    joint,
    split,
    train,
)
from halfpass.errors import InputError
from halfpass.networks.models import check_output
from halfpass.run import setup

SHAPE = (1, 8, 8)


class Odd(nn.Module):
    """`alias` is `last` once more, a layer has the name of the head, and one is never used."""

    def __init__(self):
        super().__init__()
        self.auxiliary_head = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
        self.last = nn.Linear(8, 10)
        self.alias = self.last
        self.never = nn.Linear(2, 3)

    def forward(self, x):
        return self.alias(self.auxiliary_head(x).relu())


class Mute(Odd):
    def train(self, mode=True):
        super().train(mode)


def layers(change):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    change(net)
    return net


NETWORKS = {
    "odd": Odd,
    "mute": Mute,
    "double": lambda: layers(lambda net: net[1].double()),
    "complex": lambda: layers(lambda net: setattr(net, "phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))),
    "pruned": lambda: layers(lambda net: prune.l1_unstructured(net[1], "weight", 0.5)),
    "normed": lambda: layers(lambda net: weight_norm(net[3])),
    "pair": lambda: (nn.Flatten(), nn.Sequential(nn.Linear(64, 10)).double()),
    "norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)),
}


def __getattr__(name):
    if name not in NETWORKS:
        raise AttributeError(name)
    return lambda shape, classes: NETWORKS[name]()


REMEDY = "make it one: prune.remove, or parametrizations.weight_norm instead of weight_norm"


@pytest.mark.parametrize(("name", "said"), [
    ("mute", ", train(): expected the module returned, found NoneType; end it with return self"),
    ("double", ": expected parameters of 32 or 16 bits, found 1.weight of torch.float64; call .float()"),
    ("pair", ": expected parameters of 32 or 16 bits, found 0.weight of torch.float64; call .float()"),
    ("complex", ": expected parameters of 32 or 16 bits, found phase of torch.complex64; keep two real ones, and view_as_complex in forward"),
    ("pruned", f": expected tensors that are parameters or buffers, found 1.weight, computed from others as by pruning or weight_norm; {REMEDY}"),
    ("normed", f": expected tensors that are parameters or buffers, found 3.weight, computed from others as by pruning or weight_norm; {REMEDY}"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_cannot_be_trained_is_refused_with_its_cause(name, said):
    with pytest.raises(InputError) as refused:
        build_model(f"test_odd_networks:{name}", SHAPE, 10, 0)
    assert str(refused.value) == f"model.name 'test_odd_networks:{name}'{said}"


def test_a_pruned_network_made_permanent_is_taken():
    net = NETWORKS["pruned"]()
    prune.remove(net[1], "weight")
    assert split(net, "2").server is not None


def settings(name, cut, out=None, **recipe):
    return Config(
        data=DataConfig(limit=64), model=ModelConfig(f"test_odd_networks:{name}", cut), out=out,
        train=TrainConfig(epochs=1, threads=1, lr=0.05, **recipe),
    )  # fmt: skip


def test_batch_norm_and_batches_of_one():
    with pytest.raises(InputError) as refused:
        setup.prepare(settings("norm", "1", batch_size=1))
    assert str(refused.value) == (
        "train.batch_size: expected at least 2, found 1, and BatchNorm, which needs several values per channel; choose larger batches"
    )
    setup.prepare(settings("odd", "auxiliary_head", batch_size=1))
    setup.prepare(settings("norm", "1", batch_size=2))


def test_a_budget_below_one_batch_is_refused(tmp_path):
    def prepared(codec, budget):
        return setup.prepare(Config(wire=WireConfig(codec=codec, budget=budget)))

    for codec, least in (("none", 1048741), ("int8", 282800)):
        with pytest.raises(InputError) as refused:
            prepared(codec, 1000)
        found = int(str(refused.value).split()[4])
        assert str(refused.value) == (
            f"wire.budget: expected at least {found} bytes, one batch at this cut, found 1000; raise it or choose smaller batches"
        )
        assert abs(found - least) < 0.1 * least
        prepared(codec, found)


def test_the_joined_state_has_every_name_of_the_network():
    net = Odd()
    halves = split(net, "auxiliary_head")
    states = halves.client.state_dict(), halves.server.state_dict()
    state = join_state(*states, net)
    other = Odd()
    other.load_state_dict(state, strict=True)
    x = torch.rand(3, *SHAPE)
    assert torch.equal(other(x), net(x))
    assert len(state) == len(net.state_dict())
    assert len(join_state(*states)) < len(state)


def test_the_head_beside_a_layer_of_its_name():
    halves = split(Odd(), "auxiliary_head")
    head = build_head("linear", (8,), 10, 0)
    both = joint(halves, head)
    state = copy.deepcopy(both.state_dict())
    assert {name for name in state if name.startswith("auxiliary_head_.")} == {f"auxiliary_head_.{name}" for name in head.state_dict()}
    with torch.no_grad():
        for p in both.parameters():
            p.add_(1.0)
    assert both.load_state_dict(state, strict=True).missing_keys == []
    assert all(torch.equal(value, state[name]) for name, value in both.state_dict().items())


def test_export_loads_strictly_into_the_users_network(tmp_path):
    train(settings("odd", "auxiliary_head", tmp_path / "run", batch_size=16))
    exported = export(tmp_path / "run")
    Odd().load_state_dict(load_file(exported.file), strict=True)
    assert exported.accuracy == exported.reported
    with_head = export(tmp_path / "run", with_head=True)
    assert with_head.accuracy == with_head.reported
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["out"] == str(tmp_path / "run")


class FirstBatch(nn.Module):
    """Sets its scale by the first batch that it sees, as ActNorm does (Kingma and Dhariwal 2018, arXiv 1807.03039)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("settled", torch.tensor(0))

    def forward(self, x):
        if self.settled == 0:
            with torch.no_grad():
                self.scale.copy_(1 / x.std(0))
                self.settled.fill_(1)
        return x * self.scale


def test_trying_a_network_settles_nothing_in_it():
    net = nn.Sequential(nn.Linear(6, 6), FirstBatch(), nn.Linear(6, 3))
    check_output("here", net, torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), (3,))
    assert net[1].settled == 0
    assert torch.equal(net[1].scale, torch.ones(6))
