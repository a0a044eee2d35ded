"""Runs in rounds, over an exchange in this process: bit for bit what one process does, whatever is lost and sent again."""

import dataclasses
from collections import deque

import pytest
from plain import equal
from runtimes import rows_of
from safetensors.torch import load_file

from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.data.batches import batch_count
from halfpass.errors import InputError, PassedOnError, RunError
from halfpass.run import replay, round_hub
from halfpass.run.epoch import ClientEpoch
from halfpass.run.round_client import RoundClient
from halfpass.run.round_hub import Reply
from halfpass.run.round_server import serve_rounds
from halfpass.run.rounds import chosen
from halfpass.run.train import train
from halfpass.wire import frames

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


def test_the_next_message_goes_out_before_the_server_learns_from_the_last_reply(tmp_path, monkeypatch):
    """Across epochs and their tests too, of one client."""
    events, send, step = [], Nodes.send, replay.server_step
    monkeypatch.setattr(Nodes, "send", lambda nodes, *what: (events.append("sent"), send(nodes, *what))[1])
    monkeypatch.setattr(replay, "server_step", lambda *what: (events.append("step"), step(*what))[1])
    config = settings(tmp_path, clients=1, epochs=3, batch_size=48)
    in_rounds(config, tmp_path / "rounds")
    steps = batch_count(300, 48)
    learns = ["step"] * steps
    # who it is, epoch 1; test 1 and epoch 2; test 2 and epoch 3; test 3
    until_test = ["sent", "sent", "sent", *learns, "sent", *learns, "sent"]
    assert events[: len(until_test)] == until_test
    assert sorted(events[len(until_test) :]) == ["sent", *learns]  # the end, once the test has come


@pytest.mark.parametrize(("changes", "expected"), [
    ({"method": "conventional"}, "method: expected decoupled in rounds"),
    ({"model": ModelConfig("digits-cnn", edge_cut="pool2")}, "model.edge_cut: expected none in rounds"),
    ({"train": TrainConfig(feedback_every=4, threads=1)}, "train.feedback_every: expected none in rounds"),
    ({"wire": WireConfig(reconnect=0)}, "wire.reconnect: expected seconds that a round may take, found 0"),
])  # fmt: skip
def test_what_needs_an_answer_within_a_round_is_refused(tmp_path, changes, expected):
    config = dataclasses.replace(settings(tmp_path / "out"), runtime="processes", **changes)
    for refused in (lambda: serve_rounds(config, Nodes(config, 2), "test"), lambda: RoundClient(config, 0)):
        with pytest.raises(InputError, match=expected):
            refused()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_other_numbers_of_nodes_are_refused_at_once(tmp_path, count):
    config = dataclasses.replace(settings(tmp_path / "out"), runtime="processes")
    with pytest.raises(InputError, match=f"nodes: expected 2, one for each client, found {count}"):
        serve_rounds(config, Nodes(config, count), "test")
    assert not (tmp_path / "out").exists()


def test_a_node_with_another_model_is_refused_and_named(tmp_path):
    config = dataclasses.replace(settings(tmp_path / "out"), runtime="processes")
    nodes = Nodes(config, 2)
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=0.3))
    nodes.clients[1] = RoundClient(other, 1)
    with pytest.raises(InputError, match=r"client 1 at joining: expected train.lr 0.2 \(the server's\), found 0.3"):
        serve_rounds(config, nodes, "test")
    assert not (tmp_path / "out").exists()


def test_a_client_that_never_answers_ends_the_run_by_name(tmp_path):
    config = dataclasses.replace(settings(tmp_path / "out", wire=WireConfig(reconnect=0.3)), runtime="processes")
    nodes = Nodes(config, 2, {(1, n): KILLED for n in range(3, 20)})
    with pytest.raises(RunError, match=r"client 1: expected a reply to message 3, which was sent 4 times, found it was killed"):
        serve_rounds(config, nodes, "test")
    assert (tmp_path / "out" / "server.safetensors").is_file()


def test_with_a_quorum_a_run_goes_on_without_a_client(tmp_path):
    base = settings(tmp_path / "out", clients=3, rounds=2)
    config = dataclasses.replace(base, runtime="processes", clients=dataclasses.replace(base.clients, quorum=2))
    nodes = Nodes(config, 3, {(1, n): KILLED for n in range(2, 20)})
    result = serve_rounds(config, nodes, "test")
    (absent,) = result["absent"]
    assert (absent["client"], absent["from"], absent["to"]) == (1, {"epoch": 1, "round": 2}, None)
    assert "which was sent 4 times" in absent["why"]


def test_a_client_s_own_failure_is_told_by_its_words(tmp_path, monkeypatch):
    config = dataclasses.replace(settings(tmp_path / "out"), runtime="processes")
    nodes = Nodes(config, 2)
    monkeypatch.setattr(ClientEpoch, "forward", lambda *_: (_ for _ in ()).throw(RunError("client 0", "finite weights", "NaN", "lower train.lr")))
    with pytest.raises(PassedOnError, match=r"client 0: expected finite weights, found NaN; lower train.lr"):
        serve_rounds(config, nodes, "test")
    assert not (tmp_path / "out" / "result.json").exists()


