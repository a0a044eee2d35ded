"""What a hostile peer costs a run: strangers at the door, and a member that does not keep to the rules.

    python benchmarks/hostile.py --out results/hostile.json     fifteen minutes on two cores, quiet
    python benchmarks/hostile.py --quick --only garbage         seconds: does it run?

Each row has a run of its own: `halfpass serve` over TLS with tokens, an honest client that trains (decoupled; where the
peer is a member, independent and in the order of arrival), and one misbehaving peer, each a process, on loopback. The
server half is the larger one, so that whatever the server does for the peer takes from the training.

**The two stretches.** In turn the peer does the same against the server (`on`) and against a decoy of its own (`off`),
a gRPC server that takes TLS and messages and answers nothing; `rate_over_undisturbed` is the median of the turns'
ratios of the honest client's batches per second. With two cores the peer's own work takes from client and server, which
is no fault of the server's: peer and decoy run at the lowest priority, and are there in both stretches. What the server
does for the peer has the server's priority, and is in the ratio. So a peer gets what the training leaves of two cores,
`attempts_per_second` says how much that was; a peer with machines of its own could do more. `nobody` is the control.

`memory_mb_over_undisturbed` is the server's peak resident set (MB = 10⁶ bytes) in the whole row beyond that of its
first undisturbed stretch; `nobody` shows how much that grows by itself. `wire.window` is 8 MiB. `got` is what the peer
heard, most often first; `log_lines_per_second` what the server wrote of it. `status_seconds` is how long a member
waited for an answer to `halfpass status` meanwhile, `status_failures` how often in vain: also where it comes from the
address of a stranger that floods, as what goes by gRPC here does, and is kept out with it. A member that was dropped
comes back, as another process, until it is refused (`dropped` says how often it was): the run goes on without it, and
waits for it at the end of the epoch. Where the run was over, `ended_the_run`, there may be no turn to compare, and the
honest client's last line is there. Exit status: 1 where a run was ended, or a rate is below its bar.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import queue
import random
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
import torch
from torch.utils.data import TensorDataset

from halfpass.commands.certs import make_certificates
from halfpass.config import (
    ClientsConfig,
    Config,
    DataConfig,
    ModelConfig,
    TlsConfig,
    TrainConfig,
    WireConfig,
    as_dict,
)
from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.run import setup
from halfpass.run.client_process import DATA, WEIGHTS
from halfpass.run.credentials import trust_of, trust_to_ask
from halfpass.run.network import network_of, written_spec
from halfpass.run.records import command_line, environment
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.asking import ask_status
from halfpass.wire.connection import channel_to
from halfpass.wire.messages import MOST_PARTS, PROTOCOL, write_batch
from halfpass.wire.service import METHOD, SERVICE, STATUS
from halfpass.wire.trust import Trust

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
HOST, ELSEWHERE = "127.0.0.1", "127.0.0.2"  # strangers' own sockets come from the latter, as if from another machine
BAR = 0.9
BATCH_SIZE, CLASSES = 64, 10
SAMPLES = 7500 * BATCH_SIZE  # an epoch outlasts a row, so that nobody waits for a silent member at its end
TIMEOUT, RECONNECT = 5.0, 600.0  # wire.timeout; wire.reconnect, for which a dropped member is waited for
WINDOW = 8 * 2**20  # which is full soon, so that memory stays as it is
START_SECONDS, END_SECONDS = 120.0, 30.0
AGAIN_SECONDS = 0.2  # before a member that was sent away comes again
NICE = 19
MEMBER = 1  # the misbehaving one's number; the honest one's is 0
SILENT, AT_ONCE = 300, 4  # connections that are held, and threads of other peers
LARGE = 256 * 2**20  # of any channel here: what is too large is for the server to say
Row = dict[str, Any]


def made_up() -> tuple[TensorDataset, TensorDataset]:
    """Pictures for `data.name`, and a small test set."""
    draws = torch.Generator().manual_seed(0)
    parts = [(torch.randn(n, 1, 8, 8, generator=draws), torch.arange(n) % CLASSES) for n in (SAMPLES, 64)]
    return TensorDataset(*parts[0]), TensorDataset(*parts[1])


def config_of(clients: int) -> Config:
    return Config(
        runtime="processes", data=DataConfig(name="benchmarks.hostile:made_up"),
        model=ModelConfig("digits-cnn", "block_1"), clients=ClientsConfig(clients, "independent", "own"),
        train=TrainConfig(epochs=100, batch_size=BATCH_SIZE, lr=0.01, threads=1, test_every=100),
        wire=WireConfig("int8+zstd", order="arrival", window=WINDOW, timeout=TIMEOUT, reconnect=RECONNECT),
    )  # fmt: skip


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- Peers: each a generator that gives what it got, attempt by attempt; "" is nothing so far. Strangers first --------


@dataclasses.dataclass(frozen=True)
class Server:
    """What a peer may know of whom it attacks."""

    port: int
    trust: Trust  # of the client whose number is MEMBER; a stranger leaves it alone, but for the server's certificate

    @property
    def stranger(self) -> Trust:
        return dataclasses.replace(self.trust, token="0123456789" * 4)

    def channel(self, trust: Trust) -> grpc.Channel:
        return channel_to(f"{HOST}:{self.port}", trust, LARGE)

    def socket(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), 5, source_address=(ELSEWHERE, 0))


def nobody(server: Server) -> Iterator[str]:
    while True:
        time.sleep(0.05)
        yield ""


def silent(server: Server) -> Iterator[str]:
    """Holds hundreds of connections, and makes a new one for each that is cut."""
    yield from _held(server, b"", SILENT // AT_ONCE)


def hello(server: Server) -> Iterator[str]:
    """A whole first flight, which the server answers with its certificate and a signature, and no second one."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        server.trust.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    yield from _held(server, outgoing.read(), SILENT // AT_ONCE)


