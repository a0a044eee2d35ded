"""Flower: the package's two apps, by a grid in this process, by a real simulation, and by a SuperLink with SuperNodes."""

import json
import multiprocessing
import re
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from plain import equal
from safetensors.torch import load_file

flwr = pytest.importorskip("flwr")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from engines import Flower, write_app  # noqa: E402
from flwr.app import Context, RecordDict  # noqa: E402
from flwr.app.error import Error  # noqa: E402
from flwr.app.message import Message  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from halfpass.config import Config, WireConfig, flatten  # noqa: E402
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError  # noqa: E402
from halfpass.flower import __main__ as command  # noqa: E402
from halfpass.flower import client_app, server_app, stream  # noqa: E402
from halfpass.flower.exchange import FlowerExchange, as_record, of_record  # noqa: E402
from halfpass.flower.settings import client_of, config_of, stream_of  # noqa: E402
from halfpass.run.records import read_result  # noqa: E402
from halfpass.run.train import train  # noqa: E402

SETTINGS = {
    "clients.count": 2, "clients.rounds": 2, "train.epochs": 2, "train.batch_size": 32, "train.threads": 1,
    "data.limit": 300, "wire.codec": "int4+zstd",
}  # fmt: skip


class Grid:
    """Two nodes, whose ClientApp answers as messages are pushed; `errors`: by number of the message so far."""

    def __init__(self, run_config, errors=(), nodes=2):
        self.contexts = {100 + k: Context(7, 100 + k, {"partition-id": k}, RecordDict(), dict(run_config)) for k in range(nodes)}
        self.errors, self.replies, self.count = dict(errors), {}, 0

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(self.count)
            numbers.append(str(self.count))
            if (code := self.errors.get(self.count)) is not None:
                self.replies[numbers[-1]] = Message(Error(code, "so it is"), reply_to=message)
            else:
                self.replies[numbers[-1]] = client_app.app(message, self.contexts[message.metadata.dst_node_id])
            self.count += 1
        return numbers

    def pull_messages(self, numbers):
        return [self.replies.pop(number) for number in numbers if number in self.replies]


def answered(message, context):
    for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 1)):
        setattr(TaskIdentity, name, value)
    return client_app.app(message, context)


@pytest.fixture(scope="module")
def processes():
    """For ClientApps that train beside each other."""
    method = multiprocessing.get_context("forkserver")
    method.set_forkserver_preload(["halfpass.flower.client_app"])
    return method


