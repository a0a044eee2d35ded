"""gRPC: one bidirectional stream per client, its life from Join to Finished, and every wait's deadline.

`Hub` is the server's end of all streams, `Connection` a client's end of its own. Either reads on a thread of its own,
so that acknowledgements and gradients are taken while a sender is blocked, and says `Alive` when it has nothing else to
say, so that a peer that is frozen can be told from one that is busy.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what its C++ core logs is said in our own errors

import grpc
from google.protobuf.message import DecodeError

from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.meter import Meter
from halfpass.wire.sockets import connection_traffic

SERVICE, METHOD = "halfpass.SplitLearning", "Session"
CONNECT_SECONDS = 10.0  # to reach a server, and for a newcomer to say Join
STOP_SECONDS = 2.0
OVERHEAD_BYTES = 2**20  # of a message beyond the tensors that the window admits
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class PeerFailedError(RunError):
    """The other side said why it stopped; its words are passed on as they are."""

    def __init__(self, reason: str, exit_status: int = 1) -> None:
        Exception.__init__(self, reason)
        self.exit_status = exit_status


def check_loopback(address: str, place: str) -> None:
    """Refuses anything but loopback: there is no TLS yet, and activations and labels would travel in the clear."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or int(port) > 65535 or not host:
        raise InputError(place, "HOST:PORT", repr(address), "for example 127.0.0.1:7465")
    if host not in LOOPBACK_HOSTS:
        raise InputError(
            place, f"a loopback host ({', '.join(LOOPBACK_HOSTS)})", repr(host),
            "this version has no TLS: use an SSH tunnel between machines",
        )  # fmt: skip


def _options(limit_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limit_bytes),
        ("grpc.max_send_message_length", limit_bytes),
        ("grpc.enable_http_proxy", 0),  # what is meant for loopback stays there, whatever http_proxy says
        ("grpc.so_reuseport", 0),  # or a second server would share the port instead of being told that it is in use
    ]


def _heartbeat_seconds(timeout: float) -> float:
    return min(5.0, timeout / 4)


# ---------------------------------------------------------------------------------------------------- the server's end


@dataclass(frozen=True)
class Received:
    """A message from a client; of a batch only the decoded form is kept."""

    kind: str
    size: int
    message: pb.ClientMessage | None = None
    batch: CutBatch | None = None
    test: bool = False


@dataclass
class _Stream:
    """One client's stream at the server."""

    client: int
    remote_port: int
    meter: Meter = field(default_factory=Meter)
    incoming: deque[Received] = field(default_factory=deque)
    incoming_bytes: int = 0
    outgoing: "queue.SimpleQueue[pb.ServerMessage | None]" = field(default_factory=queue.SimpleQueue)
    heard: float = field(default_factory=time.monotonic)
    failure: HalfpassError | None = None
    finished: bool = False