def hurried(server: Server) -> Iterator[str]:
    """Whole handshakes, one behind the other, and nothing behind them."""
    context = server.trust.client_context()
    while True:
        with server.socket() as outer:
            outer.settimeout(5)
            with context.wrap_socket(outer, server_hostname="localhost"):
                yield "a handshake"


def plaintext(server: Server) -> Iterator[str]:
    while True:
        with server.socket() as peer:
            peer.settimeout(5)
            peer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            yield f"cut, behind {len(peer.recv(4096))} bytes"


def _held(server: Server, first: bytes, count: int) -> Iterator[str]:
    held = list[socket.socket]()
    try:
        while True:
            if len(held) < count:
                held.append(server.socket())
                held[-1].sendall(first)
                held[-1].setblocking(False)
            over = [one for one in held if _is_cut(one)]
            held = [one for one in held if one not in over]
            for one in over:
                one.close()
                yield "cut"
            if len(held) == count:
                time.sleep(0.05)
            yield ""
    finally:
        for one in held:
            one.close()


def _is_cut(one: socket.socket) -> bool:
    try:
        while piece := one.recv(2**14):
            del piece
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def first_messages(server: Server, made: Callable[[int], bytes], trust: Trust | None = None) -> Iterator[str]:
    """A stream for each, on one connection as long as it lasts."""
    trust = server.stranger if trust is None else trust
    with server.channel(trust) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        for number in itertools.count():
            stream = call(iter([made(number)]), metadata=trust.metadata(), timeout=10)
            answer = _answer(stream)
            if "failed to connect" in answer:
                time.sleep(0.05)  # nothing left this process: gRPC waits before it tries again
            yield answer


def _answer(messages: Iterable[bytes]) -> str:
    """What a server's messages say, or why there are none."""
    try:
        for data in messages:
            message = pb.ServerMessage.FromString(data)
            if message.HasField("failed"):
                return message.failed.reason
        return "an answer"
    except grpc.RpcError as error:
        return f"{error.code().name.lower()}: {error.details()}"


def wrong_token(server: Server) -> Iterator[str]:
    join = pb.ClientMessage(join=pb.Join(protocol=PROTOCOL, client=MEMBER)).SerializeToString()
    yield from first_messages(server, lambda number: join)


def garbage(server: Server) -> Iterator[str]:
    yield from first_messages(server, lambda number: bytes([0xFF, number % 256]) * 500)


def large(server: Server, trust: Trust | None = None) -> Iterator[str]:
    """As large as the window lets any message be, which is more than any Join."""
    data = bytes(WINDOW)
    yield from first_messages(server, lambda number: data, trust)


def oversized(server: Server) -> Iterator[str]:
    data = bytes(WINDOW + 2 * 2**20)
    yield from first_messages(server, lambda number: data)


