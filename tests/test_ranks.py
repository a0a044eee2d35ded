"""A server of several processes, started by torchrun: the same training as one process's."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from plain import equal
from safetensors.torch import load_file
from torch import fx, nn

from halfpass.algorithm import ranks as ranks_of_algorithm
from halfpass.algorithm.ranks import parts_of
from halfpass.commands.cli import main
from halfpass.cut import CutBatch
from halfpass.run.records import read_result

HERE = Path(__file__).parent
SECONDS = 60
WORDS = ["--data.limit", "300", "--clients.count", "2", "--train.batch_size", "32", "--train.threads", "1", "--model.name", "ranks:network", "--model.cut", "below"]


def torchrun(*words):
    """Its processes: two."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_learn_as_one_to_rounding_without_batchnorm():
    process = torchrun(HERE / "ranks.py")
    said, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    found = json.loads(said)
    normalized, _ = found.pop("BatchNorm")
    for case, (weights, losses) in found.items():
        assert (weights < 1e-6, losses < 1e-6) == (True, True), case
    assert 1e-4 < normalized < 1.0  # each part by its own mean


def test_parts_are_even_and_all_of_the_batch():
    for samples in (1, 2, 3, 4, 5, 31, 32, 33):
        batch = CutBatch(1, 2, 3, (torch.arange(samples), torch.randn(samples, 3)), {"a": torch.arange(samples)})
        for count in (2, 3, 4):
            parts = parts_of(batch, count)
            assert [part.rank for part in parts] == list(range(count))
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert sum(part.weight for part in parts) == pytest.approx(count)
            if samples < 2 * count:
                assert all(part.batch is batch for part in parts)
            else:
                assert torch.cat([part.batch.tensors[0] for part in parts]).tolist() == list(range(samples))
                assert torch.cat([part.batch.targets["a"] for part in parts]).tolist() == list(range(samples))
                sizes = [len(part.batch) for part in parts]
                assert max(sizes) - min(sizes) <= 1
                assert [part.share for part in parts] == [size / samples for size in sizes]
    whole = CutBatch(0, 0, 0, (torch.randn(9, 2),), torch.arange(9), whole=(torch.randn(3),))
    assert all(part.batch is whole for part in parts_of(whole, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight, self.bias = self.one.weight, nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return self.three(self.two(self.one(x))) * self.three.bias.sum() + self.bias if self.training else self.three(x) + self.bias


def test_only_modules_whose_weights_nothing_else_reads_are_put_together_when_they_are_called():
    half = fx.symbolic_trace(Tied().eval())
    assert ranks_of_algorithm._called(half) == [half.three]
    half = fx.symbolic_trace(Tied())
    assert ranks_of_algorithm._called(half) == []
    whole = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    assert ranks_of_algorithm._called(whole) == [whole[0], whole[2]]
    assert ranks_of_algorithm._called(Tied()) == []


def run_folder(out, *words, kill):
    """A run of torchrun's server with two clients. One of its processes may be killed amid it, and torchrun started again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    serve = ["-m", "halfpass", "serve", *WORDS, *words, "--bind", address, "--out", out, "--resume"]
    server = torchrun(*serve)
    started = [server]
    try:
        server.stdout.readline()  # it listens
        for client in range(2):
            started.append(commands.Command(["join", address, "--client", client, *WORDS, *words, "--out", out], HERE))
        if kill:
            kill_amid_it(out)
            _, errors = server.communicate(timeout=SECONDS)
            assert "lost another process of the server" in errors
            assert server.returncode == 1
            assert not (out / "result.json").exists()
            server = started[0] = torchrun(*serve)
        for process in started:
            said, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said + errors
    finally:
        for process in started:
            process.poll() is None and process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    return out


def kill_amid_it(out):
    """The process of the server that has no client, once an epoch is over."""
    deadline = time.monotonic() + SECONDS
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            of_this = os.fsencode(out) in entry.read_bytes() and b"serve" in entry.read_bytes()
            if of_this and b"\0RANK=1\0" in entry.with_name("environ").read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)
                return
    raise AssertionError("it was not found")


def check_near(alone, together, nearest):
    """Not equal bit for bit: then one process would have learned it all."""
    one, other = (load_file(folder / "server.safetensors") for folder in (alone, together))
    assert one.keys() == other.keys()
    assert 0 < max(float((one[name] - other[name]).abs().max()) for name in one) < nearest
    for client in range(2):
        one, other = (load_file(folder / f"client-{client}.safetensors") for folder in (alone, together))
        assert equal(one, other)
    scores = [read_result(folder)["test_accuracy"] for folder in (alone, together)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


@pytest.mark.long
def test_a_run_whose_server_is_two_processes_of_which_one_is_killed(tmp_path):
    """The clients wait for it, and `--resume` takes the run up."""
    words = ["--train.epochs", "12", "--train.lr", "0.02", "--server.replay", "2", "--server.merge", "2", "--checkpoint.every", "5"]
    assert main(["train", *WORDS, *words, "--out", str(tmp_path / "local")]) == 0
    out = run_folder(tmp_path / "run", *words, kill=True)
    check_near(tmp_path / "local", out, 1e-5)


@pytest.mark.parametrize(("words", "said"), [
    (["serve", "--method", "conventional"], "a server that returns no gradient (method decoupled), found conventional"),
    (["serve", "--train.feedback_every", "2"], "a server that returns no gradient (method decoupled), found train.feedback_every"),
    (["serve", "--train.compile", "true"], "train.compile false, found true"),
    (["serve", "--model.edge_cut", "stage3"], "one server, found model.edge_cut"),
    (["train"], "halfpass serve, or resume of a server, found halfpass train"),
])  # fmt: skip
def test_what_several_processes_cannot_do_is_said(tmp_path, monkeypatch, capsys, words, said):
    for key, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"torchrun with several processes: expected {said}; " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_ends_a_sharded_run_is_said_and_its_half_is_saved(tmp_path):
    """Both processes find out that a loss is not finite; the second keeps in step, and says nothing."""
    words = ["--train.epochs", "3", "--train.lr", "1e30", "--clients.lr_scale", "1e-30", "--server.shard", "true"]
    with pytest.raises(AssertionError, match=r"server, batch of client \d, epoch \d, step \d+.*: expected .*finite.*; lower train.lr"):
        run_folder(tmp_path / "run", *words, kill=False)
    assert (tmp_path / "run" / "server.safetensors").is_file()
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("words", [["resume"], ["resume", "--client", "1"]])
def test_several_processes_resume_nothing_but_a_server(tmp_path, monkeypatch, capsys, words):
    for key, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "run").mkdir()
    assert main([words[0], str(tmp_path / "run"), *words[1:]]) == 2
    assert "torchrun with several processes: expected halfpass serve, or resume of a server, found halfpass resume of " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "serve"])
def test_one_process_has_no_shards(tmp_path, capsys, command):
    assert main([command, "--server.shard", "true", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "halfpass: server.shard: expected a server of several processes (halfpass serve), found one; start it by "
        "torchrun, or leave server.shard out\n"
    )
    assert not (tmp_path / "run").exists()