class Hub:
    """All clients' streams, at the server.

    `admit(join)` raises the reason for refusing a newcomer; it runs on the newcomer's thread. `check(client, batch)`
    raises the reason for rejecting a batch.
    """

    def __init__(
        self,
        bind: str,
        *,
        clients: int,
        window_bytes: int,
        timeout: float,
        admit: Callable[[pb.Join], None],
        check: Callable[[int, CutBatch], None],
    ) -> None:
        self._clients, self._window_bytes, self._timeout = clients, window_bytes, timeout
        self._admit, self._check = admit, check
        self._streams: dict[int, _Stream] = {}
        self._changed = threading.Condition()
        self._turn = 0
        self._grpc, self.port = _listen(bind, window_bytes + OVERHEAD_BYTES, clients, self._session)

    # -- what the training loop calls

    def wait_for_clients(self, seconds: float) -> None:
        """Until every client has joined; raises RunError naming those that have not."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while len(self._streams) < self._clients:
                self._raise_failures()
                if time.monotonic() > deadline:
                    missing = sorted(set(range(self._clients)) - set(self._streams))
                    raise RunError(
                        f"server on port {self.port}", f"{self._clients} clients within {seconds:g} s",
                        f"none with number {', '.join(map(str, missing))}", "start them with halfpass join",
                    )  # fmt: skip
                self._changed.wait(0.2)

    def take(self, clients: Collection[int], *kinds: str) -> tuple[int, Received]:
        """The next message of any of `clients`, which must be of one of `kinds`; taken in turn where several wait.

        Raises RunError when any client of the run is lost, or one of these is silent for longer than the timeout.
        """
        with self._changed:
            while True:
                for client in sorted(clients, key=lambda c: (c - self._turn) % self._clients):
                    stream = self._streams[client]
                    if stream.incoming:
                        self._turn = client + 1
                        received = stream.incoming.popleft()
                        stream.incoming_bytes -= received.size
                        self._changed.notify_all()
                        return client, _of_kind(received, kinds, client)
                self._raise_failures()
                self._raise_silence(clients, " or ".join(kinds))
                self._changed.wait(min(0.2, self._timeout))

    def send(self, client: int, message: pb.ServerMessage) -> None:
        self._streams[client].outgoing.put(message)

    def meter(self, client: int) -> Meter:
        return self._streams[client].meter

    def socket_traffic(self, client: int) -> tuple[int, int] | None:
        """(up, down) bytes on the client's connection so far, or None where the system does not say."""
        traffic = connection_traffic(self.port, self._streams[client].remote_port)
        return None if traffic is None else (traffic[1], traffic[0])

    def release(self, client: int) -> None:
        """Ends a client's stream in good order, once it has said Finished."""
        self._streams[client].outgoing.put(None)

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells every client why the run ends."""
        for stream in list(self._streams.values()):
            stream.outgoing.put(pb.ServerMessage(failed=pb.Failed(reason=reason, exit_status=exit_status)))
            stream.outgoing.put(None)

    def stop(self) -> None:
        self._grpc.stop(STOP_SECONDS).wait(2 * STOP_SECONDS)

    def _raise_failures(self) -> None:
        for stream in self._streams.values():
            if stream.failure is not None:
                raise stream.failure

    def _raise_silence(self, clients: Collection[int], what: str) -> None:
        for client in clients:
            if time.monotonic() - self._streams[client].heard > self._timeout:
                raise RunError(
                    f"client {client}", f"{what} or a sign of life within {self._timeout:g} s",
                    "none", "see whether it still runs, or raise wire.timeout",
                )  # fmt: skip

    # -- one client's stream, on gRPC's threads

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        guard = threading.Timer(CONNECT_SECONDS, context.cancel)  # whoever connects and says nothing
        guard.daemon = True
        guard.start()
        try:
            stream = self._join(next(requests, b""), context)
        except HalfpassError as error:
            failed = pb.Failed(reason=str(error), exit_status=error.exit_status)
            yield pb.ServerMessage(failed=failed).SerializeToString()
            return
        except grpc.RpcError:
            return
        finally:
            guard.cancel()
        threading.Thread(target=self._read, args=(stream, requests), daemon=True).start()
        yield from self._replies(stream)

    def _join(self, data: bytes, context: grpc.ServicerContext) -> _Stream:
        message = _parse(data)
        if message is None or message.WhichOneof("kind") != "join":
            raise InputError("first message of a client", "Join", "something else", "use halfpass join")
        join = message.join
        with self._changed:
            self._refuse_number(join.client)
            self._admit(join)
            stream = _Stream(join.client, int(context.peer().rpartition(":")[2]))
            stream.meter.count_up(message, len(data))
            stream.outgoing.put(pb.ServerMessage(joined=pb.Joined()))
            self._streams[join.client] = stream
            self._changed.notify_all()
        return stream

    def _refuse_number(self, client: int) -> None:
        if client >= self._clients:
            raise InputError(
                f"client {client} at joining", f"a number from 0 to {self._clients - 1}", str(client),
                "choose another with --client",
            )  # fmt: skip
        if client in self._streams:
            raise InputError(
                f"client {client} at joining", "a number that is free", "one that has joined already",
                "choose another with --client",
            )  # fmt: skip

    def _replies(self, stream: _Stream) -> Iterator[bytes]:
        while True:
            try:
                message = stream.outgoing.get(timeout=_heartbeat_seconds(self._timeout))
            except queue.Empty:
                message = pb.ServerMessage(alive=pb.Alive())
            if message is None:
                return
            data = message.SerializeToString()
            stream.meter.count_down(message, len(data))
            yield data

    def _read(self, stream: _Stream, requests: Iterator[bytes]) -> None:
        failure: RunError | None = None
        try:
            for data in requests:
                self._accept(stream, data)
        except grpc.RpcError:
            pass  # the connection is gone; said below
        except Exception as error:  # a defect of ours must not look like a silent client
            failure = RunError(f"client {stream.client}", "a message that can be read", repr(error), "report this")
        with self._changed:
            if failure is not None:
                stream.failure = failure
            if not stream.finished and stream.failure is None:
                stream.failure = RunError(
                    f"client {stream.client}", "its end message", "a stream that ended without it",
                    "look at what that client printed",
                )  # fmt: skip
            self._changed.notify_all()

    def _accept(self, stream: _Stream, data: bytes) -> None:
        """Takes in one message; what cannot be used is rejected with the reason, and the stream goes on."""
        stream.heard = time.monotonic()
        try:
            received = self._decode(stream, data)
        except HalfpassError as error:
            stream.outgoing.put(pb.ServerMessage(rejected=pb.Rejected(reason=str(error))))
            return
        if received.kind == "alive":
            return
        with self._changed:
            if received.kind == "failed" and received.message is not None:
                stream.failure = _failure_of(stream.client, received.message.failed)
            else:
                stream.finished = received.kind == "finished"
                while stream.incoming_bytes > self._window_bytes and stream.failure is None:
                    self._changed.wait(0.2)  # a client that ignores its window is held back by TCP
                stream.incoming.append(received)
                stream.incoming_bytes += received.size
            self._changed.notify_all()

    def _decode(self, stream: _Stream, data: bytes) -> Received:
        message = _parse(data)
        if message is None:
            raise InputError(
                f"message of client {stream.client}", "a ClientMessage", f"{len(data)} bytes that are none",
                "both sides must run the same halfpass",
            )  # fmt: skip
        stream.meter.count_up(message, len(data))
        kind = str(message.WhichOneof("kind"))
        if kind != "batch":
            return Received(kind, len(data), message)
        batch = messages.read_batch(message.batch)
        self._check(stream.client, batch)
        return Received(kind, len(data), batch=batch, test=message.batch.test)


def _parse(data: bytes) -> pb.ClientMessage | None:
    try:
        message = pb.ClientMessage.FromString(data)
    except DecodeError:
        return None
    return message if message.WhichOneof("kind") else None


def _failure_of(client: int, failed: pb.Failed) -> PeerFailedError:
    """A client's own words, with its number where they do not begin with it."""
    named = failed.reason.startswith(f"client {client}")
    return PeerFailedError(failed.reason if named else f"client {client}: {failed.reason}", failed.exit_status)