def parts(server: Server, trust: Trust | None = None) -> Iterator[str]:
    """Of as many parts as are counted, so that each is looked at."""
    data = b"\x32\x00" * (MOST_PARTS + 1)
    yield from first_messages(server, lambda number: data, trust)


def streams(server: Server, trust: Trust | None = None) -> Iterator[str]:
    """Very many on a connection, none of which says a word."""
    trust, over = trust or server.stranger, queue.SimpleQueue[str]()
    with server.channel(trust) as channel:
        call, ended = channel.stream_stream(f"/{SERVICE}/{METHOD}"), threading.Event()

        def words() -> Iterator[bytes]:
            ended.wait()
            yield from ()

        held = list[Any]()
        try:
            while True:
                if len(held) < SILENT // AT_ONCE:
                    held.append(call(words(), metadata=trust.metadata()))
                    held[-1].add_done_callback(lambda one: over.put(f"{one.code().name.lower()}: {one.details()}"))
                held = [one for one in held if one.is_active()]
                time.sleep(0.01)
                yield ""
                while not over.empty():
                    yield over.get()
        finally:
            ended.set()
            for one in held:
                one.cancel()


def health(server: Server) -> Iterator[str]:
    with server.channel(server.stranger) as channel:
        yield from _questions(channel.unary_unary("/grpc.health.v1.Health/Check"))


def untrusted_status(server: Server) -> Iterator[str]:
    yield from _status(server, server.stranger)


def status(server: Server) -> Iterator[str]:
    yield from _status(server, server.trust)


def _status(server: Server, trust: Trust) -> Iterator[str]:
    with server.channel(trust) as channel:
        yield from _questions(channel.unary_unary(f"/{SERVICE}/{STATUS}"), trust.metadata())


def _questions(call: Any, metadata: Sequence[tuple[str, str]] = ()) -> Iterator[str]:
    """Empty ones, one behind the other."""
    while True:
        try:
            call(b"", metadata=metadata, timeout=5)
            yield "an answer"
        except grpc.RpcError as error:
            yield f"{error.code().name.lower()}: {error.details()}"


# --- A member, which has joined as a client should --------------------------------------------------------------------


class Stream:
    """Its stream; the decoy has one too."""

    def __init__(self, server: Server, join: pb.Join) -> None:
        self.server, self.join, self.config = server, join, config_of(2)
        self.place, self.step, self.run, self.over = 0, 0, join.run, False
        self.lives = threading.Event()  # it says so
        self.reads = threading.Event()
        self.lives.set()
        self.reads.set()
        self.heard = queue.SimpleQueue[str]()
        self.joined = threading.Event()
        self._to_send = queue.Queue[bytes](8)
        self.channel = server.channel(server.trust)
        call = self.channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self.call = call(self._requests(), metadata=server.trust.metadata())
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, message: pb.ClientMessage | bytes) -> None:
        """Where the server reads no further it waits, as long as the stream lasts."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        while not self.over:
            with contextlib.suppress(queue.Full):
                self._to_send.put(data, timeout=0.1)
                return

    def batch(self) -> pb.ClientMessage:
        """One that is as it should be, but for its place."""
        cut = torch.ones(BATCH_SIZE, 32, 8, 8)  # (B, C, H, W), of block_1
        labels = torch.zeros(BATCH_SIZE, dtype=torch.int64)
        return write_batch(CutBatch(MEMBER, 0, self.step, (cut,), labels), self.config.wire.codec)

    def answers(self) -> Iterator[str]:
        while not self.heard.empty():
            yield self.heard.get()
        yield ""

    def close(self) -> None:
        self.over = True
        self.call.cancel()
        self.channel.close()

    def _requests(self) -> Iterator[bytes]:
        yield pb.ClientMessage(join=self.join).SerializeToString()
        while not self.over:
            try:
                yield self._to_send.get(timeout=1.0)
            except queue.Empty:
                if self.lives.is_set():
                    yield pb.ClientMessage(alive=pb.Alive()).SerializeToString()

    def _read(self) -> None:
        try:
            for data in self.call:
                message = pb.ServerMessage.FromString(data)
                kind = message.WhichOneof("kind")
                if kind == "joined":
                    self.run, self.place = message.joined.run, message.joined.received
                    self.step = self.place
                    self.joined.set()
                elif kind in ("rejected", "failed"):
                    self.heard.put(f"{kind}: {getattr(message, kind).reason}")
                self.reads.wait()
        except grpc.RpcError as error:
            self.heard.put(f"{error.code().name.lower()}: {error.details()}")
        self.over = True
        self.joined.set()


def join_of(config: Config) -> pb.Join:
    """An honest client's; the network does not ask for more than a few samples."""
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, limit=64))
    data = setup.load_data(few.data)
    network = network_of(config, data, setup.task_of(config, data))
    own = {DATA: setup.agreement(config, data), WEIGHTS: network.digests}
    return pb.Join(
        protocol=PROTOCOL, client=MEMBER, settings=json.dumps(setup.agreed_settings(config) | own),
        inputs=json.dumps(written_spec(network.inputs)), outputs=network.task.outputs, samples=SAMPLES,
        steps=SAMPLES // BATCH_SIZE, parameters=network.parameters, fingerprint=network.fingerprint,
        targets=json.dumps({"spec": written_spec(network.task.spec), "names": network.task.names}),
    )  # fmt: skip


