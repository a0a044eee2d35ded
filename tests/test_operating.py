"""What an operator sees of a run: logs, health, figures, status, of real processes on loopback."""

import contextlib
import http.client
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import commands
import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from rich.console import Console

from halfpass.commands.certs import make_certificates
from halfpass.commands.cli import main
from halfpass.commands.status import as_json, show
from halfpass.config import Config, LogConfig, MetricsConfig, TlsConfig
from halfpass.errors import InputError, RunError
from halfpass.run import logs, overview
from halfpass.run.credentials import TOKEN, trust_of, trust_to_ask
from halfpass.run.metrics import ServerFigures, listening
from halfpass.run.overview import Overview, Pace
from halfpass.wire import asking
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.asking import ask_status
from halfpass.wire.connection import Connection
from halfpass.wire.hub import Hub
from halfpass.wire.trust import Trust

START_SECONDS = 60


class Command:
    """A process, and the JSON lines that it has written to standard error so far."""

    def __init__(self, *words):
        read, write = os.pipe()
        self.process = commands.start(words, Path.cwd(), subprocess.PIPE, write)
        os.close(write)
        errors = os.fdopen(read)
        self.lines, self.printed = [], []
        self._readers = [
            threading.Thread(target=lambda: self.lines.extend(map(json.loads, errors))),
            threading.Thread(target=lambda: self.printed.extend(self.process.stdout)),
        ]
        for reader in self._readers:
            reader.start()

    def event(self, name):
        return until(lambda: next((line for line in self.lines if line["event"] == name), None), self)

    def end(self):
        status = self.process.wait(START_SECONDS)
        for reader in self._readers:
            reader.join()
        return status


def until(ready, *commands):
    deadline = time.monotonic() + START_SECONDS
    while not (found := ready()):
        assert time.monotonic() < deadline, [command.lines for command in commands]
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def running(*words):
    command = Command(*words)
    try:
        yield command
    finally:
        command.process.kill()
        command.end()


