"""`halfpass check`: it refuses what the commands refuse, in their words, all of it at once, and starts nothing."""

import collections
import shutil
import socket

import pytest

from halfpass.commands import check
from halfpass.commands.certs import make_certificates
from halfpass.commands.cli import main

SMALL = ["--data.limit", "64", "--train.batch_size", "16", "--train.threads", "1"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def checked(capsys, *words, status=0):
    """The lines by the thing that was checked: (verdict, what is said)."""
    assert main(["check", *SMALL, *words]) == status, capsys.readouterr().err
    said = capsys.readouterr().out.splitlines()
    return {line[10:23].strip(): (line[:8].strip(), line[25:]) for line in said if line[8:10] == "  "}


def test_what_is_good_passes_and_leaves_nothing(capsys, tmp_path):
    lines = checked(capsys, "--clients.count", "2", "--wire.codec", "int8")
    assert {verdict for verdict, _ in lines.values()} == {"ok"}
    assert list(lines) == ["settings", "data", "samples", "task", "network", "step", "bytes", "run folder", "disk", "tls"]
    assert lines["samples"][1] == "32 for each client, 2 batches in an epoch"
    assert "cut behind block_2, 32×8×8 crosses" in lines["network"][1]
    assert list(tmp_path.iterdir()) == []


def test_the_bytes_are_those_that_a_training_sends(capsys):
    """Of whole batches: 2 for each client and epoch."""
    import json
    from pathlib import Path

    words = ["--clients.count", "2", "--train.epochs", "3", "--wire.every", "2"]
    said = checked(capsys, *words)["bytes"][1]
    assert main(["train", *SMALL, *words, "--out", "run"]) == 0
    up = json.loads(Path("run/result.json").read_text())["bytes"]["up"]
    sent = (sum(up.values()) - up["weights"]) / 2
    assert f"in all {sent / 1e6:,.3g} MB of training batches" in said


@pytest.mark.parametrize("words", [
    ["--wire.codec", "gzip"], ["--train.device", "tpu"], ["--task", "regresion"], ["--metrics.port", "1"],
    ["--data.name", "cifr10"], ["--data.name", "cifar10"], ["--data.path", "x"], ["--data.name", "nomodule:data"],
    ["--clients.count", "5000"], ["--train.batch_size", "65"], ["--clients.rounds", "9"],
    ["--task", "regression"], ["--model.name", "resnet21"], ["--model.cut", "blok_2"], ["--model.head", "conv", "--model.cut", "pool"],
    ["--wire.window", "1000"], ["--wire.budget", "1000"], ["--model.weights", "none.pt"],
    ["--method", "centralized", "--train.batch_size", "100"],
    ["--out", "file/x"], ["--clients.alpha", "3"], ["--method", "centralized", "--server.replay", "2"],
])  # fmt: skip
def test_train_says_the_same(capsys, tmp_path, words):
    (tmp_path / "file").write_text("")
    assert main(["train", *SMALL, *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1].removeprefix("halfpass: ")
    lines = checked(capsys, *words, status=2)
    assert ("refused", said) in lines.values()


def test_all_faults_are_said_at_once(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        lines = checked(
            capsys, "--model.cut", "blok_2", "--wire.codec", "gzip", "--bind", bind, "--out", "/proc/self/x", status=2
        )
    refused = [name for name, (verdict, _) in lines.items() if verdict == "refused"]
    assert refused[:3] == ["settings", "network", "port"] or {"settings", "network", "port"} <= set(refused)
    assert lines["port"][1] == f"server address: expected a free port, found {bind}, which is in use; choose another with --bind"
    assert lines["step"] == ("left out", "it needs network")
    assert lines["task"][0] == "ok"
    assert main(["check", *SMALL, "--model.cut", "blok_2"]) == 2
    assert capsys.readouterr().err == "halfpass: check: expected nothing refused, found 1 of 10 refused; mend what is said above\n"


def test_every_group_of_settings_is_looked_at(capsys):
    lines = checked(capsys, "--train.batch_size", "0", "--clients.alpha", "3", "--wire.window", "0", status=2)
    assert {name: verdict for name, (verdict, _) in lines.items()} == dict.fromkeys(("clients", "train", "wire"), "refused")


def test_a_step_runs_what_building_does_not(capsys, tmp_path):
    (tmp_path / "exploding.py").write_text(
        "import torch\ndef task(outputs):\n    from torchmetrics.classification import MulticlassAccuracy\n"
        "    def loss(out, y):\n        if len(y) > 4:\n            return out.sum() / 0\n        return torch.nn.functional.cross_entropy(out, y)\n"
        "    return loss, {'accuracy': MulticlassAccuracy(outputs)}\n"
    )
    lines = checked(capsys, "--task.name", "exploding:task", status=2)
    assert lines["step"][0] == "refused"
    assert "expected a finite loss" in lines["step"][1]
    assert lines["bytes"] == ("left out", "it needs step")


def test_a_file_may_be_named_first(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("model: {cut: block_1}\nout: here\n")
    assert "behind block_1" in checked_file(capsys, "run.yaml", "--train.threads", "1", "--method", "conventional")["network"][1]
    lines = checked_file(capsys, "run.yaml", "--method", "centralized", "--train.threads", "1")
    assert lines["run folder"] == ("ok", "here can be written")
    assert list(lines) == ["settings", "data", "samples", "task", "step", "run folder", "disk", "tls"]


def checked_file(capsys, file, *words):
    assert main(["check", file, *SMALL, *words]) == 0
    said = capsys.readouterr().out.splitlines()
    return {line[10:23].strip(): (line[:8].strip(), line[25:]) for line in said if line[8:10] == "  "}


def test_certificates_and_the_side_that_shows_them(capsys, tmp_path):
    keys = tmp_path / "keys"
    make_certificates(keys, clients=2, hosts=["server.example"])
    (tmp_path / "one").mkdir()
    for name in ("authority.pem", "client-0.pem", "client-0-key.pem"):
        shutil.copy(keys / name, tmp_path / "one" / name)
    two = ["--clients.count", "2", "--data.name", "csv"]  # which a server needs not
    lines = checked(capsys, *two, "--side", "server", "--tls.folder", "keys", "--address", "server.example:7465", "--bind", "0.0.0.0:0")
    assert list(lines) == ["settings", "code", "run folder", "tls", "port", "address"]
    assert lines["tls"] == ("ok", "files of server are good")
    assert lines["address"] == ("ok", "the server's certificate is for server.example")
    lines = checked(capsys, *two, "--side", "server", "--tls.folder", "keys", "--address", "other.example:7465", status=2)
    assert lines["address"][1].startswith(f"{keys}/server.pem: expected a server's certificate for other.example, found one for ".replace(f"{keys}", "keys"))
    client = ["--clients.count", "2", "--side", "client", "--tls.folder", "one"]
    assert checked(capsys, *client)["tls"] == ("ok", "files of client-0 are good")
    lines = checked(capsys, *client, "--client", "1", status=2)
    assert lines["tls"][1] == "tls: expected a certificate or token of client-1, found none in one; copy client-1.pem and client-1-key.pem, or client-1.token, there"
    assert checked(capsys, *client, "--client", "2", status=2)["settings"][1].startswith("client: expected a number from 0 to 1, found 2;")
    assert checked(capsys, "--clients.count", "2", "--tls.folder", "keys")["tls"] == ("ok", "files of server, client-0, client-1 are good")
    lines = checked(capsys, "--side", "server", "--bind", "0.0.0.0:0", status=2)
    assert lines["port"][1].startswith("server address: expected a loopback host (127.0.0.1, localhost, [::1]) without TLS, found '0.0.0.0';")


def test_a_server_needs_the_code_and_a_client_a_server_that_is_there(capsys, monkeypatch):
    lines = checked(capsys, "--side", "server", "--model.name", "nomodule:net", status=2)
    assert lines["code"][1].startswith("model.name 'nomodule:net': expected a module 'nomodule' that can be imported")
    monkeypatch.setattr(check, "REACH_SECONDS", 0.1)
    lines = checked(capsys, "--side", "client", "--address", "127.0.0.1:1", status=2)
    assert lines["address"][1] == "server address: expected a halfpass server within 0.1 s, found none at 127.0.0.1:1; start one with halfpass serve"


def test_room_and_engines(capsys, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(check.shutil, "disk_usage", lambda place: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    lines = checked(capsys, "--server.store", "kept", "--engine", "nvflare", status=2)
    assert lines["disk"][1].startswith("out: expected ")
    assert "MB of room for checkpoints and uploads, found 0.001 MB at " in lines["disk"][1]
    assert lines["engine"][1] == "--engine: expected nvflare, installed, found no package nvflare; pip install 'halfpass[nvflare]'"
    monkeypatch.setattr(check, "find_spec", lambda name: name)
    lines = checked(capsys, "--method", "conventional", "--engine", "nvflare", "--checkpoint.every", "0", status=2)
    assert lines["engine"][1].startswith("method: expected decoupled in rounds")
    assert lines["disk"][0] == "ok"


def test_sites_with_data_of_their_own(capsys, tmp_path):
    for site, names in ((0, "ab"), (1, "abc")):
        for part in ("train", "test"):
            folder = tmp_path / f"site-{site}"
            folder.mkdir(exist_ok=True)
            (folder / f"{part}.csv").write_text("x,y\n" + "".join(f"{i},{names[i % len(names)]}\n" for i in range(24)))
    (tmp_path / "own_rows.py").write_text("from torch import nn\ndef net(shape, outputs):\n    return nn.Sequential(nn.Linear(shape[0], 4), nn.Linear(4, outputs))\n")
    words = ["--data.name", "csv", "--data.path", "site-{client}", "--data.target", "y", "--clients.partition", "own", "--clients.count", "2",
             "--model.name", "own_rows:net", "--model.cut", "0", "--data.normalization", "own"]  # fmt: skip
    lines = checked(capsys, *words, status=2)
    assert lines["data"][1].startswith("client 1: expected data, class names: ['a', 'b'] (the first client's), found ['a', 'b', 'c'];")
    assert checked(capsys, *words, "--side", "client", "--client", "1")["data"][1].startswith("csv: 24 samples to train on")