def again(stream: Stream, *, another: bool) -> Stream:
    """Its next stream, of the same process or of another one."""
    join = pb.Join()
    join.CopyFrom(stream.join)
    join.run, join.received, join.first = stream.run, 1, 1
    if another:
        join.process = random.getrandbits(48)
    return Stream(stream.server, join)


def idle(stream: Stream) -> Iterator[str]:
    """Lives, says so, and does nothing else."""
    while not stream.over:
        time.sleep(0.05)
        yield from stream.answers()


def mute(stream: Stream) -> Iterator[str]:
    """Not even that."""
    stream.lives.clear()
    yield from idle(stream)


def no_messages(stream: Stream) -> Iterator[str]:
    while not stream.over:
        stream.send(b"\xff" * 500)
        yield from stream.answers()


Change = Callable[[pb.Batch], object]


def _shape(batch: pb.Batch, *shape: int) -> None:
    del batch.tensors[0].shape[:]
    batch.tensors[0].shape.extend(shape)


def _claim(size: int) -> bytes:
    """The head of a zstd frame that says it holds so many bytes (RFC 8878, 3.1.1.1), and an empty block."""
    return b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little") + b"\x01\x00\x00"


def _claiming(size: int) -> Change:
    return lambda batch: setattr(batch.tensors[0], "data", _claim(size))


CLAIMS = tuple(map(_claiming, (2**20, 2**28, 2**30, 2**32 - 1)))
LIES: tuple[Change, ...] = (
    lambda batch: _shape(batch, 2**31, 32, 8, 8), lambda batch: _shape(batch, BATCH_SIZE, 2**31, 8, 8),
    lambda batch: _shape(batch, *[1] * 2**14), lambda batch: _shape(batch), lambda batch: batch.tensors.add(),
    lambda batch: setattr(batch.tensors[0], "dtype", "complex128"),
    lambda batch: setattr(batch.tensors[0], "dtype", "x" * 2**20), lambda batch: setattr(batch, "before", 2**31),
    lambda batch: setattr(batch.tensors[0], "codec", "none"), lambda batch: batch.labels.extend([0] * 2**16),
    lambda batch: batch.labels.__setitem__(0, 2**31), lambda batch: setattr(batch, "client", 0),
    lambda batch: setattr(batch.tensors[0], "data", batch.tensors[0].data[:-9]),
)  # fmt: skip


def liar(stream: Stream) -> Iterator[str]:
    """Of shapes, dtypes, counts, codecs, labels and places; once each, as the hundred-and-first would be the last. Then
    a batch as it should be."""
    for place in (0, stream.place + 2, 2**64 - 1):  # none of which is taken
        message = stream.batch()
        message.place = place
        stream.send(message)
    yield from _changed(stream, LIES)


def bomb(stream: Stream) -> Iterator[str]:
    """Some bytes that say they become up to 4 GB."""
    yield from _changed(stream, CLAIMS)


def _changed(stream: Stream, changes: Sequence[Change]) -> Iterator[str]:
    for change in (*changes, lambda batch: None):
        message = stream.batch()
        change(message.batch)
        stream.place += 1  # which is taken, whatever comes
        stream.step += 1
        message.place = stream.place
        stream.send(message)
        yield from stream.answers()
    yield from idle(stream)


def disorder(stream: Stream) -> Iterator[str]:
    """Steps that go back."""
    for step in (5, 4):
        message = stream.batch()
        stream.place += 1
        message.place, message.batch.step = stream.place, step
        stream.send(message)
    yield from idle(stream)