def test_messages_of_a_round_are_packed_and_anything_else_is_refused():
    packed = frames.pack(3, "0123456789abcdef", [b"one", b"", b"three"])
    found = frames.unpack("it", packed, 3)
    assert (found.number, found.run, [bytes(one) for one in found.messages]) == (3, "0123456789abcdef", [b"one", b"", b"three"])
    for wrong, said in (
        (packed[:20], "found 20 bytes"), (b"x" + packed[1:], "found other bytes"), (packed[:-1], "found one that is cut short"),
        (packed[:8] + b"\x00" + packed[9:], "expected protocol"), (packed + b"\x01", "found more"),
        (packed + b"\xff" * 8, "found more"), (packed[:36] + b"\xff" * 8 + packed[44:], "found one that is cut short"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            frames.unpack("it", wrong, 3)


def test_a_drawn_part_of_the_clients_trains_alike_in_every_runtime(tmp_path):
    config = settings(tmp_path / "local", clients=5, epochs=4)
    config = dataclasses.replace(config, clients=dataclasses.replace(config.clients, sample=2))
    one = train(config)
    in_rounds(config, tmp_path / "rounds")
    check_equal(config, tmp_path / "local", tmp_path / "rounds")
    between = dataclasses.replace(config, runtime="processes", out=str(tmp_path / "processes"))
    other = train(between)
    check_equal(config, tmp_path / "local", tmp_path / "processes")
    drawn = [list(chosen(config.clients, 0, epoch)) for epoch in range(4)]
    for folder in ("local", "rounds", "processes"):
        rows = [row["process"] for row in rows_of(tmp_path / folder) if row["process"] != "server"]
        assert rows == [f"client-{k}" for clients in drawn for k in clients]
    assert {len(clients) for clients in drawn} == {2}
    assert len({tuple(clients) for clients in drawn}) > 1
    assert one["test_accuracy"] == other["test_accuracy"]
    halves = [load_file(tmp_path / "local" / f"client-{k}.safetensors") for k in range(5)]
    assert all(equal(halves[0], half) for half in halves)  # also of those that were never drawn


@pytest.mark.parametrize(("clients", "said"), [
    ({"count": 3, "sample": 4}, "clients.sample: expected at most clients.count 3, found 4"),
    ({"count": 3, "sample": 0}, "clients.sample: expected"),
    ({"count": 3, "sample": 2, "rounds": 2}, "clients.rounds: expected 1, with clients.sample, found 2"),
    ({"count": 3, "sample": 2, "topology": "relay"}, "clients.topology: expected splitfed, with clients.sample, found relay"),
    ({"count": 3, "sample": 2, "partition": "own"}, "clients.partition: expected iid or dirichlet, with clients.sample"),
    ({"count": 3, "sample": 2, "quorum": 2}, "clients.quorum: expected none, with clients.sample"),
])  # fmt: skip
def test_what_goes_with_no_sample_is_said(clients, said):
    with pytest.raises(InputError, match=said):
        ClientsConfig(**clients)


class Deaf(Nodes):
    """Whose client 1 cannot be reached from its `n`-th message on, which its engine says at once."""

    def __init__(self, *more, n):
        super().__init__(*more)
        self.n = n

    def receive(self, seconds):
        if self.waiting and self.client_of[self.waiting[0][0]] == 1 and self.sent[1] >= self.n:
            node, _ = self.waiting.popleft()
            return Reply(node, failure="target_unreachable", again=True)
        return super().receive(seconds)


def test_a_node_that_never_says_who_it_is_is_asked_a_few_times(tmp_path, monkeypatch):
    monkeypatch.setattr(round_hub, "PAUSE_SECONDS", 0.0)
    config = dataclasses.replace(settings(tmp_path / "run"), runtime="processes")
    with pytest.raises(RunError, match="node 101: expected to hear which client it is, found target_unreachable"):
        serve_rounds(config, Deaf(config, 2, n=0), "test")
    assert not (tmp_path / "run").exists()


def test_a_reply_without_its_end_ends_the_run(tmp_path, monkeypatch):
    answer = RoundClient.answer

    def cut_short(client, message):
        read = frames.unpack("it", answer(client, message), 2**20)
        kept = read.messages[:-1] if read.number == 1 and client.index == 1 else read.messages
        return frames.pack(read.number, read.run, kept)

    monkeypatch.setattr(RoundClient, "answer", cut_short)
    with pytest.raises(RunError, match="client 1: expected batch or epoch_end in its reply to message 1, found neither"):
        in_rounds(settings(tmp_path / "local"), tmp_path / "run")


def test_the_last_reply_may_be_lost_where_its_node_is_asked_who_it_is(tmp_path, monkeypatch):
    """As of a site that the engine leaves out for a while."""
    monkeypatch.setattr(round_hub, "MEET_SECONDS", 0.0)
    config, nodes = settings(tmp_path / "local"), Nodes.nodes
    train(config)
    asked = []
    monkeypatch.setattr(Nodes, "nodes", lambda self: asked.append(1) or (nodes(self) if len(asked) % 2 else []))
    _, engine = in_rounds(config, tmp_path / "rounds", {(1, 3): LOST})
    assert engine.happened == [LOST]
    check_equal(config, tmp_path / "local", tmp_path / "rounds")