def _of_kind(received: Received, kinds: tuple[str, ...], client: int) -> Received:
    if received.kind not in kinds:
        raise RunError(f"client {client}", " or ".join(kinds), received.kind, "both sides must run the same halfpass")
    return received


def _listen(
    bind: str, limit_bytes: int, clients: int, session: Callable[..., Iterator[bytes]]
) -> tuple[grpc.Server, int]:
    check_loopback(bind, "server address")
    # A thread per stream, and some for newcomers that must be refused.
    server = grpc.server(ThreadPoolExecutor(clients + 8, thread_name_prefix="session"), options=_options(limit_bytes))
    handler = grpc.stream_stream_rpc_method_handler(session)  # bytes in, bytes out: parsed and counted here
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    try:
        port = server.add_insecure_port(bind)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InputError("server address", "a free port", f"{bind}, which is in use", "choose another with --bind")
    server.start()
    return server, port


# ---------------------------------------------------------------------------------------------------- a client's end


class Connection:
    """A client's stream to the server. Sending never waits but for the window; reading goes on beside it."""

    def __init__(self, address: str, *, client: int, window_bytes: int, timeout: float) -> None:
        check_loopback(address, "server address")
        self._who, self._timeout, self._window_bytes = f"server at {address}", timeout, window_bytes
        self._client = client
        self._outgoing: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._unacknowledged: deque[tuple[int, int, int]] = deque()  # (epoch, step, bytes), oldest first
        self._incoming: deque[pb.ServerMessage] = deque()
        self._changed = threading.Condition()
        self._heard = time.monotonic()
        self._failure: HalfpassError | None = None
        self._ended = False
        self._channel = grpc.insecure_channel(address, options=_options(window_bytes + OVERHEAD_BYTES))
        self._connect(address)
        self._call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._requests())
        threading.Thread(target=self._read, daemon=True).start()

    def _connect(self, address: str) -> None:
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise InputError(
                "server address", f"a halfpass server within {CONNECT_SECONDS:g} s", f"none at {address}",
                "start one with halfpass serve",
            ) from None  # fmt: skip

    def send(self, message: pb.ClientMessage) -> None:
        self._outgoing.put(message)

    def send_batch(self, message: pb.ClientMessage) -> float:
        """Sends a batch once the window has room for it; returns the seconds that it was blocked."""
        size, began = message.ByteSize(), time.perf_counter()
        with self._changed:
            if self._failure is not None:
                raise self._failure
            self._wait(lambda: self._in_flight() + size <= self._window_bytes or not self._unacknowledged,
                       "an acknowledgement")  # fmt: skip
            self._unacknowledged.append((message.batch.epoch, message.batch.step, size))
        self._outgoing.put(message)
        return time.perf_counter() - began

    def drain(self) -> None:
        """Until everything sent has been acknowledged."""
        with self._changed:
            self._wait(lambda: not self._unacknowledged, "an acknowledgement")

    def receive(self, *kinds: str) -> pb.ServerMessage:
        """The next message other than an acknowledgement, which must be of one of `kinds`."""
        with self._changed:
            self._wait(lambda: bool(self._incoming), " or ".join(kinds))
            message = self._incoming.popleft()
        found = message.WhichOneof("kind")
        if found not in kinds:
            raise RunError(self._who, " or ".join(kinds), str(found), "both sides must run the same halfpass")
        return message

    def finish(self) -> None:
        """Says Finished and waits for the server to end the stream."""
        self.send(pb.ClientMessage(finished=pb.Finished()))
        with self._changed:
            self._wait(lambda: self._ended, "the end of the stream")
        self.close()

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells the server why this client stops, as far as it still listens."""
        self.send(pb.ClientMessage(failed=pb.Failed(reason=reason, exit_status=exit_status)))
        self._outgoing.put(None)
        with self._changed:
            self._changed.wait_for(lambda: self._ended, timeout=STOP_SECONDS)
        self.close()

    def close(self) -> None:
        self._outgoing.put(None)
        self._channel.close()

    def _in_flight(self) -> int:
        return sum(size for _, _, size in self._unacknowledged)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        while not ready():
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise RunError(self._who, what, "the end of the stream", "look at what the server printed")
            if time.monotonic() - self._heard > self._timeout:
                raise RunError(
                    self._who, f"{what} or a sign of life within {self._timeout:g} s", "none",
                    "see whether it still runs, or raise wire.timeout",
                )  # fmt: skip
            self._changed.wait(min(0.2, self._timeout))

    def _requests(self) -> Iterator[bytes]:
        while True:
            try:
                message = self._outgoing.get(timeout=_heartbeat_seconds(self._timeout))
            except queue.Empty:
                message = pb.ClientMessage(alive=pb.Alive())
            if message is None:
                return
            yield message.SerializeToString()

    def _read(self) -> None:
        failure: HalfpassError | None = None
        try:
            for data in self._call:
                self._accept(pb.ServerMessage.FromString(data))
        except grpc.RpcError as error:
            failure = RunError(
                self._who, "a connection until the end", f"{error.code().name.lower()}: {error.details()}",
                "look at what the server printed",
            )  # fmt: skip
        except Exception as error:
            expected = "a message that can be read"
            failure = RunError(self._who, expected, repr(error), "both sides must run the same halfpass")
        with self._changed:
            self._failure = self._failure or failure
            self._ended = True
            self._changed.notify_all()

    def _accept(self, message: pb.ServerMessage) -> None:
        kind = message.WhichOneof("kind")
        with self._changed:
            self._heard = time.monotonic()
            if kind == "ack":
                self._acknowledge(message.ack.epoch, message.ack.step)
            elif kind == "failed":
                self._failure = PeerFailedError(message.failed.reason, message.failed.exit_status)
            elif kind == "rejected":
                self._failure = PeerFailedError(f"{self._who} rejected a message: {message.rejected.reason}")
            elif kind != "alive":
                if kind == "gradients":
                    self._acknowledge(message.gradients.epoch, message.gradients.step)
                self._incoming.append(message)
            self._changed.notify_all()

    def _acknowledge(self, epoch: int, step: int) -> None:
        """Everything up to and including (epoch, step) is done with."""
        while self._unacknowledged and self._unacknowledged[0][:2] <= (epoch, step):
            self._unacknowledged.popleft()