def repeats(stream: Stream) -> Iterator[str]:
    """What has come before, as large as a message may be for a Join's sake."""
    message = stream.batch()
    if stream.place == 0:
        stream.place = message.place = 1
        stream.send(message)
    message.batch.tensors[0].data = bytes(2**22)
    message.place = 1
    data = message.SerializeToString()
    while not stream.over:
        stream.send(data)
        yield "nothing"
        yield from stream.answers()


def lively(stream: Stream) -> Iterator[str]:
    """Signs of life as fast as it can, which are no message that cannot be used."""
    data = pb.ClientMessage(alive=pb.Alive()).SerializeToString()
    while not stream.over:
        stream.send(data)
        yield "nothing"
        yield from stream.answers()


def deaf(stream: Stream) -> Iterator[str]:
    """Sends some batches, and reads nothing of what comes back."""
    stream.reads.clear()
    try:
        while not stream.over:
            message = stream.batch()
            stream.place, stream.step = stream.place + 1, stream.step + 1
            message.place = stream.place
            stream.send(message)
            time.sleep(0.2)
            yield from stream.answers()
    finally:
        stream.reads.set()


def quitter(stream: Stream) -> Iterator[str]:
    """Says that it has failed."""
    stream.send(pb.ClientMessage(failed=pb.Failed(reason="hello", exit_status=1)))
    yield from idle(stream)


def too_large(stream: Stream) -> Iterator[str]:
    """A message beyond the window, after which the stream is over; it comes again, and says another."""
    yield from _again(stream, bytes(WINDOW + 2 * 2**20))


def restless(stream: Stream) -> Iterator[str]:
    """Joins again and again, each stream in the place of the one before."""
    yield from _again(stream, None)


def _again(stream: Stream, data: bytes | None) -> Iterator[str]:
    while True:
        own = again(stream, another=False)
        try:
            own.joined.wait(5)
            if data is not None:
                own.send(data)
                deadline = time.monotonic() + 5
                while not own.over and time.monotonic() < deadline:
                    time.sleep(0.01)
            else:
                yield "joined again"
            yield from own.answers()
        finally:
            own.close()


JOINS: dict[str, Any] = {  # lies about sizes
    "inputs": json.dumps({"": ["float32", [2**31]]}), "outputs": 2**31, "samples": 2**63, "steps": 2**31,
    "parameters": 2**63, "targets": json.dumps({"spec": {"": ["float32", [2**31]]}, "names": []}),
    "plan": "[" * 2**20, "settings": "[" * 2**20,
}  # fmt: skip


def pretender(stream: Stream) -> Iterator[str]:
    """Joins again, and lies about sizes."""
    made = list[bytes]()
    for name, value in JOINS.items():
        join = pb.Join()
        join.CopyFrom(stream.join)
        join.run, join.first, join.received = stream.run, 1, 1
        setattr(join, name, value)
        made.append(pb.ClientMessage(join=join).SerializeToString())
    yield from first_messages(stream.server, lambda number: made[number % len(made)], stream.server.trust)


STRANGERS: dict[str, tuple[str, Callable[[Server], Iterator[str]]]] = {
    "nobody": ("nobody", nobody),
    "silent": (f"{SILENT} connections that say nothing", silent),
    "hello": ("TLS handshakes that are begun and never finished", hello),
    "hurried": ("TLS handshakes, one behind the other", hurried),
    "plaintext": ("plain HTTP", plaintext),
    "wrong_token": ("Joins with a wrong token", wrong_token),
    "garbage": ("first messages that are none", garbage),
    "large": ("first messages of 8 MiB, the window", large),
    "oversized": ("first messages of 10 MiB, beyond the window", oversized),
    "parts": ("first messages of 65,537 parts", parts),
    "streams": (f"{SILENT} streams that never say Join", streams),
    "health": ("questions for health", health),
    "untrusted_status": ("questions for status without a token", untrusted_status),
}
MEMBERS: dict[str, tuple[str, Callable[[Stream], Iterator[str]]]] = {
    "status": ("questions for status", lambda stream: status(stream.server)),
    "member_large": ("first messages of 8 MiB, the window", lambda stream: large(stream.server, stream.server.trust)),
    "member_parts": ("first messages of 65,537 parts", lambda stream: parts(stream.server, stream.server.trust)),
    "member_streams": (
        f"{SILENT // AT_ONCE} streams that never say Join",
        lambda stream: streams(stream.server, stream.server.trust),
    ),
    "pretender": ("Joins again, lying about sizes", pretender),
    "restless": ("Joins again and again", restless),
    "idle": ("sends signs of life alone", idle),
    "mute": ("sends nothing", mute),
    "deaf": ("reads nothing", deaf),
    "liar": ("batches that lie about shapes, dtypes, counts, codecs, labels, places", liar),
    "bomb": ("payloads of 12 bytes that say they become up to 4 GB", bomb),
    "repeats": ("floods messages of 4 MiB that have come before", repeats),
    "lively": ("floods signs of life", lively),
    "too_large": ("messages beyond the window, and comes back after each", too_large),
    "no_messages": ("floods what is no message", no_messages),
    "disorder": ("steps that go back", disorder),
    "quitter": ("says Failed", quitter),
}
ON_THEIR_OWN = ("restless", "too_large", "pretender")  # they make streams of their own
QUICK = ("garbage", "streams", "no_messages")