def figures(address):
    with urllib.request.urlopen(address, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def settled(address, before):
    time.sleep(0.2)
    counts = [name for name in before if name.startswith("halfpass_") and "seconds" not in name and "loss" not in name]
    now = figures(address)
    return all(now[name] == before[name] for name in counts)


def asked(address, trust=None, service=""):
    options = [("grpc.ssl_target_name_override", "localhost")]
    made = grpc.insecure_channel(address) if trust is None else grpc.secure_channel(address, trust.channel_credentials(), options)
    with made as channel:
        return HealthStub(channel).Check(HealthCheckRequest(service=service), timeout=3).status


def status(capsys, *words):
    capsys.readouterr()
    code = main(["status", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_that_is_watched(tmp_path, capsys):
    settings = ["--data.limit", "256", "--train.epochs", "20", "--train.batch_size", "32", "--train.threads", "1",
                "--log.json", "true", "--metrics.port", "0"]  # fmt: skip
    with running("serve", *settings, "--bind", "127.0.0.1:0", "--out", str(tmp_path / "server")) as server:
        address = server.event("listening")["address"]
        assert asked(address) == asked(address, service="halfpass.SplitLearning") == HealthCheckResponse.SERVING
        code, out, _ = status(capsys, address, "--json")
        assert (code, json.loads(out)["phase"], json.loads(out)["clients"][0]["state"]) == (0, "joining", "not joined")
        metrics = server.event("metrics")["address"]
        assert figures(metrics)["halfpass_connected_clients"] == 0
        with running("join", address, *settings, "--out", str(tmp_path / "client")) as client:
            applied = 'halfpass_batches_applied_total{client="0"}'
            until(lambda: figures(metrics).get(applied, 0) > 8, server, client)
            own = figures(client.event("metrics")["address"])
            client.process.send_signal(signal.SIGSTOP)  # so that nothing changes while it is asked
            until(lambda: (before := figures(metrics))['halfpass_lag_messages{client="0"}'] == 0 and settled(metrics, before), server)
            said, (code, out, _), (_, table, _) = figures(metrics), status(capsys, address, "--json"), status(capsys, address)
            client.process.send_signal(signal.SIGCONT)
            last = said
            with contextlib.suppress(OSError, http.client.HTTPException):  # at the end it is there no more
                while True:
                    last = figures(metrics)
            assert client.end() == 0
        assert server.end() == 0
    check_figures(said, own)
    check_status(json.loads(out), table, said)
    ledger = (tmp_path / "server" / "ledger.csv").read_text().splitlines()
    assert last[applied] == len(ledger) - 1 == 20 * 8
    assert last["halfpass_samples_total"] == 20 * 256
    check_lines(server.lines, {"metrics", "listening", "joined", "checkpoint", "test", "epoch", "done"})
    check_lines(client.lines, {"metrics", "joined", "checkpoint", "epoch", "done"})
    code, _, err = status(capsys, address)
    assert (code, err) == (2, f"halfpass: server address: expected a halfpass server within 1 s, found none at {address}; start one with halfpass serve\n")


def check_figures(said, own):
    steps = said['halfpass_batches_applied_total{client="0"}']
    assert said["halfpass_samples_total"] == 32 * steps
    assert said["halfpass_step_seconds_count"] == said['halfpass_step_seconds_bucket{le="+Inf"}'] == steps
    assert 0 < said["halfpass_step_seconds_sum"] < 60
    assert said["halfpass_connected_clients"] == said["halfpass_clients"] == said['halfpass_client_connected{client="0"}'] == 1
    assert said['halfpass_lag_messages{client="0"}'] == said['halfpass_queue_messages{client="0"}'] == 0
    assert said['halfpass_reconnections_total{client="0"}'] == said['halfpass_refused_total{what="newcomer"}'] == 0
    assert 0 < said["halfpass_training_loss"] < 5 or said["halfpass_epoch_step"] == 0  # of an epoch that has just begun
    assert said["halfpass_epochs"] == 20
    assert said["halfpass_last_checkpoint_timestamp_seconds"] == pytest.approx(time.time(), abs=60)
    sent = said['halfpass_bytes_total{client="0",direction="up",kind="activations"}']
    assert 32 * 8 * 8 * 4 <= sent / (32 * steps) < 32 * 8 * 8 * 4 * 1.01  # float32, with what says so
    assert own["halfpass_connected"] == 1
    assert own["halfpass_applied_messages"] <= own["halfpass_made_messages"]
    assert own["process_resident_memory_bytes"] > 2**20


def check_status(said, table, figures):
    (client,) = said["clients"]
    assert said["phase"] in ("training", "testing")
    assert (said["epochs"], said["steps"], said["clients_count"], said["connected"]) == (20, 8, 1, 1)
    assert said["epoch"] == figures["halfpass_epoch"]
    assert said["step"] == client["step"] == figures["halfpass_epoch_step"]
    assert said["batches_per_second"] > 0
    assert said["checkpoint"]["epoch"] == figures["halfpass_last_checkpoint_epoch"]
    assert 0 <= said["checkpoint"]["seconds_ago"] < 60
    assert (client["state"], client["received"] - client["applied"], client["reconnections"]) == ("connected", 0, 0)
    assert re.search(rf"run {said['run']}: (training|testing), epoch {said['epoch']} of 20, step {said['step']} of 8, [\d.]+ batches/s\n", table)
    assert "1 of 1 client(s) connected\nlast checkpoint: epoch " in table
    assert f" {client['step']}/8 " in table


def check_lines(lines, events):
    assert events <= {line["event"] for line in lines}
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("info", "warning")
        assert line["text"]
    assert [line["client"] for line in lines if line["event"] == "joined"] == [0]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == list(range(1, 21))
    kept = [line for line in lines if line["event"] == "checkpoint"]
    assert len(kept) <= 1 + 60 // logs.SELDOM_SECONDS  # of more than twenty


@pytest.mark.parametrize("words", [["serve", "--bind", "127.0.0.1:0"], ["join", "127.0.0.1:1"]])
def test_a_port_for_figures_that_is_in_use(tmp_path, capsys, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*words, "--metrics.port", str(port), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"halfpass: metrics.port: expected a free port of this machine, found 127.0.0.1:{port} (Address already in use); choose another\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_training_in_one_process_has_no_figures(tmp_path, capsys):
    assert main(["train", "--metrics.port", "0", "--out", str(tmp_path / "run")]) == 2
    assert "metrics.port: expected none in a training in one process, found 0; leave it out, or" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_is_a_json_line_too(tmp_path):
    with running("join", "127.0.0.1:1", "--client", "7", "--log.json", "true", "--debug", "--out", str(tmp_path / "run")) as client:
        assert client.end() == 2
        (line,) = client.lines
    assert (line["event"], line["level"]) == ("failed", "error")
    assert line["text"].startswith("client: expected a number from 0 to 0, found 7")
    assert "InputError" in line["traceback"]


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("certs")
    make_certificates(base / "ours", clients=1)
    make_certificates(base / "others", clients=1)
    make_certificates(base / "tokens", clients=1, tokens=True)
    return base


@contextlib.contextmanager
def served(trust, **options):
    seen = Overview(Config())
    hub = Hub(
        "127.0.0.1:0", clients=1, window_bytes=2**20, timeout=5, admit=lambda join: None,
        check=lambda client, batch: None, trust=trust, status=seen.status, **options,
    )  # fmt: skip
    seen.hub = hub
    try:
        yield hub
    finally:
        hub.stop()


def test_with_tls_only_whom_the_authority_trusts_may_ask(folders, monkeypatch, caplog, capsys):
    monkeypatch.delenv(TOKEN, raising=False)
    ours = folders / "ours"
    with served(trust_of(TlsConfig(folder=str(ours)), "server")) as hub:
        address = f"127.0.0.1:{hub.port}"
        trust = trust_to_ask(TlsConfig(folder=str(ours)))
        assert ask_status(address, trust).phase == "joining"
        assert asked(address, trust) == HealthCheckResponse.SERVING
        of_server = TlsConfig(**{part: str(ours / f"{name}.pem") for part, name in (("certificate", "server"), ("key", "server-key"), ("authority", "authority"))})
        assert ask_status(address, trust_to_ask(of_server)).clients_count == 1
        for wrong, said in (
            (Trust(authority=ours / "authority.pem"), "found none; give --tls.folder"),
            (trust_to_ask(TlsConfig(folder=str(folders / "others"))), "copy the server's authority.pem"),
            (None, "expected a server without TLS, found one that wants TLS"),
        ):
            with pytest.raises(InputError, match=said):
                ask_status(address, wrong)
        with pytest.raises(InputError, match="expected a connection with TLS, found one to the port behind it"):
            ask_status(f"127.0.0.1:{hub._front._backend}")  # the port behind the door
        until(lambda: hub.refusals == {"connection": 2 + 1, "newcomer": 1})  # which is counted behind the client's back
        assert status(capsys, address, "--tls.folder", str(ours), "--json")[0] == 0
        assert status(capsys, address)[0] == 2
    assert "refused to say: status: expected a connection with TLS" in caplog.text


def test_tokens_may_ask_and_others_not(folders, monkeypatch, caplog):
    folder = folders / "tokens"
    alone = TlsConfig(authority=str(folder / "authority.pem"))
    with served(trust_of(TlsConfig(folder=str(folder)), "server")) as hub:
        address = f"127.0.0.1:{hub.port}"
        token = (folder / "client-0.token").read_text().strip()
        monkeypatch.setenv(TOKEN, token)
        assert ask_status(address, trust_to_ask(alone)).phase == "joining"
        for wrong, said in (("x" * 43, "expected a token that the server knows, found another"), (None, "or a token that it knows, found none")):
            monkeypatch.setenv(TOKEN, wrong or "") if wrong else monkeypatch.delenv(TOKEN)
            trust = trust_to_ask(alone) if wrong else Trust(authority=folder / "authority.pem")
            with pytest.raises(InputError, match=said):
                ask_status(address, trust)
        assert asked(address, Trust(authority=folder / "authority.pem")) == HealthCheckResponse.SERVING  # whether it lives, anybody
        monkeypatch.delenv(TOKEN, raising=False)
        with pytest.raises(InputError, match=r"tls: expected a certificate or token, found none; give --tls.folder"):
            trust_to_ask(alone)
    assert token not in caplog.text


def test_a_loss_is_told_and_counted(caplog):
    drawn = random.getstate()
    with caplog.at_level(logging.INFO, "halfpass"), served(None, reconnect=20.0, run="one") as hub:
        address = f"127.0.0.1:{hub.port}"
        connection = Connection(address, window_bytes=2**20, timeout=5, reconnect=20.0)
        connection.send(pb.ClientMessage(join=pb.Join(client=0)))
        connection.receive("joined")
        connection._link.call.cancel()
        until(lambda: ask_status(address).clients[0].reconnections)
        assert ask_status(address).clients[0].state == "connected"
        assert (hub.look()[0].reconnections, connection.look().reconnections) == (1, 1)
        until(lambda: connection.look().away is None)
        assert random.getstate() == drawn  # a network that draws from Python's generator trains the same
        connection.leave()
        until(lambda: ask_status(address).clients[0].state == "away")
        assert ask_status(address).connected == 0
    told = [(record.event, getattr(record, "client", None), getattr(record, "host", None)) for record in caplog.records if hasattr(record, "event")]
    assert {("joined", 0, "127.0.0.1"), ("lost", 0, None), ("back", 0, "127.0.0.1"), ("lost", None, None), ("back", None, None), ("left", 0, None)} == set(told)
    assert "client 0 left; waiting for it for 20 s" in caplog.text


def test_nobody_may_join_before_a_kept_state_is_taken_up():
    with served(None, reconnect=20.0, run="one", opened=False) as hub:
        address = f"127.0.0.1:{hub.port}"
        assert asked(address) == asked(address, service="halfpass.SplitLearning") == HealthCheckResponse.NOT_SERVING
        connection = Connection(address, window_bytes=2**20, timeout=5, reconnect=20.0, run="one")
        connection.send(pb.ClientMessage(join=pb.Join(client=0)))
        until(lambda: connection.look().away is not None)
        assert hub.look() == []
        hub.open()
        connection.receive("joined")
        assert asked(address) == asked(address, service="halfpass.SplitLearning") == HealthCheckResponse.SERVING
        connection.leave()


def test_health_ends_with_the_run():
    with served(None) as hub:
        address = f"127.0.0.1:{hub.port}"
        with grpc.insecure_channel(address) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                next(HealthStub(channel).Watch(HealthCheckRequest(), timeout=3))  # which would keep a thread
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert asked(address) == HealthCheckResponse.SERVING
        hub.fail("because")
        assert asked(address) == HealthCheckResponse.NOT_SERVING


def test_another_machine_is_asked_with_tls_alone(capsys):
    code, _, err = status(capsys, "10.1.2.3:7465")
    assert code == 2
    assert "expected a loopback host (127.0.0.1, localhost, [::1]) without TLS" in err
    assert status(capsys, "127.0.0.1")[2].startswith("halfpass: server address: expected HOST:PORT, found '127.0.0.1'")


def test_who_does_not_answer_or_knows_no_status(monkeypatch):
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.5)
    asleep = threading.Event()
    for handlers, error, said in (
        ({}, InputError, "expected a halfpass server that says how far it is, found one that does not"),
        ({"Status": grpc.unary_unary_rpc_method_handler(lambda request, context: asleep.wait(3))}, RunError, "expected an answer within 0.5 s, found deadline_exceeded"),
    ):
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("halfpass.SplitLearning", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(error, match=said):
            ask_status(f"127.0.0.1:{port}")
        asleep.set()
        server.stop(0)


# --- parts ------------------------------------------------------------------------------------------------------------


def test_how_often_an_answer_is_made_anew():
    made = []

    def answer():
        made.append(1)
        return pb.StatusReply(phase="training")

    hub = Hub("127.0.0.1:0", clients=1, window_bytes=2**20, timeout=5, admit=lambda join: None, check=lambda client, batch: None, status=answer)
    try:
        before = time.monotonic()
        assert {ask_status(f"127.0.0.1:{hub.port}").phase for _ in range(5)} == {"training"}
        assert len(made) <= 1 + (time.monotonic() - before) / 0.2
    finally:
        hub.stop()


def test_a_reply_is_bounded():
    many = Overview(Config(clients=Config().clients.__class__(count=2**16)))
    reply = many.status()
    assert len(reply.clients) == 1000
    assert reply.ByteSize() < asking.MOST_BYTES / 4


def test_a_hostile_reply_is_shown_as_it_is_or_refused():
    reply = pb.StatusReply(run="[/no]", batches_per_second=math.nan, clients=[pb.ClientStatus(state="[/no]\x1b[2J", away_seconds=math.inf)])
    shown = io.StringIO()
    show(reply, Console(file=shown))
    assert shown.getvalue().count("[/no]") == 2
    assert "\x1b" not in shown.getvalue()
    said = json.loads(as_json(reply), parse_constant=pytest.fail)
    assert (said["batches_per_second"], said["clients"][0]["away_seconds"]) == (None, None)
    many = pb.StatusReply(clients=[pb.ClientStatus()] * (asking.MOST_CLIENTS + 1))
    with pytest.raises(InputError, match="server: expected a reply of at most 1000 clients, found 1001"):
        asking.check_reply("server", many)


def test_how_fast_of_late(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(overview.time, "monotonic", lambda: now[0])
    pace = Pace([0, 1])
    assert pace.per_second() == 0
    for _ in range(200):  # 2 batches a second, for 100 seconds
        now[0] += 0.5
        pace.add(0, 8, 0.003)
    assert pace.per_second() == pytest.approx(2, rel=0.05)
    for _ in range(1000):  # 10
        now[0] += 0.1
        pace.add(1, 4, 0.02, last=False)
        pace.add(1, 4, 0.02)
    assert pace.per_second() == pytest.approx(10, rel=0.05)
    now[0] += 61
    assert pace.per_second() == 0
    assert pace.batches == {0: 200, 1: 1000}
    assert pace.samples == 200 * 8 + 1000 * 8
    assert (pace.steps[2], pace.steps[5], sum(pace.steps)) == (200, 1000, 1200)  # up to 5 ms, and up to 50


def test_what_a_step_costs_is_small():
    pace, count = Pace([0]), 20_000
    began = time.perf_counter()
    for _ in range(count):
        pace.add(0, 32, 0.001)
    assert (time.perf_counter() - began) / count < 50e-6


def test_figures_of_their_own_registry():
    from prometheus_client import REGISTRY

    with listening(MetricsConfig()) as register:
        register(ServerFigures(Overview(Config())))
    assert not any(metric.name.startswith("halfpass") for metric in REGISTRY.collect())


def test_a_json_line_is_json_whatever_is_said():
    record = logging.makeLogRecord({"msg": "a\nb \x1b %s", "args": ("c",), "levelname": "INFO", "event": "x", "loss": math.nan, "path": b"?"})
    said = json.loads(logs.JsonLines().format(record))
    assert (said["text"], said["event"], said["loss"], said["path"]) == ("a\nb \x1b c", "x", None, "b'?'")
    assert "\n" not in logs.JsonLines().format(record)


def test_often_is_info_once_in_a_while(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    seldom = logs.Seldom()
    assert [seldom.level() for _ in range(3)] == [logging.INFO, logging.DEBUG, logging.DEBUG]
    now[0] += logs.SELDOM_SECONDS
    assert seldom.level() == logging.INFO


def test_levels_and_a_program_that_logs_in_its_own_way(monkeypatch):
    root = logging.Logger("root")
    monkeypatch.setattr(logging, "getLogger", lambda name=None: root)
    own = logging.NullHandler()
    root.addHandler(own)
    logs.begin(LogConfig(level="warning"))
    assert (root.handlers, logs.LOG.level, logs.in_json()) == ([own], logging.WARNING, False)
    logs.begin(LogConfig())
    assert logs.LOG.level == logging.INFO