class Streaming(Grid):
    """Whose ClientApps answer beside each other, each in a process, as long as they like."""

    def __init__(self, processes, *more, **named):
        super().__init__(*more, **named)
        self.processes = processes

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number, self.count = str(self.count), self.count + 1
            message.metadata.__dict__["_message_id"] = number
            threading.Thread(target=self._answer, args=(number, message), daemon=True).start()
            numbers.append(number)
        return numbers

    def _answer(self, number, message):
        if (code := self.errors.get(int(number))) is not None:
            reply = Message(Error(code, "so it is"), reply_to=message)
        else:
            with ProcessPoolExecutor(1, self.processes) as pool:
                reply = pool.submit(answered, message, self.contexts[message.metadata.dst_node_id]).result()
        self.replies[number] = reply


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    for name, value in (("_run_id", 7), ("_node_id", 1), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def run_server(run_config, grid):
    server_app.app(grid, Context(7, 1, {}, RecordDict(), dict(run_config)))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The run of SETTINGS in one process."""
    folder = tmp_path_factory.mktemp("local") / "run"
    config = config_of(SETTINGS | {"out": str(folder)}, 7)
    train(Config(**{**vars(config), "runtime": "local"}))
    return folder


def check_equal(local, run):
    for owner in ("server", "client-0", "client-1"):
        one, other = (load_file(folder / f"{owner}.safetensors") for folder in (local, run))
        assert equal(one, other), owner
        assert not equal(one, {name: value + 1 for name, value in other.items()})
    result = read_result(run)
    assert (result["engine"], result["test_accuracy"]) == ("flower", read_result(local)["test_accuracy"])
    assert (run / "report.html").is_file()


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_the_apps_train_bit_for_bit_as_one_process(tmp_path, local):
    settings = SETTINGS | {"out": str(tmp_path / "run")}
    run_server(settings, Grid(settings))
    check_equal(local, tmp_path / "run")


def test_messages_that_flower_gives_up_are_sent_again(tmp_path, local):
    """A killed ClientApp is error 8, a lost node 5."""
    settings = SETTINGS | {"out": str(tmp_path / "run")}
    grid = Grid(settings, errors={0: 8, 3: 5, 5: 8, 6: 8})
    run_server(settings, grid)
    assert grid.count > 10
    check_equal(local, tmp_path / "run")
    said = events(tmp_path / "run")
    assert [event for event in said if event["event"] in ("lost", "failed")] == [
        event | {"level": "warning", "event": "lost", "client": event["client"]} for event in said if "; sending message" in event["text"]
    ] != []
    assert said[-1]["event"] == "done"


def test_an_app_that_raises_ends_the_run_and_is_named(tmp_path):
    settings = SETTINGS | {"out": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"client \d: expected a reply, found the client's app raised an error \(so it is\)"):
        run_server(settings, Grid(settings, errors={3: 2}))
    assert not (tmp_path / "run" / "result.json").exists()
    last = events(tmp_path / "run")[-1]
    assert (last["level"], last["event"]) == ("error", "failed")
    assert "the client's app raised an error (so it is)" in last["text"]
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    with pytest.raises(InputError, match="expected a folder without a run"):
        run_server(settings, Grid(settings))
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("nodes", [1, 3])
def test_another_number_of_nodes_is_refused(tmp_path, monkeypatch, nodes):
    monkeypatch.setattr("halfpass.flower.exchange.NODES_SECONDS", 0.3)
    settings = SETTINGS | {"out": str(tmp_path / "run")}
    with pytest.raises(InputError, match=f"nodes: expected 2, one for each client, found {nodes}"):
        run_server(settings, Grid(settings, nodes=nodes))
    assert not (tmp_path / "run").exists()


def test_a_node_without_its_number_is_refused_and_named(tmp_path):
    settings = SETTINGS | {"out": str(tmp_path / "run")}
    grid = Grid(settings)
    grid.contexts[101].node_config = {}
    with pytest.raises(PassedOnError, match=r"node 101: node configuration: expected the number of its client, from 0, as partition-id, found none"):
        run_server(settings, grid)
    assert not (tmp_path / "run").exists()


def test_streams_train_bit_for_bit_as_one_process_and_leave_no_keys(tmp_path, local, processes, monkeypatch, caplog):
    """With tokens, by TLS: what Flower carries is the way in. What it gives up is sent again."""
    settings = SETTINGS | {"out": str(tmp_path / "run"), "flower.stream": "127.0.0.1:0"}
    made, secrets, folders = stream.make_certificates, [], []

    def make(folder, **more):
        folders.append(folder)
        files = made(folder, **more)
        secrets.extend(file.read_bytes().strip() for file in files if file.suffix == ".token")
        secrets.extend(b"".join(file.read_bytes().split(b"-----")[2:3]).split(b"\n")[1] for file in files if "key" in file.name)
        return files

    monkeypatch.setattr(stream, "make_certificates", make)
    grid = Streaming(processes, settings, {0: 8, 3: 8, 4: 5})
    run_server(settings, grid)
    assert grid.count == 4 + 3
    check_equal(local, tmp_path / "run")
    assert not folders[0].exists()
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert len({secret for secret in secrets if len(secret) > 30}) == 4  # two tokens, the authority's and the server's key
    assert not any(secret in written or secret in caplog.text.encode() for secret in secrets)


def test_a_stream_s_server_names_the_node_that_cannot_join_at_once(tmp_path, processes):
    settings = SETTINGS | {"out": str(tmp_path / "run"), "flower.stream": "127.0.0.1:0"}
    grid = Streaming(processes, settings)
    grid.contexts[101].run_config["train.lr"] = 0.5
    with pytest.raises(HalfpassError, match=r"client 1 at joining: expected train.lr 0.2 \(the server's\), found 0.5"):
        run_server(settings, grid)
    grid = Streaming(processes, settings, {3: 2})
    with pytest.raises(RunError, match=r"client \d: expected a reply, found the client's app raised an error"):
        run_server(settings, grid)
    grid = Streaming(processes, settings)
    grid.contexts[101].node_config = {}
    with pytest.raises(HalfpassError, match=r"node 101: node configuration: expected the number of its client"):
        run_server(settings, grid)
    grid.contexts[101].node_config = {"partition-id": 0}
    with pytest.raises(InputError, match=r"node 10\d: expected a client number of its own, from 0 to 1, found 0"):
        run_server(settings, grid)
    with pytest.raises(InputError, match="nodes: expected 2, one for each client, found 3"):
        run_server(settings, Streaming(processes, settings, nodes=3))
    assert not list((tmp_path / "run").glob("*.json"))


def throw(error):
    raise error


def test_a_grid_that_is_gone_ends_the_run(monkeypatch):
    """One that is back soon has every message."""
    monkeypatch.setattr("halfpass.flower.exchange.LONGEST_PAUSE", 0.01)
    grid, push = Grid(SETTINGS), Grid.push_messages
    gone = [ConnectionError("for now")] * 5
    monkeypatch.setattr(grid, "push_messages", lambda messages: throw(gone.pop()) if gone else push(grid, messages))
    exchange = FlowerExchange(grid, 2, 60)
    exchange.send(100, b"no message")
    assert b"expected the messages of a round, found 10 bytes" in exchange.receive(10).data
    exchange.close()
    monkeypatch.setattr(grid, "push_messages", lambda messages: throw(ConnectionError("gone")))
    exchange = FlowerExchange(grid, 2, 60)
    exchange.send(100, b"one")
    with pytest.raises(RunError, match="Flower: expected a grid that carries messages, found ConnectionError"):
        exchange.receive(10)
    exchange.close()


def test_bytes_come_out_of_a_record_as_they_went_in():
    data = bytes(range(256)) * 40
    assert of_record(as_record(data), "it") == data
    with pytest.raises(InputError, match="it: expected a message of halfpass, found another"):
        of_record(RecordDict(), "it")


def test_settings_have_the_usual_names():
    config = config_of({"train.lr": 0.5, "data.limit": "", "method": "decoupled"}, 12)
    assert (config.train.lr, config.data.limit, config.out, config.runtime) == (0.5, None, "runs/flower-12", "processes")
    assert config.wire == WireConfig()
    assert set(flatten(SETTINGS)) == set(SETTINGS)
    for wrong, said in (
        ({"train.lrr": 1}, r"expected a known key, found 'train.lrr'; did you mean 'train.lr'"),
        ({"train.epochs": "many"}, r"train.epochs: expected a whole number, found 'many'"),
        ({"flower.streams": ""}, r"expected a known key, found 'flower.streams'"),
        ({"runtime": "local"}, r"runtime: expected none on Flower"),
    ):
        with pytest.raises(InputError, match=said):
            config_of(wrong, 1)
    assert (stream_of({}), stream_of({"flower.stream": ""}), stream_of({"flower.stream": "[::1]:80"})) == (None, None, "[::1]:80")
    for wrong in ("here", ":80", "here:", "here:65536", "here:-1", 7):
        with pytest.raises(InputError, match=r"flower.stream: expected HOST:PORT"):
            stream_of({"flower.stream": wrong})
    assert client_of({"partition-id": 3, "num-partitions": 4}) == 3
    for wrong in ({}, {"partition-id": -1}, {"partition-id": "0"}, {"partition-id": True}):
        with pytest.raises(InputError, match="node configuration: expected the number of its client"):
            client_of(wrong)


# ------------------------------------------------------------------------------------------------ Flower's own processes

@pytest.mark.parametrize(("change", "said"), [
    ({"train.lrr": 1}, "halfpass: configuration: expected a known key, found 'train.lrr'; did you mean 'train.lr'?\n"),
    ({"method": "conventional"}, "halfpass: method: expected decoupled in rounds, where nothing comes back for a batch, found conventional; give method decoupled, or use halfpass serve and join\n"),
])  # fmt: skip
def test_an_app_s_settings_are_checked_before_flower_starts(tmp_path, capsys, change, said):
    app = write_app(tmp_path / "app", SETTINGS | change)
    assert (command.main([str(app)]), capsys.readouterr().err) == (2, said)
    given = " ".join(f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in change.items())
    app = write_app(tmp_path / "other", SETTINGS)
    assert (command.main([str(app), "--run-config", given]), capsys.readouterr().err) == (2, said)


def test_an_engine_that_is_not_installed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flwr.common.config", None)
    assert command.main([str(write_app(tmp_path / "app", SETTINGS))]) == 2
    assert capsys.readouterr().err == "halfpass: flwr: expected Flower, found none; pip install 'halfpass[flower]'\n"


def test_no_app_is_said(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"halfpass: APP: expected a folder with an app's pyproject.toml, found none in {tmp_path}; ")
    (tmp_path / "pyproject.toml").write_text("[tool]\n")
    assert command.main([str(tmp_path)]) == 2
    assert "expected TOML with [tool.flwr.app]" in capsys.readouterr().err


@pytest.fixture
def flower(tmp_path):
    processes = Flower(tmp_path)
    yield processes
    processes.stop()


def test_a_simulation_trains_bit_for_bit_as_one_process(flower, tmp_path, local):
    flower.superlink("--simulation")
    app = write_app(tmp_path / "app", SETTINGS | {"out": str(tmp_path / "run")})
    done = flower.run(app, "--federation-config", "num-supernodes=2 client-resources-num-cpus=2")
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(local, tmp_path / "run")


def test_a_superlink_with_two_supernodes_trains_as_one_process_and_a_failed_run_is_told(flower, tmp_path, local):
    """By streams: rounds would start a Python process for each message."""
    flower.superlink()
    for k in range(2):
        flower.supernode(k)
    app = write_app(tmp_path / "app", SETTINGS | {"out": str(tmp_path / "run"), "flower.stream": "127.0.0.1:0"})
    done = flower.run(app)
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(local, tmp_path / "run")
    done = flower.run(app)  # there is a run in that folder
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"out: expected a folder without a run, found \S+ in \S+", done.stdout)
