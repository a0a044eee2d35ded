"""examples/node-client: a client in another language takes part in a run over TLS, also where its stream is cut."""

import contextlib
import csv
import json
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import commands
import pytest

from halfpass.wire.messages import PROTOCOL

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "node-client"
PROTO = ROOT / "halfpass" / "wire" / "halfpass.proto"
NPM = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
STEPS, EPOCHS = 7, 3  # 200 samples in batches of 32


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A copy of the example with its packages, and certificates."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed: no node or npm on the path")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("keys", "run"))
    if not (folder / "node_modules").is_dir():
        try:
            done = subprocess.run(NPM, cwd=folder, text=True, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("npm install took longer than 120 s: no package registry can be reached")
        if done.returncode != 0:
            pytest.skip(f"npm install failed: {done.stderr.strip()[-300:]}")
    for made in (["keys"], ["tokens", "--tokens"]):
        assert commands.start(["certs", *made, "--clients", "1"], folder, subprocess.PIPE, 2).wait(120) == 0
    return folder


@contextlib.contextmanager
def served(folder, out, keys="keys"):
    """(the server's process, its port), once it listens."""
    server = commands.Command(["serve", "--config", "run.yaml", "--bind", "127.0.0.1:0", "--tls.folder", keys, "--out", out], folder)
    try:
        said = server.stdout.readline()
        assert said.startswith("listening on 127.0.0.1:"), said + server.stderr.read()
        yield server, int(said.split()[2].rpartition(":")[2])
    finally:
        server.kill()


def client(folder, port, keys="keys"):
    command = ["node", "client.js", f"localhost:{port}", str(keys), str(PROTO)]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=120)


def check(server, done, out):
    _, errors = server.communicate(timeout=120)
    assert (server.returncode, done.returncode) == (0, 0), errors + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["test_accuracy"] > 0.9, "what was uploaded is not what was meant"
    assert result["joint_test_accuracy"] > 0.9
    with (out / "ledger.csv").open(newline="") as file:
        learned = [(int(row["epoch"]), int(row["step"]), int(row["samples"])) for row in csv.DictReader(file)]
    sizes = [32] * 6 + [8]
    assert learned == [(epoch, step, sizes[step]) for epoch in range(1, EPOCHS + 1) for step in range(STEPS)]
    return errors


def test_a_client_in_another_language_takes_part(example, tmp_path):
    out = tmp_path / "run"
    with served(example, out) as (server, port):
        done = client(example, port)
        check(server, done, out)
    assert done.stderr == ""


class Cutting:
    """Hands on connections, and cuts the first behind so many bytes of its client's."""

    def __init__(self, port, most):
        self.listener, self.target, self.most, self.cut = socket.create_server(("127.0.0.1", 0)), port, most, 0
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self.listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                threading.Thread(target=self.hand_on, args=(near, far, self.most), daemon=True).start()
                threading.Thread(target=self.hand_on, args=(far, near, None), daemon=True).start()
                self.most = None

    def hand_on(self, source, sink, most):
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data)
                passed += len(data)
                if most is not None and passed > most:
                    self.cut += 1
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("most", [15_000, 33_000], ids=["in an epoch", "in a test"])
def test_it_goes_on_where_its_stream_was_cut(example, tmp_path, most):
    """An epoch is 26 kB up, with what is said at joining and the handshake; a test some 7 kB."""
    out = tmp_path / "run"
    with served(example, out) as (server, port):
        cutting = Cutting(port, most)
        done = client(example, cutting.port)
        errors = check(server, done, out)
    assert cutting.cut == 1
    assert "client 0 is back" in errors
    assert "trying to reach it again" in done.stderr


def test_a_refusal_is_said_and_the_server_goes_on(example, tmp_path):
    """With tokens."""
    other = tmp_path / "client"
    shutil.copytree(example, other, symlinks=True)
    said = json.loads((other / "join.json").read_text())
    said["settings"] = json.dumps(json.loads(said["settings"]) | {"train.batch_size": 64})
    (other / "join.json").write_text(json.dumps(said))
    with served(example, tmp_path / "run", "tokens") as (server, port):
        done = client(other, port, "tokens")
        assert done.returncode == 2
        expected = "client 0 at joining: expected train.batch_size 32 (the server's), found 64; start both sides"
        assert done.stderr.startswith(f"halfpass client: {expected}")
        check(server, client(example, port, "tokens"), tmp_path / "run")


def test_no_server_and_no_certificates_are_said(example, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = client(example, port, tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"halfpass client: {tmp_path / 'authority.pem'}: expected a file that can be read, found ENOENT; check the path\n"
    done = client(example, port)
    assert done.returncode == 2
    assert done.stderr.startswith(f"halfpass client: server at localhost:{port}: expected a connection within 10 s, found ")


def test_what_the_client_knows_of_the_run_is_what_halfpass_says():
    """Remake it as README.md there says."""
    words = re.search(r"^halfpass (agreement .*) > join.json$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)[1]
    made = commands.Command(words.split(), EXAMPLE)
    out, errors = made.communicate(120)
    assert (made.returncode, errors) == (0, "")
    assert out == (EXAMPLE / "join.json").read_text()
    assert f"const PROTOCOL = {PROTOCOL};" in (EXAMPLE / "client.js").read_text()
