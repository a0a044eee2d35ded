"""Real processes: equal to one process, orderly when a part of them fails, and gone when they are told to."""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import commands
import pytest
import torch
import yaml
from runtimes import rows_of, train_in_both_runtimes

from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, DataConfig, TrainConfig, WireConfig, as_dict
from halfpass.cut import CutBatch
from halfpass.errors import RunError
from halfpass.run import admission, client_process, replay, server_process, setup
from halfpass.run.children import Child, stopping
from halfpass.run.epoch import ClientEpoch, Score
from halfpass.run.local import LocalRun
from halfpass.run.train import train
from halfpass.tasks.table import classes
from halfpass.wire.hub import Hub

HALFPASS = [sys.executable, "-m", "halfpass"]


def config(out, runtime="processes", method="decoupled", clients=2, topology="splitfed", codec="none", **recipe):
    recipe = {"epochs": 2, "batch_size": 64, "threads": 1} | recipe
    return Config(
        method=method, runtime=runtime, out=str(out), clients=ClientsConfig(clients, topology, "dirichlet", 1.0),
        train=TrainConfig(**recipe), wire=WireConfig(codec=codec, timeout=20),
    )  # fmt: skip


@pytest.mark.parametrize(("method", "topology", "codec"), [
    ("decoupled", "splitfed", "none"), ("decoupled", "relay", "none"), ("conventional", "relay", "none"),
    ("decoupled", "independent", "bf16"),
])  # fmt: skip
def test_local_and_processes_give_equal_weights_and_equal_bytes(tmp_path, method, topology, codec):
    """Unequal shards (Dirichlet), so that the clients' numbers of steps differ too."""
    settings = config(tmp_path, method=method, topology=topology, codec=codec)
    one, other = train_in_both_runtimes(settings, tmp_path).values()
    for key in ("test_accuracy", "aux_test_accuracy", "joint_test_accuracy"):
        assert one[key] == other[key]
    for direction, kinds in (("up", ("activations", "labels", "weights")), ("down", ("gradients", "weights"))):
        for kind in kinds:
            assert one["bytes"][direction][kind] == other["bytes"][direction][kind], kind
    socket_up, socket_down = other["bytes"]["socket_up"], other["bytes"]["socket_down"]
    if sys.platform == "linux":
        assert 1 < socket_up / sum(other["bytes"]["up"].values()) < 1.03
        assert socket_down / sum(other["bytes"]["down"].values()) > 1
    assert len(other["peak_memory_bytes"]["client"]) == 2
    assert other["peak_memory_bytes"]["server"] > 0
    assert one["peak_memory_bytes"]["colocated"] > 0
    check_rows(tmp_path / "processes", other, topology)


