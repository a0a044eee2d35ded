"""Children that are forked: as those that are started the usual way, and none left behind."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfpass.run import fork_server
from halfpass.run.children import Child, stopping

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux alone")

SAYING = """
import os, random, sys
import numpy as np
import torch

def data():
    path = [entry for entry in sys.path if entry == os.getcwd()]
    raise ValueError(" ".join(map(str, (
        os.environ.get("SAID"), os.environ.get("HALFPASS_CHILD"), os.getcwd(), path != [], os.getsid(0) == os.getpid(),
        random.random(), np.random.rand(), sys.stdin.isatty(), len(os.listdir("/proc/self/fd")) < 30, sys.argv[1],
    ))))
"""
WORDS = ["train", "--data.name", "saying:data", "--out", "never"]


def said(folder, count=1):
    children = [Child("it", WORDS, quiet=True) for _ in range(count)]
    with stopping(children):
        for child in children:
            child.process.wait(60)
    assert {child.status() for child in children} == {2}
    return [str(child.failure()).partition("ValueError: ")[2].partition(";")[0].split() for child in children]


def test_a_forked_child_is_as_a_started_one(tmp_path, monkeypatch):
    (tmp_path / "saying.py").write_text(SAYING)
    (tmp_path / "halfpass.py").write_text("raise SystemExit(3)")  # children are of the same halfpass as this process
    monkeypatch.setattr(fork_server, "_link", None)
    monkeypatch.setattr(fork_server, "_server", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAID", "here")  # after the fork server may have been started
    forked = said(tmp_path, 3)
    monkeypatch.setattr(fork_server, "FORKS", False)
    started = said(tmp_path)[0]
    random = slice(5, 7)
    assert started[:5] == ["here", "None", str(tmp_path), "True", "True"]
    assert started[7:] == ["False", "True", "train"]
    for child in forked:
        assert child[:5] + child[7:] == started[:5] + started[7:]
    # data() runs under a fixed seed, whichever process it is in
    assert len({tuple(child[random]) for child in [*forked, started]}) == 1


def test_no_child_outlives_a_killed_fork_server(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "_link", None)
    monkeypatch.setattr(fork_server, "_server", None)
    child = Child("server", ["serve", "--bind", "127.0.0.1:0", "--out", str(tmp_path / "run")], pipe=True)
    with stopping([child]):
        assert child.first_line(60).startswith("listening on")
        fork_server._server.send_signal(signal.SIGKILL)
        fork_server._server.wait(10)
        assert child.process.wait(10) == -signal.SIGKILL
        assert "killed by SIGKILL" in str(child.failure())
        deadline = time.monotonic() + 5
        while Path(f"/proc/{child.process.pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    again = Child("server", ["serve", "--bind", "127.0.0.1:0", "--out", str(tmp_path / "again")], pipe=True)
    with stopping([again]):  # started the usual way
        assert isinstance(again.process, fork_server.Forked) is False
        assert again.first_line(60).startswith("listening on")


def test_a_child_that_ends_before_anybody_looks_is_itself(monkeypatch):
    """Its number and its end are two messages, also where both have come before the first is read."""
    receive = socket.socket.recv

    def late(link, size):
        if size == 64:
            time.sleep(3)
        return receive(link, size)

    Child("first", ["--version"], quiet=True).process.wait(60)  # the fork server is there
    monkeypatch.setattr(socket.socket, "recv", late)
    child = Child("it", ["--version"], quiet=True)
    assert child.process.wait(20) == 0


@pytest.mark.long
def test_a_command_whose_output_is_closed_trains(tmp_path):
    words = f"-m halfpass train --runtime processes --train.epochs 1 --data.limit 256 --out {tmp_path / 'run'}"
    subprocess.run(["sh", "-c", f"{sys.executable} {words} <&- >&- 2>&-"], check=True, timeout=120)
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.parametrize("closed", ["__stdin__", "__stdout__", "__stderr__"])
def test_nothing_is_forked_where_other_files_may_have_the_standard_ones_numbers(monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)
    monkeypatch.setattr(fork_server, "_link", None)
    fork_server.start()
    assert fork_server._link is None
    assert fork_server.fork(["--version"], stdout=None, stderr=None) is None
