"""Runs that go on with those clients that are there: their weights and schedules, by a loop by hand; who was absent when."""

import copy
import dataclasses
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from plain import equal
from safetensors.torch import load_file
from small import SGD, config, plain_start, shards
from torch.nn.functional import cross_entropy

from halfpass.config import ClientsConfig, Config, DataConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.data.batches import train_batches
from halfpass.errors import PassedOnError, RunError
from halfpass.run import admission, client_process, replay, server_process, setup
from halfpass.run.children import Left
from halfpass.run.client_process import ClientRun
from halfpass.run.local import LocalRun
from halfpass.run.metrics import ServerFigures
from halfpass.run.network import build_network
from halfpass.run.overview import Overview
from halfpass.run.rounds import turns
from halfpass.run.server_process import ServerRun
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Connection
from halfpass.wire.hub import ClientLost, Received
from halfpass.wire.hub import Hub as WireHub
from halfpass.wire.messages import read_batch, write_weights
from halfpass.wire.service import Anew

COUNTS, EPOCHS, SIZE, PEAK = (32, 16, 16), 4, 8, 0.05  # samples of each client; batches of 8


class Wire:
    """A connection to the hub below, which has what is sent at once."""

    def __init__(self):
        self.incoming = []

    def send_in_turn(self, make):
        self.incoming += make()


class Hub:
    """Clients that do at once what they are told, of which some are absent in some turns, by (epoch, turn); and of which
    one is `lost`, as (epoch, turn), after so many batches of it."""

    def __init__(self, settings, data, network, absent, lost):
        self.absent, self.lost, self.now, self.gone = absent, lost, (0, 0), set(absent.get((0, 0), ()))
        self.joins = {}
        self.runs = [
            ClientRun(settings, Wire(), setup.build_client(settings, network, k), data, shard, network.task)
            for k, shard in enumerate(shards(data, COUNTS))
        ]
        self.meet()

    def meet(self):
        """Who is there now, and was not, begins anew."""
        there = set(range(len(self.runs))) - set(self.absent.get(self.now, ()))
        for k in there:
            run = self.runs[k]
            self.joins[k] = pb.Join(client=k, samples=COUNTS[k], steps=run._steps)
            if k in self.gone:
                run._order, run._epoch, run._anew = None, None, True
        self.gone = set(range(len(self.runs))) - there

    def present(self, client):
        return client not in self.gone

    def enough_without(self, client):
        return True

    def give_up(self, client):
        self.gone.add(client)
        self.runs[client].connection.incoming.clear()

    def send(self, client, *said):
        (message,) = said
        if message.WhichOneof("kind") == "begin":
            sent = self.runs[client].connection.incoming
            before = len(sent)
            self.runs[client]._train(message.begin)
            if client in self.lost.get(self.now, {}):
                del sent[before + self.lost[self.now][client] :]

    def take_ends(self, clients):
        last = {k: self.runs[k].connection.incoming[-1:] for k in clients}
        return {k: m.epoch_end for k, (m,) in last.items()} if all(m and m[0].HasField("epoch_end") for m in last.values()) else None

    def take(self, clients, *kinds):
        (client,) = clients
        if not (incoming := self.runs[client].connection.incoming):
            raise ClientLost(client, "it was away for more than 1 s")
        message = incoming.pop(0)
        batch = read_batch(message.batch) if message.HasField("batch") else None
        return client, Received(message.WhichOneof("kind"), 0, message, batch=batch)

    ahead = False

    def has_looked_at(self, client):
        return False

    def done(self, client, received):
        """Nothing is counted."""

    def give_back(self, client, batch):
        """Nothing is used again."""

    def acknowledge(self, client):
        """Nobody waits for it."""


def through_halfpass(settings, data, absent, lost):
    network = build_network(settings, data.train.sample_shape, data.classes)
    hub = Hub(settings, data, network, absent, lost)
    run = ServerRun(settings, hub, SimpleNamespace(network=network, joins=hub.joins, of_edge=False), None, None)
    call = run.attendance.call

    def called(epoch, turn):
        if turn < run.attendance.schedule.count:
            hub.now = (epoch, turn)
            hub.meet()
        return call(epoch, turn)

    run.attendance.call = called
    for epoch in range(settings.train.epochs):
        run.train(epoch, lambda: None)
        run.keep(None, epoch + 1)
    return run, hub


def cosine(step, total):
    return PEAK * (1 + math.cos(math.pi * step / total)) / 2