@pytest.mark.parametrize("topology", ["splitfed", "relay"])
def test_a_turn_begins_before_the_server_has_learned_from_the_one_before(tmp_path, monkeypatch, topology):
    """Server and clients as threads. The server's first step lasts until all of the turn has come, its second until the
    next turn's first batch is made."""
    rounds, first_turn = (2, {0, 1}) if topology == "splitfed" else (1, {0})
    ended, come, ahead = set(), threading.Event(), threading.Event()
    waits = itertools.chain([come, ahead], itertools.repeat(ahead))
    settings = config(tmp_path / "server", topology=topology, epochs=1, batch_size=16)
    clients = dataclasses.replace(settings.clients, rounds=rounds, partition="iid", alpha=0.5)
    settings = dataclasses.replace(settings, clients=clients, data=DataConfig(limit=128))  # 4 batches each
    accept, forward, step = Hub._accept, ClientEpoch.forward, replay.server_step
    load, connect, build = setup.load_data, client_process.connect, admission.build_network
    # One at a time builds its network: torch.fx patches nn.Module for all threads while it traces one, and beartype
    # draws from random numbers that the check of a cut compares.
    building = threading.Semaphore(1)

    def loaded(*arguments):
        building.acquire()
        return load(*arguments)

    def connected(*arguments, **named):
        building.release()
        return connect(*arguments, **named)

    def built(*arguments, **named):
        with building:
            return build(*arguments, **named)

    def accepted(hub, peer, stream, data):
        accept(hub, peer, stream, data)
        if peer.ends:
            ended.add(peer.client)
        if ended >= first_turn:
            come.set()

    def seen(epoch, until):
        batch = forward(epoch, until)
        if batch is not None and (batch.step == 2 if topology == "splitfed" else batch.client == 1):
            ahead.set()
        return batch

    def late(*arguments):
        assert next(waits).wait(20)
        return step(*arguments)

    monkeypatch.setattr(Hub, "_accept", accepted)
    monkeypatch.setattr(ClientEpoch, "forward", seen)
    monkeypatch.setattr(replay, "server_step", late)
    monkeypatch.setattr(setup, "load_data", loaded)
    monkeypatch.setattr(client_process, "connect", connected)
    monkeypatch.setattr(admission, "build_network", built)
    monkeypatch.setattr(server_process, "JOIN_SECONDS", 60)
    with ThreadPoolExecutor(2) as others:
        sites = [dataclasses.replace(settings, out=str(tmp_path / f"site-{k}")) for k in range(2)]
        joined = []
        server_process.serve(settings, "127.0.0.1:0", lambda port: joined.extend(
            others.submit(client_process.join, site, f"127.0.0.1:{port}", k) for k, site in enumerate(sites)
        ))  # fmt: skip
        assert [client.result(20) for client in joined] == [Path(site.out) for site in sites]


def check_rows(folder, outcome, topology):
    """A row per epoch per process; the accuracy reported is the last epoch's, and seconds add up."""
    rows = rows_of(folder)
    assert [(r["epoch"], r["process"]) for r in rows] == [
        (epoch, name) for epoch in (1, 2) for name in ("client-0", "client-1", "server")
    ]
    assert outcome["test_accuracy"] == rows[-1]["test_accuracy"]
    server = [r for r in rows if r["process"] == "server"]
    assert outcome["train_seconds"] == pytest.approx(sum(r["busy_seconds"] + r["waiting_seconds"] for r in server))
    assert sum(r["samples"] for r in server) == sum(r["samples"] for r in rows if r["process"] != "server")
    tested = [r for r in rows if r["epoch"] == 2 and r["aux_test_accuracy"] is not None]
    expected = {"relay": 1, "splitfed": 1, "independent": 2}[topology]
    assert len(tested) == (expected if outcome["method"] == "decoupled" else 0)  # the others have no head


def scored(right):
    """So many of ten samples right."""
    score, labels = Score(classes(10)), torch.arange(10)
    outputs = torch.eye(10)[torch.where(labels < right, labels, (labels + 1) % 10)]
    score.add(CutBatch(0, 0, 0, (torch.zeros(10, 1),), labels), outputs, None)
    return score


def test_accuracy_is_the_last_epoch_s_even_when_an_earlier_one_was_better(tmp_path, monkeypatch):
    """The authors took the best epoch on the test set."""
    tested = iter([(scored(5), {0: {"accuracy": 0.4}}), (scored(9), {0: {"accuracy": 0.8}}), (scored(7), {0: {"accuracy": 0.6}})])
    monkeypatch.setattr(LocalRun, "test", lambda run, epoch: next(tested))
    outcome = train(config(tmp_path / "run", "local", clients=1, epochs=3))
    rows = rows_of(tmp_path / "run")
    assert [r["test_accuracy"] for r in rows if r["process"] == "server"] == [0.5, 0.9, 0.7]
    assert (outcome["test_accuracy"], outcome["aux_test_accuracy"]) == (0.7, 0.6)


# --------------------------------------------------------------------------------- by hand, from different terminals


STARTED = []


