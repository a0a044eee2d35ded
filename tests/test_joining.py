"""What `halfpass serve` prints can be typed; `halfpass join` waits for a server as long as it is told."""

import shlex
import socket
import subprocess
import threading
import time

import pytest
from commands import start

from halfpass.commands import cli, joining
from halfpass.commands.certs import make_certificates
from halfpass.config import Config, TlsConfig, from_dict, nested
from halfpass.run import setup
from halfpass.wire.reach import reach
from halfpass.wire.service import Interrupted


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parsed(command):
    """The settings that a client takes from the command."""
    return cli._parse(shlex.split(command.partition(";")[0])[1:])["join"]


SETTINGS = {"train.epochs": 3, "train.nesterov": False, "train.momentum": 0.5, "data.limit": 64, "data.path": None,
            "task.class_weights": [1.0, 2.0], "wire.codec": "int8+zstd", "clients.count": 2, "out": "runs/here",
            "server.replay": 2, "model.cut": "block_1", "log.json": True}  # fmt: skip


def test_a_client_gets_the_settings_that_both_must_have(tmp_path):
    config = from_dict(nested(SETTINGS))
    said = joining.join_command(config, "127.0.0.1:7465", insecure=False)
    client = parsed(said)
    assert (client.address, client.client) == ("127.0.0.1:7465", 0)
    assert setup.agreed_settings(client.config_object) == setup.agreed_settings(config)
    assert client.config_object.data == config.data
    assert said.endswith("; the others have --client 1 to 1")
    for own in ("runs/here", "replay", "json"):
        assert own not in said


def test_what_a_file_says_is_not_said_again(tmp_path):
    (tmp_path / "a file.yaml").write_text("{train: {epochs: 3, lr: 0.5}, out: runs/x}")
    config = from_dict({"train": {"epochs": 7, "lr": 0.5}})
    said = joining.join_command(config, "h:1", insecure=True, files=["a file.yaml"])
    assert said == "halfpass join h:1 --config 'a file.yaml' --train.epochs 7 --client 0 --insecure"
    assert parsed(said).config_object.train == config.train


def test_the_name_of_the_machine(tmp_path):
    make_certificates(tmp_path / "keys", clients=1, hosts=["server.example"])
    secure = Config(tls=TlsConfig(folder="keys"))
    said = joining.join_command(secure, "0.0.0.0:7465", insecure=False)
    assert said == "halfpass join server.example:7465 --client 0 --tls.folder keys"
    assert joining.join_command(Config(), "[::]:7", insecure=True) == f"halfpass join {socket.gethostname()}:7 --client 0 --insecure"


def test_the_printed_command_joins_and_waits(tmp_path):
    """Typed as it was printed, by a client of another folder."""
    words = ["--data.limit", "64", "--train.epochs", "1", "--train.batch_size", "16", "--train.threads", "1", "--bind", "127.0.0.1:0", "--out", "run"]
    with (tmp_path / "err").open("w") as errors:
        server = start(["serve", *words], tmp_path, subprocess.PIPE, errors.fileno())
        try:
            line = server.stdout.readline()
            command = line.partition(": ")[2].strip()
            assert command.startswith("halfpass join 127.0.0.1:")
            (tmp_path / "site").mkdir()
            client = start([*shlex.split(command)[1:], "--wait", "60"], tmp_path / "site", errors.fileno(), errors.fileno())
            assert client.wait(90) == 0, (tmp_path / "err").read_text()
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert "waiting for a server" in (tmp_path / "err").read_text()
    assert list((tmp_path / "site").glob("runs/*/client-0.safetensors"))


def late(address, seconds):
    """A server that is there after a while, and answers."""
    time.sleep(seconds)
    with socket.create_server(address) as listener, listener.accept()[0] as connection:
        connection.sendall(b"\0\0\0\4\0\0\0\0\0")
        connection.recv(64)


def test_a_server_that_comes_later_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = found.getsockname()
    server = threading.Thread(target=late, args=(address, 0.5), daemon=True)
    server.start()
    began = time.monotonic()
    reach("{}:{}".format(*address), None, 20)
    assert 0.4 < time.monotonic() - began < 10
    server.join(5)
    with pytest.raises(Interrupted):
        reach("127.0.0.1:1", None, 60, leaving=lambda: True)


@pytest.mark.parametrize(("wait", "said"), [
    ("0.3", "server address: expected a halfpass server within 0.3 s, found none at 127.0.0.1:1; start one with halfpass serve"),
    ("-1", "--wait: expected 0 to 604800 seconds, found -1; correct it"),
    ("nan", "wait: expected a number, found 'nan'; change it"),
])  # fmt: skip
def test_waiting_has_an_end(capsys, wait, said):
    assert cli.main(["join", "127.0.0.1:1", "--data.limit", "64", "--train.batch_size", "16", "--train.threads", "1", f"--wait={wait}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)
