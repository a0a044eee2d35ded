"""client → edge → server: two cuts, two one-way wires."""

import dataclasses
import json

import pytest
import torch
from plain import HandCut, equal
from runtimes import rows_of, train_in_both_runtimes
from safetensors.torch import load_file
from small import SGD, config, plain_batches, shards
from torch import nn
from torch.nn.functional import cross_entropy

from halfpass.algorithm.edge import EdgeHalf
from halfpass.commands.cli import main
from halfpass.commands.export import export
from halfpass.config import ClientsConfig, Config, ModelConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.networks.models import build_model
from halfpass.networks.split import split_twice
from halfpass.report import tables
from halfpass.report.runs import read_run, summary
from halfpass.run.local import train_local
from halfpass.run.network import above_edge, build_network
from halfpass.run.records import RunFolder


class ThreeParts(HandCut):
    def __init__(self):
        super().__init__()
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x):
        return self.classifier(self.above(self.middle(self.below(x))))


def three_parts(sample_shape, classes):
    return ThreeParts()


class Skipping(nn.Module):
    """What leaves `first` is alive across both cuts."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x)
        return self.third(self.second(x) + x)


@pytest.mark.parametrize(("lower", "upper"), [("stem", "stage_1.0"), ("stage_1.1.conv_1", "stage_2.0.norm_1"), ("stage_1.2", "pool")])
@pytest.mark.parametrize("mode", [True, False])
def test_three_parts_are_the_whole(lower, upper, mode):
    model = build_model("resnet20", (3, 16, 16), 10, seed=0).train(mode)
    halves, between, _ = split_twice(model, lower, upper)
    x = torch.randn(4, 3, 16, 16)
    out = halves.server(*between(*halves.client(x)))
    assert torch.equal(out, model(x))
    parts = [part.state_dict() for part in (halves.client, between, halves.server)]
    assert sorted(name for state in parts for name in state) == sorted(model.state_dict())
    assert equal({name: value for state in parts for name, value in state.items()}, model.state_dict())  # statistics too


def test_what_crosses_both_cuts_is_copied():
    """Its memory is the wire's, which decodes the next batch into it."""
    halves, between, _ = split_twice(Skipping(), "first", "second")
    half = EdgeHalf(between, nn.Linear(5, 3))
    crossing = halves.client(torch.randn(2, 4))
    half(*crossing)
    assert [torch.equal(kept, crossing[0]) for kept in half.crossing] == [False, True]
    kept = half.crossing[1].clone()
    crossing[0].data.zero_()
    assert torch.equal(half.crossing[1], kept)


def test_a_chain_is_one_module_with_detach_at_both_cuts(data, tmp_path):
    settings = config(schedule="constant", model="test_edge:three_parts")
    settings = dataclasses.replace(settings, out=str(tmp_path), model=dataclasses.replace(settings.model, edge_cut="middle"))
    network = build_network(settings, data.train.sample_shape, data.classes)
    upper = build_network(above_edge(settings), data.train.sample_shape, data.classes)
    model, (low, high) = ThreeParts(), (network.head, upper.head)
    model.load_state_dict(upper.halves.client.state_dict() | upper.halves.server.state_dict())
    model, low, high = (part.to(memory_format=torch.channels_last) for part in (model, low, high))
    parameters = [*model.parameters(), *low.parameters(), *high.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, fused=True, **SGD)
    train_local(settings, RunFolder.create(tmp_path, settings), data, shards(data, [64]), network)
    for x, y in plain_batches(data):
        z = model.below(x)
        u = model.middle(z.detach())
        logits = model.classifier(model.above(u.detach()))
        optimizer.zero_grad()
        (cross_entropy(low(z), y) + cross_entropy(high(u), y) + cross_entropy(logits, y)).backward()
        optimizer.step()
    saved = load_file(tmp_path / "edge" / "client-0.safetensors") | {
        f"{owner}.{name}": value for owner in ("edge", "top")
        for name, value in load_file(tmp_path / ("edge" if owner == "edge" else "") / "server.safetensors").items()
    }  # fmt: skip
    state = model.state_dict()
    expected = {f"auxiliary_head.{name}": value for name, value in low.state_dict().items()}
    expected |= {f"edge.server_half.head.{name}": value for name, value in high.state_dict().items()}
    for name, value in state.items():
        part = {"below": "client_half.", "middle": "edge.server_half.between."}.get(name.partition(".")[0], "top.server_half.")
        expected[part + name] = value
    assert equal(saved, expected)


CHAIN = Config(
    model=ModelConfig("digits-cnn", "block_1", edge_cut="block_3"), clients=ClientsConfig(2, rounds=3, partition="dirichlet", alpha=1.0),
    train=TrainConfig(epochs=2, batch_size=64, threads=1, micro_batch=24),
    wire=WireConfig(codec="int8", every=2, timeout=20), server=ServerConfig(replay=2),
)  # fmt: skip