# --- The peer's process, which is told whom to attack, and the decoy's ------------------------------------------------


def run_peer(pipe: Connection, log: Path, name: str, ports: dict[str, int], keys: Path) -> None:
    """`ports` of the server, "on", and the decoy, "off"; `pipe` says which, and None at the end."""
    _log_to(log)
    trust = trust_of(TlsConfig(folder=str(keys)), f"client-{MEMBER}")
    assert trust is not None
    servers = {side: Server(port, trust) for side, port in ports.items()}
    got = {side: Counter[str]() for side in servers}
    now, over = ["off"], threading.Event()

    def work(make: Callable[[str], Iterator[str]]) -> None:
        while not over.is_set():
            side = now[0]
            attempts = make(side)
            try:
                for answer in attempts:
                    got[side][answer] += 1
                    if now[0] != side or over.is_set():
                        break
            except Exception as error:  # it was cut, in any of the ways in which sockets and gRPC say so
                got[side][f"cut: {type(error).__name__} {getattr(error, 'reason', '') or ''}".strip()] += 1
            finally:
                attempts.close()  # type: ignore[attr-defined]  # they are generators

    if name in STRANGERS:
        attack = STRANGERS[name][1]
        makers = [lambda side: attack(servers[side])] * AT_ONCE
    else:
        member, join = MEMBERS[name][1], join_of(config_of(2))
        join.process = random.getrandbits(48)
        streams = {side: Stream(server, join) for side, server in servers.items()}
        streams["on"].joined.wait(START_SECONDS)
        if not streams["on"].run:
            raise SystemExit(f"did not join: {streams['on'].heard.get(timeout=1)}")

        def come(side: str) -> Iterator[str]:
            if name not in ON_THEIR_OWN and (stream := streams[side]).over:  # it was dropped
                yield from stream.answers()
                stream.close()
                time.sleep(AGAIN_SECONDS)
                streams[side] = again(stream, another=True)
                streams[side].joined.wait(10)
            yield from member(streams[side])

        makers = [come]
    threads = [threading.Thread(target=work, args=(make,), daemon=True) for make in makers]
    for thread in threads:
        thread.start()
    os.nice(NICE - os.nice(0))  # from here on: starting is no attack
    pipe.send("ready")
    while (side := pipe.recv()) is not None:
        now[0] = side
    over.set()
    pipe.send({side: counts.most_common() for side, counts in got.items()})
    os._exit(0)  # threads may wait for what never comes


def _log_to(file: Path) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


def run_decoy(pipe: Connection, log: Path, keys: Path) -> None:
    _log_to(log)
    tls = grpc.ssl_server_credentials([((keys / "server-key.pem").read_bytes(), (keys / "server.pem").read_bytes())])

    def session(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        with contextlib.suppress(grpc.RpcError):
            for number, _ in enumerate(requests):
                if number == 0:
                    yield pb.ServerMessage(joined=pb.Joined(run="decoy")).SerializeToString()

    def answer(request: bytes, context: Any) -> bytes:
        return b""

    server = grpc.server(ThreadPoolExecutor(SILENT + 8), options=[("grpc.max_receive_message_length", WINDOW + 2**20)])
    check = {"Check": grpc.unary_unary_rpc_method_handler(answer)}
    handlers = {METHOD: grpc.stream_stream_rpc_method_handler(session), STATUS: check["Check"]}
    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler(SERVICE, handlers),
        grpc.method_handlers_generic_handler("grpc.health.v1.Health", check),
    ))  # fmt: skip
    port = server.add_secure_port(f"{HOST}:0", tls)
    server.start()
    os.nice(NICE - os.nice(0))
    pipe.send(port)
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