def stepped(optimizer, loss, rate):
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def mean(states):
    found = {name: sum(state[name].double() for state in states) / len(states) for name in states[0]}
    return {name: (value.round() if "tracked" in name else value).to(states[0][name].dtype) for name, value in found.items()}


def by_hand(settings, data, absent, lost):
    """Ordinary modules: those of each client (in a relay one for all), and the server's."""
    topology, everyone = settings.clients.topology, range(len(COUNTS))
    steps = [count // SIZE for count in COUNTS]
    schedule, parts = turns(topology, steps, settings.clients.rounds), shards(data, COUNTS)
    sgd = {"lr": PEAK, "fused": True, **SGD}
    modules = [torch.nn.ModuleList([model.below, head]) for model, head in (plain_start(settings, data) for _ in everyone)]
    sides = [(module, torch.optim.SGD(module.parameters(), **sgd)) for module in modules]
    if topology == "relay":
        sides = [sides[0]] * len(COUNTS)
    top, _ = plain_start(settings, data)
    above = torch.optim.SGD([*top.above.parameters(), *top.classifier.parameters()], **sgd)
    trained, learned, held = [0] * len(COUNTS), 0, []  # steps in the client half, and in the server half

    def left(there, epoch, turn):
        rest = [*schedule[turn:], *schedule * (EPOCHS - epoch - 1)]
        return sum(len(part) for turn in rest for k, part in turn.items() if k in there)

    def learn():
        if held:
            z, y = (torch.cat([pair[i] for pair, _ in held]) for i in (0, 1))
            stepped(above, cross_entropy(top.classifier(top.above(z)), y), cosine(*held[-1][1]))
            held.clear()

    for epoch in range(EPOCHS):
        for number, turn in enumerate(schedule):
            there = set(everyone) - set(absent.get((epoch, number), ()))
            members, going, uploads = [k for k in turn if k in there], lost.get((epoch, number), {}), {}
            before = [copy.deepcopy(part.state_dict()) for part in sides[0]]
            places = {k: {
                "relay": (sum(trained), sum(trained) + left(there, epoch, number)),
                "splitfed": (epoch * steps[k], EPOCHS * steps[k]),
                "independent": (trained[k], trained[k] + (EPOCHS - epoch) * steps[k]),
            }[topology] for k in members}  # fmt: skip
            for k in members:  # all of its steps, also where the server learns from fewer
                (module, optimizer), (first, total) = sides[k], places[k]
                batches = list(train_batches(data, parts[k], SIZE, seed=0, client=k, epoch=epoch))
                uploads[k] = []
                for step in turn[k]:
                    x, y = batches[step]
                    z = module[0](x)
                    stepped(optimizer, cross_entropy(module[1](z), y), cosine(first + step, total))
                    uploads[k].append((z.detach(), y))
                if topology == "independent" or k not in going:
                    trained[k] += going.get(k, len(turn[k]))
            total = learned + left(there, epoch, number + 1) + sum(map(len, uploads.values()))
            done = dict.fromkeys(members, 0)
            while rest := [k for k in members if k in there and done[k] < len(uploads[k])]:
                for k in rest:
                    if done[k] == going.get(k):
                        learn()
                        there.discard(k)
                        still = sum(len(uploads[j]) - done[j] for j in members if j in there)
                        total = learned + left(there, epoch, number + 1) + still
                        continue
                    held.append((uploads[k][done[k]], (learned, total)))
                    learned, done[k] = learned + 1, done[k] + 1
                    if len(held) == settings.server.merge:
                        learn()
            if topology == "splitfed":
                shared = mean([modules[k].state_dict() for k in members if k in there])
                for module in modules:
                    module.load_state_dict(shared)
            if topology == "relay" and going:
                for part, state in zip(sides[0], before, strict=True):
                    part.load_state_dict(state)
        learn()
    return [side[0] for side in sides], top


LATE = {(0, 0): [2], (0, 1): [2], (0, 2): [2], (1, 0): [2]}  # client 2 comes in epoch 2; in a relay for its turn of it
AWAY = {(1, 0): [0], (1, 1): [0], (1, 2): [0], (3, 0): [0, 1], (3, 1): [0, 1], (3, 2): [0, 1]}
EARLY = {(epoch, turn): [1] for epoch in (2, 3) for turn in (0, 1, 2)}  # client 1 leaves
LOST = {(1, 0): {2: 1}}  # client 2, behind its first batch of that turn


@pytest.mark.parametrize(("topology", "absent", "lost", "more"), [
    ("splitfed", LATE, {}, {"rounds": 2}),
    ("splitfed", AWAY, {}, {"merge": 3}),
    ("splitfed", {(2, 0): [2], (2, 1): [2]}, LOST, {"merge": 2}),
    ("relay", LATE, {}, {}),
    ("relay", AWAY, {}, {"merge": 3}),
    ("relay", {(2, 0): [2], (2, 1): [2], (2, 2): [2]}, {(1, 2): {2: 1}}, {}),
    ("independent", EARLY, {}, {}),
    ("independent", {(2, 0): [2]}, LOST, {}),
])  # fmt: skip
def test_a_run_without_some_clients_is_a_loop_by_hand_over_those_that_are_there(data, topology, absent, lost, more):
    settings = config(clients=3, topology=topology, epochs=EPOCHS, batch_size=SIZE, schedule="cosine")
    clients = dataclasses.replace(settings.clients, quorum=1, rounds=more.get("rounds", 1))
    settings = dataclasses.replace(settings, clients=clients, server=ServerConfig(merge=more.get("merge", 1)))
    run, hub = through_halfpass(settings, data, absent, lost)
    below, top = by_hand(settings, data, absent, lost)
    for k, client in enumerate(hub.runs):
        client._take_over(write_weights(run.handover.give(k)))
        ours = client.client.half.state_dict()
        assert all(torch.equal(*pair) for pair in zip(ours.values(), below[k][0].state_dict().values(), strict=True)), k
    assert equal(run.server.half.state_dict(), {n: v for n, v in top.state_dict().items() if not n.startswith("below")})
    course = run.lessons.course
    assert course.left == 0
    assert course.done < EPOCHS * 8  # fewer than if all had been there


def test_a_client_that_is_never_there_leaves_no_trace(data):
    """A relay of three without the last is one of two, to the last bit of either half and to the end of the schedule."""
    settings = config(clients=3, topology="relay", epochs=EPOCHS, batch_size=SIZE)
    settings = dataclasses.replace(settings, clients=dataclasses.replace(settings.clients, quorum=2))
    never = {(epoch, turn): [2] for epoch in range(EPOCHS) for turn in range(3)}
    run, hub = through_halfpass(settings, data, never, {})
    two = dataclasses.replace(settings, clients=dataclasses.replace(settings.clients, count=2))
    network = build_network(two, data.train.sample_shape, data.classes)
    local = LocalRun(two, data, shards(data, COUNTS)[:2], network)
    for epoch in range(EPOCHS):
        local.train(epoch, lambda: None)
    assert equal(run.server.half.state_dict(), local.server.half.state_dict())
    assert equal(hub.runs[1].client.half.state_dict(), local.clients[1].half.state_dict())
    assert run.attendance.absent == [
        {"client": 2, "why": "it had not joined", "from": {"epoch": 1, "round": 1}, "to": None}
    ]


def test_who_was_absent_when(data):
    settings = config(clients=3, epochs=EPOCHS, batch_size=SIZE)
    settings = dataclasses.replace(settings, clients=dataclasses.replace(settings.clients, quorum=1, rounds=2))
    run, _ = through_halfpass(settings, data, {(0, 0): [1], (0, 1): [1], (2, 0): [2], (2, 1): [2]}, {(1, 1): {2: 1}})
    assert run.attendance.absent == [
        {"client": 1, "why": "it had not joined", "from": {"epoch": 1, "round": 1}, "to": {"epoch": 1, "round": None}},
        {"client": 2, "why": "it was away for more than 1 s", "from": {"epoch": 2, "round": 2}, "to": {"epoch": 3, "round": None}},
    ]
    again = run.attendance.state()
    run.attendance.load_state(again)
    assert run.attendance.state() == again


# ----------------------------------------------------------------------------------------------------- over the wire


def test_a_hub_begins_with_those_that_are_enough_and_lets_others_in_until_it_ends():
    hub = WireHub(
        "127.0.0.1:0", clients=3, window_bytes=2**20, timeout=0.5, admit=lambda join: None, check=lambda client, batch: None,
        quorum=1, reconnect=60, run="r",
    )  # fmt: skip

    def connect(client):
        made = Connection(f"127.0.0.1:{hub.port}", window_bytes=2**20, timeout=0.5, reconnect=60)
        made.send(pb.ClientMessage(join=pb.Join(client=client)))
        made.receive("joined")
        return made

    try:
        with pytest.raises(RunError, match=r"expected 1 clients within 0.1 s, found none with number 0, 1, 2; start them"):
            hub.wait_for_clients(0.1, 1)
        connect(0)
        hub.wait_for_clients(20, 1)
        assert [(look.client, look.given_up) for look in hub.look()] == [(0, False), (1, True), (2, True)]
        late = connect(1)
        assert hub.present(1)
        with pytest.raises(Anew):
            late.receive("begin")
        late.go_on_anew()
        hub.send(1, pb.ServerMessage(begin=pb.Begin(epoch=7)))
        assert late.receive("begin").begin.epoch == 7
        late.close()
        with pytest.raises(ClientLost, match=r"it was away for more than 0.5 s"):
            hub.take([1], "batch")
        hub.give_up(1)
        with pytest.raises(ClientLost, match="it was given up"):
            hub.take([0, 1], "batch")
        hub.end_without()
        with pytest.raises(PassedOnError, match="client 2 at joining: expected a run that goes on, found one that ends"):
            connect(2)
    finally:
        hub.stop()


def test_clients_come_late_and_leave_early(tmp_path, monkeypatch):
    """Server and clients as threads. Client 2 comes while the server learns from its first batch of epoch 1, client 1
    leaves in epoch 3."""
    settings = Config(
        clients=ClientsConfig(3, rounds=2, quorum=2), data=DataConfig(limit=192), out=str(tmp_path / "server"),
        train=TrainConfig(epochs=4, batch_size=16, threads=1, test_every=4), wire=WireConfig(timeout=2),
    )  # fmt: skip
    network = build_network(settings, (1, 8, 8), 10)  # once, for torch.fx must not trace one while others train
    monkeypatch.setattr(client_process, "network_of", lambda *_: network)
    monkeypatch.setattr(admission, "build_network", lambda *_, **__: network)
    seen, step, due = [], replay.server_step, ClientRun._keep_if_due
    monkeypatch.setattr(server_process, "Overview", lambda config: seen.append(Overview(config)) or seen[0])

    def first(*arguments):
        monkeypatch.setattr(replay, "server_step", step)
        said["before"] = [client.state for client in seen[0].status().clients]
        said["absent"] = [
            sample.value for family in ServerFigures(seen[0]).collect() for sample in family.samples
            if sample.name == "halfpass_client_absent"
        ]  # fmt: skip
        start(2)
        deadline = time.monotonic() + 60
        while not seen[0].hub.present(2):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return step(*arguments)

    def left(run):
        if (run.client.index, run.progress()[:2]) == (1, (3, 1)):
            raise Left
        due(run)

    monkeypatch.setattr(replay, "server_step", first)
    monkeypatch.setattr(ClientRun, "_keep_if_due", left)
    said, joined = {}, {}
    with ThreadPoolExecutor(3) as others:

        def start(k):
            site = dataclasses.replace(settings, out=str(tmp_path / f"site-{k}"))
            joined[k] = others.submit(client_process.join, site, said["address"], k)

        def announce(port):
            said["address"] = f"127.0.0.1:{port}"
            start(0)
            start(1)

        result = server_process.serve(settings, "127.0.0.1:0", announce)
        assert isinstance(joined[1].exception(60), Left)
        halves = [load_file(joined[k].result(60) / f"client-{k}.safetensors") for k in (0, 2)]
    assert equal(*halves)
    assert (said["before"], said["absent"]) == (["connected", "connected", "absent"], [0, 0, 1])
    kept = json.loads((tmp_path / "server" / "result.json").read_text())
    late, early = kept["absent"]
    assert (late["client"], late["from"], late["why"]) == (2, {"epoch": 1, "round": 1}, "it had not joined")
    assert late["to"]["epoch"] == 1
    assert early == {"client": 1, "why": "it was away for more than 2 s", "from": {"epoch": 3, "round": 1}, "to": None}
    assert result["test_accuracy"] == kept["test_accuracy"]
    lines = (tmp_path / "server" / "ledger.csv").read_text().splitlines()[1:]
    assert len(lines) == len(set(lines))
    by_client = [{int(line.split(",")[1]) for line in lines if line.startswith(f"{k},")} for k in range(3)]
    assert by_client[0] == {1, 2, 3, 4}
    assert by_client[1] <= {1, 2, 3}
    assert by_client[2] >= {2, 3, 4}