def test_a_chain_of_processes_does_what_it_does_in_one(tmp_path, capsys):
    """Two clients of unequal size in three rounds, of whose batches every second goes up; in micro-batches; both servers
    use each upload twice. And a new top server half comes from what the old one was sent."""
    owners = ("edge/client-0", "edge/client-1", "edge/server", "server")
    outcomes = train_in_both_runtimes(CHAIN, tmp_path, owners)
    links = {
        runtime: [json.loads((tmp_path / runtime / part / "result.json").read_text()) for part in ("edge", ".")]
        for runtime in outcomes
    }
    for edge, top in links.values():
        assert (edge["cut"], edge["edge_cut"], top["cut"], top["edge_cut"]) == ("block_1", "block_3", "block_3", None)
        assert top["aux_test_accuracy"] == edge["test_accuracy"]
        assert top["test_accuracy"] > 0.5
        for link in (edge, top):
            assert link["bytes"]["down"]["gradients"] == 0
            assert link["evaluation_bytes"]["down"] > 0
        assert top["bytes"]["up"]["labels"] == edge["bytes"]["up"]["labels"]
        assert 0.4 < top["bytes"]["up"]["activations"] / edge["bytes"]["up"]["activations"] < 0.6  # 64×4×4 and 32×8×8
    for local, processes in zip(*links.values(), strict=True):
        assert local["test_accuracy"] == processes["test_accuracy"]
        assert {k: local["bytes"]["up"][k] for k in ("activations", "labels")} == {
            k: processes["bytes"]["up"][k] for k in ("activations", "labels")
        }  # fmt: skip
    together = export(tmp_path / "processes", with_head=True)  # the edge's head
    assert together.accuracy == pytest.approx(outcomes["processes"]["joint_test_accuracy"], abs=0.02)
    for part, link in (("edge", "client → edge"), (".", "edge → server")):
        told = summary(read_run(tmp_path / "local" / part))
        assert (told["link"], tables.markdown_table([told]).splitlines()[2][:28]) == (link, f"| decoupled ({link}) |"[:28])
    assert main(["retrain", str(tmp_path / "processes"), "--out", str(tmp_path / "again")]) == 0
    old, new = (load_file(tmp_path / run / "server.safetensors") for run in ("processes", "again"))
    assert {name: value.shape for name, value in new.items()} == {name: value.shape for name, value in old.items()}
    assert json.loads((tmp_path / "again" / "result.json").read_text())["test_accuracy"] > 0.5
    exported = export(tmp_path / "processes", 0, None)
    assert exported.accuracy == pytest.approx(outcomes["processes"]["test_accuracy"], abs=0.02)  # through codec int8


def test_a_chain_within_budgets_does_what_it_does_in_one(tmp_path):
    """Clients of unequal size, each with a budget of its own, skip different batches; the first epoch is not tested."""
    batch = 64 * (32 * 64 * 4 + 8)
    settings = dataclasses.replace(
        CHAIN, clients=ClientsConfig(2, partition="dirichlet", alpha=1.0),
        train=TrainConfig(epochs=3, test_every=2, batch_size=64, threads=1),
        wire=WireConfig(budget=12 * batch, timeout=20), server=ServerConfig(),
    )  # fmt: skip
    train_in_both_runtimes(settings, tmp_path, ("edge/client-0", "edge/client-1", "edge/server", "server"))
    for runtime in ("local", "processes"):
        below, top = (rows_of(tmp_path / runtime / part) for part in ("edge", "."))
        sent = [sum(row["steps"] for row in rows if row["process"] == "server") for rows in (below, top)]
        steps = [sum(row["steps"] for row in below if row["process"] == f"client-{k}") for k in (0, 1)]
        assert sent[0] == sent[1] < sum(steps)
        assert steps[0] != steps[1]
        for rows, name in ((below, "server"), (below, "client-0"), (top, "server"), (top, "client-0")):
            key = "test_accuracy" if name == "server" else "aux_test_accuracy"
            assert [row[key] is not None for row in rows if row["process"] == name] == [False, True, True], name
        tested = json.loads((tmp_path / runtime / "result.json").read_text())["evaluation_bytes"]["up"]
        assert tested == pytest.approx(2 * 360 * (64 * 4 * 4 * 4 + 1 + 2 * 10), rel=0.002)  # test samples of digits


@pytest.mark.parametrize(("words", "said"), [
    (["train", "--method", "conventional", "--model.edge_cut", "block_3"], "model.edge_cut: expected its default with method conventional, whose every step needs its own gradient back, found block_3;"),
    (["train", "--model.edge_cut", "block_3", "--train.feedback_every", "2"], "model.edge_cut: expected no gradient back, found train.feedback_every;"),
    (["train", "--model.edge_cut", "block_1"], "model.edge_cut 'block_1': expected a layer behind block_2, found one that is not;"),
    (["train", "--model.edge_cut", "block_9"], "model.edge_cut 'block_9': expected"),
    (["train", "--model.edge_cut", "block_3", "--server.store", "s"], "server.store: expected its default with model.edge_cut"),
    (["serve", "--above", "127.0.0.1:1"], "--above: expected a run with model.edge_cut, found none; give both, or neither"),
])  # fmt: skip
def test_what_is_no_chain_is_refused(tmp_path, capsys, words, said):
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