# --- One row ----------------------------------------------------------------------------------------------------------


class Run:
    """The server, the honest client, and the misbehaving peer with its decoy."""

    def __init__(self, name: str, folder: Path, keys: Path) -> None:
        self.name, self.folder, self.keys = name, folder, keys
        self.config = config_of(1 if name in STRANGERS else 2)
        folder.mkdir()
        (folder / "run.yaml").write_text(json.dumps(as_dict(self.config)))  # which is YAML too
        self.port, self.metrics = (free_port() for _ in range(2))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.forks: dict[str, tuple[BaseProcess, Connection]] = {}

    def __enter__(self) -> "Run":
        run = [f"--config={self.folder}/run.yaml", f"--tls.folder={self.keys}"]
        self._fork("decoy", run_decoy, self.keys)
        self._start("server", ["serve", f"--bind={HOST}:{self.port}", *run, f"--metrics.port={self.metrics}"])
        self._wait(lambda: listens(self.port), "server listens")
        self._start("client", ["join", f"{HOST}:{self.port}", "--client=0", *run])
        self._fork("peer", run_peer, self.name, {"on": self.port, "off": self.said("decoy")}, self.keys)
        self.said("peer")
        # then what the server holds for the client grows no more
        self._wait(lambda: self.figure("queue_bytes") > 0.9 * WINDOW, "client's window is full")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for fork, _pipe in self.forks.values():
            fork.kill()
            fork.join()

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "halfpass", *words, f"--out={self.folder / name}"]
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def _fork(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        """Of a process that has imported this file, which takes a tenth of the time."""
        ours, theirs = FORKS.Pipe()
        fork = FORKS.Process(target=target, args=(theirs, self.folder / f"{name}.log", *arguments), daemon=True)
        fork.start()
        theirs.close()
        self.forks[name] = fork, ours

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not done():
            if time.monotonic() > deadline or self.over:
                raise SystemExit(f"expected that the {what} within {START_SECONDS:g} s; see {self.folder}/*.log")
            time.sleep(0.1)

    def said(self, name: str) -> Any:
        pipe = self.forks[name][1]
        if not pipe.poll(START_SECONDS):
            raise SystemExit(f"expected a word of the {name} within {START_SECONDS:g} s; see {self.folder}/{name}.log")
        return pipe.recv()

    def turn(self, side: str) -> None:
        """The peer goes to the other one."""
        self.forks["peer"][1].send(side)

    def got(self) -> dict[str, list[tuple[str, int]]]:
        """What the peer got on either side, most often first; it has ended then."""
        self.forks["peer"][1].send(None)
        answers: dict[str, list[tuple[str, int]]] = self.said("peer")
        return answers

    @property
    def over(self) -> bool:
        return any(self.processes[name].poll() is not None for name in ("server", "client") if name in self.processes)

    def figure(self, name: str, client: int = 0) -> int:
        """Of the honest client, or another; asked at a port to which no peer comes."""
        page = f"http://{HOST}:{self.metrics}/metrics"
        with contextlib.suppress(OSError), urllib.request.urlopen(page, timeout=5) as figures:
            for line in figures.read().decode().splitlines():
                if line.startswith(f'halfpass_{name}{{client="{client}"}}'):
                    return int(float(line.split()[-1]))
        return 0

    def batches(self) -> int:
        """That the server has learned from."""
        return self.figure("batches_applied_total")

    def rate(self, seconds: float) -> float | None:
        """Batches per second; None where the run is over before."""
        before, began = self.batches(), time.monotonic()
        while time.monotonic() - began < seconds and not self.over:
            time.sleep(0.05)
        after, took = self.batches(), time.monotonic() - began
        return None if self.over or after == 0 else (after - before) / took

    def status_seconds(self) -> float | None:
        """How long an honest question takes; None where it has no answer."""
        began = time.monotonic()
        try:
            ask_status(f"{HOST}:{self.port}", trust_to_ask(TlsConfig(folder=str(self.keys))))
        except HalfpassError:
            return None
        return time.monotonic() - began

    def peak_mb(self, *, anew: bool = False) -> float:
        """The server's resident set at its peak; `anew` begins another one."""
        of = Path(f"/proc/{self.processes['server'].pid}")
        if anew:
            (of / "clear_refs").write_text("5")  # proc(5): resets the peak
        (line,) = (line for line in (of / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    def log_lines(self) -> int:
        return (self.folder / "server.log").read_bytes().count(b"\n")

    def last_line(self) -> str:
        lines = (self.folder / "client.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""


def free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def measure(name: str, rounds: int, seconds: float, folder: Path, keys: Path) -> Row:
    table: dict[str, tuple[str, Any]] = {**STRANGERS, **MEMBERS}
    found: dict[str, list[float]] = {"on": [], "off": []}
    asked = list[float | None]()
    with Run(name, folder, keys) as run:
        run.peak_mb(anew=True)
        run.rate(seconds)
        before = peak = run.peak_mb()
        spent = {"on": 0.0, "off": 0.0}
        lines = run.log_lines()
        for number in range(rounds):
            for side in ("off", "on") if number % 2 == 0 else ("on", "off"):
                began = time.monotonic()
                run.turn(side)
                time.sleep(seconds / 5)
                if (rate := run.rate(seconds)) is not None:
                    found[side].append(rate)
                if side == "on" and not run.over:
                    asked.append(run.status_seconds())
                spent[side] += time.monotonic() - began
                if not run.over:
                    peak = run.peak_mb()
            if run.over:
                break
        run.turn("off")
        dropped = 0 if run.over or name in STRANGERS else run.figure("dropped_total", MEMBER)
        if not run.rate(seconds):  # the run is over, and is being saved
            deadline = time.monotonic() + END_SECONDS
            while not run.over and time.monotonic() < deadline:
                time.sleep(0.1)
        ended, lines = run.over, run.log_lines() - lines
        got = run.got()
        heard = ""
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.processes["client"].wait(10)
            heard = run.last_line()
    pairs = list(zip(found["on"], found["off"], strict=False))
    ratios = sorted(on / off for on, off in pairs)
    times = [one for one in asked if one is not None]
    return {
        "peer": "member" if name in MEMBERS else "stranger", "does": table[name][0],
        "rate_over_undisturbed": statistics.median(ratios) if ratios and not ended else None,
        "lowest": ratios[0] if ratios and not ended else None, "highest": ratios[-1] if ratios and not ended else None,
        "bar": BAR, "ended_the_run": ended, "memory_mb_over_undisturbed": round(peak - before, 1),
        "undisturbed_per_second": statistics.median(found["off"]) if found["off"] else None, "rounds": len(pairs),
        "attempts_per_second": sum(count for _, count in got["on"]) / max(spent["on"], 1e-9),
        "attempts_per_second_off": sum(count for _, count in got["off"]) / max(spent["off"], 1e-9),
        "log_lines_per_second": lines / max(spent["on"], 1e-9),
        "status_seconds": statistics.median(times) if times else None, "status_failures": asked.count(None),
        "dropped": dropped,
        "got": [answer[:300] for answer, _ in got["on"] if answer][:4], "honest_client_heard": heard or None,
    }  # fmt: skip


def met(row: Row) -> bool:
    rate = row["rate_over_undisturbed"]
    return rate is not None and rate >= row["bar"] and not row["ended_the_run"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a hostile peer costs a run.")
    parser.add_argument("--only", help=f"one or several of {', '.join([*STRANGERS, *MEMBERS])}, with commas between")
    parser.add_argument("--rounds", type=int, default=5, help="of both stretches")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a stretch")
    parser.add_argument("--quick", action="store_true", help=f"one short round, of {', '.join(QUICK)}")
    parser.add_argument("--keep", type=Path, help="folder for the runs and their logs; else they are removed")
    parser.add_argument("--out", type=Path, help="file to write, such as results/hostile.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 1.0
    names = options.only.split(",") if options.only else list(QUICK if options.quick else [*STRANGERS, *MEMBERS])
    made = {"environment": environment(), "command": command_line("python benchmarks/hostile.py", arguments)}
    rows = list[Row]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.keep is None else options.keep.absolute()
        make_certificates(folder / "keys", clients=2, tokens=True)
        for name in names:
            rows.append(measure(name, options.rounds, options.seconds, folder / name, folder / "keys"))
            say(f"{name}: {rows[-1]}")
            if options.out is not None:
                write_json(options.out, {**made, "rows": rows})
    return 0 if options.quick or all(map(met, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
