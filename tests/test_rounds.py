"""Runs in rounds, over an exchange in this process: bit for bit what one process does, whatever is lost and sent again."""

import dataclasses
from collections import deque

import pytest
from plain import equal
from runtimes import rows_of
from safetensors.torch import load_file

from halfpass.config import ClientsConfig, Config, DataConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.run import round_hub
from halfpass.run.round_client import RoundClient
from halfpass.run.round_hub import Reply
from halfpass.run.round_server import serve_rounds
from halfpass.run.train import train

KILLED, LOST, DEAD = "killed", "lost", "dead"


class Nodes:
    """An engine in this process, which answers when it is asked. `faults`: by (client, number of its message so far),
    what becomes of that message: the client is `killed` and answers nothing, or its reply is `lost`, or its node is
    `dead` and another has its place."""

    def __init__(self, config, count, faults=()):
        self.config, self.faults = config, dict(faults)
        self.client_of = dict(enumerate(range(count), 100))  # by node
        self.clients, self.waiting, self.sent = {}, deque(), dict.fromkeys(range(count), 0)
        self.happened = []

    def nodes(self):
        return list(self.client_of)

    def send(self, node, message):
        self.waiting.append((node, message))

    def receive(self, seconds):
        if not self.waiting:
            return None
        node, message = self.waiting.popleft()
        if node not in self.client_of:
            return Reply(node, failure="node is gone", again=True)
        k = self.client_of[node]
        fault = self.faults.pop((k, self.sent[k]), None)
        self.sent[k] += 1
        if fault is not None:
            self.happened.append(fault)
        if fault == DEAD:
            del self.client_of[node]
            self.clients.pop(k, None)
            self.client_of[node + 1000] = k
        elif fault == KILLED:
            self.clients.pop(k, None)
        if fault in (DEAD, KILLED):
            return Reply(node, failure=f"it was {fault}", again=True)
        client = self.clients.setdefault(k, RoundClient(self.config, k))
        reply = client.answer(message)
        return Reply(node, failure="no reply came", again=True) if fault == LOST else Reply(node, reply)


def settings(out, *, clients=2, topology="splitfed", rounds=1, server=None, wire=None, **recipe):
    recipe = {"epochs": 2, "batch_size": 32, "threads": 1} | recipe
    return Config(
        method="decoupled", out=str(out), data=DataConfig(limit=300), server=server or ServerConfig(),
        clients=ClientsConfig(clients, topology, "dirichlet" if clients > 1 else "iid", 1.0 if clients > 1 else 0.5, rounds=rounds),
        train=TrainConfig(**recipe), wire=wire or WireConfig(),
    )  # fmt: skip


def in_rounds(config, out, faults=()):
    config = dataclasses.replace(config, runtime="processes", out=str(out))
    nodes = Nodes(config, config.clients.count, faults)
    return serve_rounds(config, nodes, "test"), nodes


def check_equal(config, one, other):
    for owner in ("server", *(f"client-{k}" for k in range(config.clients.count))):
        local, rounds = (load_file(folder / f"{owner}.safetensors") for folder in (one, other))
        assert equal(local, rounds), owner
        assert not equal(local, {name: value + 1 for name, value in rounds.items()})


CASES = {
    "one client": {"clients": 1},
    "splitfed": {"rounds": 3},
    "relay, adamw": {"topology": "relay", "optimizer": "adamw", "lr": 0.001, "clients": 3},
    "independent": {"topology": "independent", "clients": 3},
    "int4+zstd, every second": {"wire": WireConfig(codec="int4+zstd", every=2)},
    "replay": {"server": ServerConfig(replay=2), "rounds": 2, "test_every": 2},
    "budget, micro-batches": {"wire": WireConfig(budget=2_000_000), "micro_batch": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_rounds_and_one_process_give_equal_weights_and_scores(tmp_path, case):
    config = settings(tmp_path / "local", **CASES[case])
    one = train(config)
    other, _ = in_rounds(config, tmp_path / "rounds")
    check_equal(config, tmp_path / "local", tmp_path / "rounds")
    assert other["engine"] == "test"
    for key in ("test_accuracy", "aux_test_accuracy", "joint_test_accuracy"):
        assert one[key] == other[key]
    for direction, kinds in (("up", ("activations", "labels", "weights")), ("down", ("gradients", "weights"))):
        for kind in kinds:
            assert one["bytes"][direction][kind] == other["bytes"][direction][kind], kind
    of_processes = [[row["process"] for row in rows_of(tmp_path / name)] for name in ("local", "rounds")]
    assert of_processes[0] == of_processes[1]


FAULTS = {
    "a reply that is lost": {(0, 2): LOST, (1, 3): LOST},
    "a client that is killed": {(0, 0): KILLED, (1, 2): KILLED, (0, 4): KILLED},
    "one whose reply was lost and which is killed behind that": {(1, 2): LOST, (1, 3): KILLED},
    "a node in another's place": {(0, 3): DEAD},
    "the last reply of all": {(0, 7): LOST, (1, 6): LOST},
}


@pytest.mark.parametrize("faults", FAULTS)
def test_what_is_lost_and_sent_again_changes_nothing(tmp_path, monkeypatch, faults):
    monkeypatch.setattr(round_hub, "MEET_SECONDS", 0.0)
    config = settings(tmp_path / "local", rounds=3)
    train(config)
    _, nodes = in_rounds(config, tmp_path / "rounds", FAULTS[faults])
    assert sorted(nodes.happened) == sorted(FAULTS[faults].values())
    check_equal(config, tmp_path / "local", tmp_path / "rounds")
    assert not (tmp_path / "rounds" / "client-0").exists()
