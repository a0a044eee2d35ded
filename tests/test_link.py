"""The link of the benchmarks: its bandwidth and delay are lower bounds that hold, and it is no unlimited buffer."""

import contextlib
import importlib
import importlib.util
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from halfpass.config import Config, DataConfig, TrainConfig
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Connection
from halfpass.wire.hub import Hub
from halfpass.wire.messages import write_tensor

FILE = Path(__file__).parents[1] / "benchmarks" / "link.py"
spec = importlib.util.spec_from_file_location("link", FILE)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)
DEADLINE = 30.0  # seconds


@contextlib.contextmanager
def ends(bandwidth, rtt):
    """The two ends of a connection through a link: whoever connected, and whoever it reached."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(DEADLINE)
        near = stack.enter_context(socket.socket())
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        near.settimeout(DEADLINE)
        near.connect(("127.0.0.1", stack.enter_context(benchmark.link(listener.getsockname()[1], bandwidth, rtt))))
        far = stack.enter_context(listener.accept()[0])
        far.settimeout(DEADLINE)
        yield near, far


def receive(connection, count):
    with connection.makefile("rb") as stream:
        return stream.read(count)


@pytest.mark.parametrize("way", ["up", "down"])
def test_four_megabytes_at_100_megabits_take_their_time_and_arrive_unchanged(way):
    data = random.Random(0).randbytes(4_000_000)
    with ends(100e6, 0.02) as both, ThreadPoolExecutor(1) as pool:
        sender, receiver = both if way == "up" else both[::-1]
        began = time.monotonic()
        sending = pool.submit(sender.sendall, data)
        assert receive(receiver, len(data)) == data
        seconds = time.monotonic() - began
        sending.result(DEADLINE)
    assert 0.32 + 0.01 <= seconds < DEADLINE


def test_a_ping_and_its_answer_take_the_round_trip_time():
    with ends(1e9, 0.05) as (near, far):
        for _ in range(3):
            began = time.monotonic()
            near.sendall(b"ping")
            assert receive(far, 4) == b"ping"
            far.sendall(b"pong")
            assert receive(near, 4) == b"pong"
            assert 0.05 <= time.monotonic() - began < DEADLINE


def test_both_directions_have_the_bandwidth_to_themselves():
    data = bytes(2_000_000)  # 0.8 s at 20 Mbit/s
    with ends(20e6, 0.0) as both, ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        sending = [pool.submit(end.sendall, data) for end in both]
        assert [receive(end, len(data)) for end in both] == [data, data]
        seconds = time.monotonic() - began
        for one in sending:
            one.result(DEADLINE)
    assert 0.8 <= seconds < 1.5  # one after the other would be 1.6


def test_a_receiver_that_does_not_read_stops_the_sender():
    data = random.Random(1).randbytes(20_000_000)
    most = 12_500_000 * (0.05 + 3 * benchmark.QUEUE_SECONDS) + 2**20  # what is held, and the buffers of both ends
    with ends(100e6, 0.1) as (near, far), ThreadPoolExecutor(1) as pool:
        near.settimeout(1.0)  # in which the link would carry 12.5 MB
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < len(data):
                sent += near.send(data[sent : sent + 2**16])
        assert 2**16 < sent < most
        near.settimeout(DEADLINE)
        sending = pool.submit(near.sendall, data[sent:])
        assert receive(far, len(data)) == data  # nothing was lost meanwhile
        sending.result(DEADLINE)


def test_the_end_of_a_stream_and_a_lost_receiver_are_passed_on():
    with ends(100e6, 0.02) as (near, far):
        near.sendall(b"last")
        near.shutdown(socket.SHUT_WR)
        assert receive(far, -1) == b"last"
        far.sendall(b"answer")  # the other direction is still open
        assert receive(near, 6) == b"answer"
    with ends(100e6, 0.02) as (near, far):
        far.close()
        with pytest.raises(OSError, match=r"Broken pipe|Connection reset"):
            near.sendall(bytes(50_000_000))


def test_sigterm_ends_it_with_a_word_on_its_cost():
    options = ["--to", "9", "--bandwidth", "1e6"]
    with subprocess.Popen(
        [sys.executable, FILE, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as proxy:
        assert int(proxy.stdout.readline()) > 0
        proxy.send_signal(signal.SIGTERM)
        assert proxy.wait(DEADLINE) == 0
        assert proxy.stdout.read().startswith("carried 0 bytes up and 0 down in ")


def test_a_server_takes_the_feeder_of_overlap_for_a_client(tmp_path, monkeypatch):
    """The benchmark's stand-in for a client says all that a client says, tests included."""
    monkeypatch.syspath_prepend(FILE.parent)
    overlap = importlib.import_module("overlap")
    config = Config(data=DataConfig(limit=256), train=TrainConfig(epochs=2, threads=1), out=str(tmp_path / "run"))
    assert overlap.server_alone(config, overlap.Feeder(config)) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="bytes on their way are known on Linux alone")
@pytest.mark.parametrize("way", ["up", "down"])
def test_a_message_that_takes_longer_than_the_timeout_is_no_silence(way):
    """300 kB over 0.8 Mbit/s, with signs of life behind them: three seconds, where one counts as silence."""
    hub = Hub("127.0.0.1:0", clients=1, window_bytes=2**20, timeout=1.0, admit=lambda join: None, check=lambda client, batch: None)
    try:
        with benchmark.link(hub.port, 0.8e6, 0.0) as port:
            connection = Connection(f"127.0.0.1:{port}", window_bytes=2**20, timeout=1.0)
            connection.send(pb.ClientMessage(join=pb.Join(client=0)))
            connection.receive("joined")
            weights = [write_tensor(torch.rand(75_000))]
            began = time.monotonic()
            if way == "up":
                connection.send(pb.ClientMessage(epoch_end=pb.EpochEnd(weights=weights)))
                _, received = hub.take([0], "epoch_end")
                assert received.message.epoch_end.weights[0] == weights[0]
            else:
                hub.send(0, pb.ServerMessage(begin=pb.Begin(weights=weights)))
                assert connection.receive("begin").begin.weights[0] == weights[0]
            assert time.monotonic() - began > 2
            connection.fail("done")
    finally:
        hub.stop()