def start(arguments, folder):
    """As from a terminal, where SIGINT is heeded: what a shell puts into the background, such as the tests, ignores it.
    Without preexec_fn, which forks this process with the threads that gRPC has in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a new process gets the default for it
    try:
        STARTED.append(subprocess.Popen(
            [*HALFPASS, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ))  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    return STARTED[-1]


@pytest.fixture(autouse=True)
def _leave_nothing_running():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.wait(10)


def write_config(folder, **changes):
    settings = as_dict(config("unused", epochs=changes.pop("epochs", 1)))
    settings |= {"out": None, "runtime": "local"}
    for key, value in changes.items():
        group, name = key.split("_", 1)
        settings[group][name] = value
    path = folder / f"{'-'.join(['config', *map(str, changes.values())])}.yaml".replace("/", "-")
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def serve(folder, *more, **changes):
    settings = write_config(folder, **changes)
    server = commands.Command(["serve", "--config", settings, "--bind", "127.0.0.1:0", "--out", "server", *more], folder)
    STARTED.append(server)
    line = server.stdout.readline()
    assert line.startswith("listening on 127.0.0.1:"), (server.stderr.read(), server.wait())
    return server, line.split()[2], settings


def finish(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def joining(address, settings, count=2):
    """Clients, forked: Python takes seconds to import what they need."""
    return [Child(f"client {k}", ["join", address, "--config", settings, "--client", str(k), "--out", f"site-{k}"], quiet=True)
            for k in range(count)]  # fmt: skip


def test_serve_and_join_by_hand_with_a_refused_client_first(tmp_path, monkeypatch, capsys):
    """In arrival order too, and without saying `runtime`."""
    monkeypatch.chdir(tmp_path)
    server, address, settings = serve(tmp_path, wire_order="arrival")
    wrong = write_config(tmp_path, model_head="mlp", model_cut="block_1")
    for arguments, text in [
        (["--config", wrong, "--client", "0"],
         r"client 0 at joining: expected model.cut 'block_2' \(the server's\), found 'block_1'; start both sides with .*"),
        (["--config", settings, "--train.lr", "0.5", "--client", "1"],
         r"client 1 at joining: expected train.lr 0.2 \(the server's\), found 0.5; start both sides with the same .*"),
    ]:  # fmt: skip
        assert main(["join", address, *arguments, "--out", "refused"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(rf"halfpass: {text}\n", err), err
    assert not (tmp_path / "refused").exists()
    clients = joining(address, settings)
    with stopping(clients):
        assert [client.process.wait(100) for client in clients] == [0, 0]
    status, out, err = finish(server)
    assert status == 0, err
    assert "report: server/report.html" in out
    assert sorted(p.name for p in (tmp_path / "server").iterdir()) == [
        "config.yaml", "ledger.csv", "metrics.jsonl", "report.html", "result.json", "server.safetensors",
    ]  # fmt: skip
    assert [p.name for p in (tmp_path / "site-1").iterdir()] == ["client-1.safetensors"]  # each half at its owner
    outcome = json.loads((tmp_path / "server" / "result.json").read_text())
    assert outcome["runtime"] == "processes"
    assert len(outcome["peak_memory_bytes"]["client"]) == 2
    assert main(["join", address, "--config", settings, "--client", "1", "--out", "site-1"]) == 2
    assert capsys.readouterr().err == (
        "halfpass: out: expected a folder without a run, found client-1.safetensors in site-1; choose another folder\n"
    )


def test_a_killed_client_is_waited_for_and_then_ends_the_run_and_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, address, settings = serve(tmp_path, epochs=200, wire_reconnect=1.5)
    clients = joining(address, settings)
    with stopping(clients):
        wait_for_rows(tmp_path / "server")
        clients[1].process.kill()
        began = time.monotonic()
        status, _, err = finish(server, 20)
        left = clients[0].process.wait(20)
    assert status == 1
    said = "halfpass: client 1: expected a connection, or another one, found none for 1.5 s; see what it printed, and go on with halfpass resume on both sides"
    assert err.splitlines()[-1] == said
    assert "lost client 1: expected its end message, found a stream that ended without it" in err
    assert (left, f"halfpass: {clients[0].failure()}") == (1, said)
    assert time.monotonic() - began < 15
    assert not (tmp_path / "server" / "result.json").exists()


def wait_for_rows(folder, seconds=300):
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_server_ends_the_clients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, address, settings = serve(tmp_path, epochs=200, clients_count=1, wire_reconnect=0.0)
    (client,) = joining(address, settings, 1)
    with stopping([client]):
        wait_for_rows(tmp_path / "server")
        server.kill()
        server.wait()
        assert client.process.wait(20) == 1
    said = str(client.failure())
    assert re.fullmatch(rf"server at {address}: expected a connection until the end, found .*", said), said


def processes_of(text):
    """Command lines of live processes with that text, such as a folder, in them, in words, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().replace("\0", " ").split()
        except OSError:
            continue
        if str(text) in " ".join(words):
            found[int(entry.parent.name)] = words
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_the_command_stops_every_process_within_5_seconds(tmp_path, stop):
    out = tmp_path / "run"
    words = ["train", "--runtime", "processes", "--clients.count", "2", "--train.epochs", "500", "--out", str(out)]
    forked = stop == signal.SIGTERM and sys.platform == "linux"  # as are its children, by the same fork server
    if forked:
        STARTED.append(command := commands.Command(words, tmp_path))
    else:
        command = start(words, tmp_path)
    wait_for_rows(out)
    assert len(processes_of(out)) == 4  # the command, the server, two clients
    assert len(processes_of(f"fork server of {command.pid}")) == (sys.platform == "linux" and not forked)
    began = time.monotonic()
    os.kill(command.pid, stop)
    command.wait(5)
    while processes_of(out) or processes_of(f"fork server of {command.pid}"):
        assert time.monotonic() - began < 5
        time.sleep(0.05)
    err = command.stderr.read()
    if stop != signal.SIGKILL:
        assert command.returncode == 1
        assert err.splitlines()[-1] == "halfpass: interrupted"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize(("role", "name"), [("serve", "server"), ("join", "client 0")])
def test_a_killed_process_of_a_command_is_said_and_leaves_nothing(tmp_path, capfd, role, name):
    out = tmp_path / "run"

    def kill():
        wait_for_rows(out)
        (one,) = [pid for pid, words in processes_of(out).items() if role in words]
        os.kill(one, signal.SIGKILL)
        return time.monotonic()

    with ThreadPoolExecutor(1) as beside:
        killed = beside.submit(kill)
        assert main(["train", "--runtime", "processes", "--train.epochs", "500", "--out", str(out)]) == 1
        assert time.monotonic() - killed.result(0) < 20
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"halfpass: {name}: expected its orderly end, found killed by SIGKILL; is memory short?"
    )
    assert processes_of(out) == {}


def test_a_network_that_prints_a_lot_does_not_stop_the_server(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.py").write_text(LOUD)
    words = ["train", "--runtime", "processes", "--model.name", "loud:network", "--train.epochs", "2", "--out", "run"]
    assert main(words) == 0
    assert capfd.readouterr().out.count("x" * 5000) >= 20


LOUD = """
from torch import nn

class Loud(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, z):
        print("x" * 5000)
        return self.layer(z)

def network(sample_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU()), Loud(classes)
"""


def test_a_failing_client_of_a_command_is_said_once(tmp_path, monkeypatch, capfd):
    """NaN in a client process: one line, from the command, with the side and the step."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "--runtime", "processes", "--train.lr", "1e30", "--train.schedule", "constant", "--out", "run"]
    assert main(words) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"halfpass: (client 0, auxiliary loss|server, batch of client 0), epoch 1, step [23]: "
                        r"expected a finite loss, found (nan|inf); lower train.lr\n", err), err  # fmt: skip


def test_a_client_that_never_comes_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "JOIN_SECONDS", 0.5)
    with pytest.raises(RunError, match=r"expected 2 clients within 0.5 s, found none with number 0, 1; start them"):
        server_process.serve(config(tmp_path / "run"), "127.0.0.1:0", lambda port: None)
    assert not (tmp_path / "run").exists()
