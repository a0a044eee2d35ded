"""The server's end of all clients' streams (`service.py` says what a stream is)."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

import grpc
from google.protobuf.message import DecodeError

from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.front import Front
from halfpass.wire.meter import Meter
from halfpass.wire.service import (
    LOG,
    METHOD,
    OVERHEAD_BYTES,
    SERVICE,
    STOP_SECONDS,
    Patience,
    Pulse,
    channel_options,
    check_address,
    heartbeat_seconds,
)
from halfpass.wire.sockets import connection_traffic
from halfpass.wire.trust import Trust, check_identity

JOIN_SECONDS = 10.0  # for a newcomer to say Join
MOST_JOIN_BYTES = 2**22  # the plan of a cut names all weights
EACH_BYTES = 512  # that a message takes beside its content
MOST_REJECTED = 100  # messages of a client; ours stops at the first


@dataclass(frozen=True)
class Received:
    """A message from a client; a batch in decoded form, and as it came where the hub is to keep that."""

    kind: str
    size: int
    message: pb.ClientMessage | None = None
    batch: CutBatch | None = None
    test: bool = False
    upload: pb.Batch | None = None


@dataclass
class _Stream:
    """One client's stream at the server."""

    client: int
    remote_port: int
    meter: Meter = field(default_factory=Meter)
    incoming: deque[Received] = field(default_factory=deque)
    incoming_bytes: int = 0
    ends: deque[pb.EpochEnd] = field(default_factory=deque)
    buffers: messages.Buffers = field(default_factory=messages.Buffers)
    outgoing: "queue.SimpleQueue[pb.ServerMessage | None]" = field(default_factory=queue.SimpleQueue)
    pulse: Pulse = field(default_factory=Pulse)
    failure: HalfpassError | None = None
    finished: bool = False
    rejected: int = 0  # messages that could not be used


class Hub:
    """All clients' streams, at the server.

    `keep_uploads` hands batches on as they came, too, for a store. `admit(join)` raises the reason for refusing a
    newcomer; it runs on the newcomer's thread. `check(client, batch)` raises the reason for rejecting a batch before it
    is decoded, `check_values(client, batch)` afterwards.
    """

    def __init__(
        self,
        bind: str,
        *,
        clients: int,
        window_bytes: int,
        timeout: float,
        admit: Callable[[pb.Join], None],
        check: Callable[[int, pb.Batch], None],
        check_values: Callable[[int, CutBatch], None] = lambda client, batch: None,
        keep_uploads: bool = False,
        trust: Trust | None = None,
        insecure: bool = False,
        of_edge: bool = False,
    ) -> None:
        """`trust`: of a server that encrypts. `insecure`: strangers may reach one that does not. `of_edge`: its client
        is an edge."""
        self._trust, self._of_edge = trust, of_edge
        self._clients, self._window_bytes, self._timeout = clients, window_bytes, timeout
        self._admit, self._check, self._check_values, self._keep_uploads = admit, check, check_values, keep_uploads
        self._streams: dict[int, _Stream] = {}
        self._changed = threading.Condition()
        self._turn = 0
        self._stopped = False
        self._readers: list[threading.Thread] = []
        check_address(bind, "server address", encrypted=trust is not None, insecure=insecure)
        self._front: Front | None = None
        inner = bind if trust is None else "127.0.0.1:0"
        self._grpc, self.port = _listen(inner, window_bytes + OVERHEAD_BYTES, clients, self._session)
        if trust is not None:
            trust.check_server()
            try:
                self._front = Front(bind, trust, self.port)
            except InputError:
                self._grpc.stop(0)
                raise
            self.port = self._front.port

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

        Raises RunError when any client of the run is lost, or one of these is silent for longer than the timeout. A
        wait for one that says that it lives, and nothing else, is logged from time to time.
        """
        patience = Patience()
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
                patience.tell(f"client {', '.join(map(str, sorted(clients)))}", " or ".join(kinds))
                self._changed.wait(min(0.2, self._timeout))

    def take_ends(self, clients: Collection[int]) -> dict[int, pb.EpochEnd] | None:
        """The next end of an epoch or round of each of `clients`, once all have come. What came before it is still to
        be taken with `take`, and the end itself in its place."""
        with self._changed:
            if not all(self._streams[client].ends for client in clients):
                return None
            return {client: self._streams[client].ends.popleft() for client in clients}

    def give_back(self, client: int, batch: CutBatch) -> None:
        """The batch is done with: later ones are decoded into its tensors."""
        for tensor in batch.tensors:
            self._streams[client].buffers.give_back(tensor)

    def send(self, client: int, message: pb.ServerMessage) -> None:
        self._streams[client].outgoing.put(message)

    def meter(self, client: int) -> Meter:
        return self._streams[client].meter

    def socket_traffic(self, client: int) -> tuple[int, int] | None:
        """(up, down) bytes on the client's connection so far, or None where the system does not say."""
        remote = self._streams[client].remote_port
        traffic = connection_traffic(self.port, remote) if self._front is None else self._front.traffic(remote)
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
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._front is not None:
            self._front.close()
        self._grpc.stop(STOP_SECONDS).wait(2 * STOP_SECONDS)
        for reader in self._readers:  # a thread inside PyTorch when Python ends would abort the process
            reader.join(STOP_SECONDS)

    def _raise_failures(self) -> None:
        for stream in self._streams.values():
            if stream.failure is not None:
                raise stream.failure

    def _raise_silence(self, clients: Collection[int], what: str) -> None:
        for client in clients:
            if self._streams[client].pulse.is_lost(self._timeout, partial(self._bytes_of, client)):
                raise RunError(
                    f"client {client}", f"{what} or a sign of life within {self._timeout:g} s",
                    "none", "see whether it still runs, or raise wire.timeout",
                )  # fmt: skip

    def _bytes_of(self, client: int) -> int | None:
        """That came from it, at the socket."""
        traffic = self.socket_traffic(client)
        return None if traffic is None else traffic[0]

    # -- one client's stream, on gRPC's threads

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        guard = threading.Timer(JOIN_SECONDS, context.cancel)  # whoever connects and says nothing
        guard.daemon = True
        guard.start()
        try:
            first = next(requests, b"")
            guard.cancel()
            stream = yield from self._joined(first, context)
        except HalfpassError as error:
            LOG.warning("refused a newcomer: %s", error)
            failed = pb.Failed(reason=str(error), exit_status=error.exit_status)
            yield pb.ServerMessage(failed=failed).SerializeToString()
            return
        except grpc.RpcError:
            return
        finally:
            guard.cancel()
        reader = threading.Thread(target=self._read, args=(stream, requests), daemon=True)
        self._readers.append(reader)
        reader.start()
        yield from self._replies(stream)

    def _joined(self, first: bytes, context: grpc.ServicerContext) -> Generator[bytes, None, _Stream]:
        """Admits a newcomer, with signs of life meanwhile: with the first one the network is built."""
        alive = pb.ServerMessage(alive=pb.Alive())
        said = 0
        with ThreadPoolExecutor(1) as aside:
            joining = aside.submit(self._join, first, context)
            while not wait([joining], heartbeat_seconds(self._timeout)).done:
                yield alive.SerializeToString()
                said += 1
        stream = joining.result()
        for _ in range(said):
            stream.meter.count_down(alive, alive.ByteSize())
        return stream

    def _join(self, data: bytes, context: grpc.ServicerContext) -> _Stream:
        message = _parse(data) if len(data) <= MOST_JOIN_BYTES else None
        if message is None or message.WhichOneof("kind") != "join":
            raise InputError("first message of a client", "Join", "something else", "use halfpass join")
        join, port = message.join, int(context.peer().rpartition(":")[2])
        self._identify(join, port, context)
        with self._changed:
            self._refuse_number(join.client)
            self._admit(join)
            stream = _Stream(join.client, port)
            stream.meter.count_up(message, len(data))
            stream.outgoing.put(pb.ServerMessage(joined=pb.Joined()))
            self._streams[join.client] = stream
            self._changed.notify_all()
        return stream

    def _identify(self, join: pb.Join, port: int, context: grpc.ServicerContext) -> None:
        """Raises InputError unless a newcomer has shown that it is the client as which it joins."""
        if self._front is None or self._trust is None:
            return
        place, peer = f"client {join.client} at joining", self._front.peer(port)
        if peer is None:
            raise InputError(place, "a connection with TLS", "one to the port behind it", "use the server's address")
        said = {str(key): str(value) for key, value in context.invocation_metadata()}
        check_identity(place, join.client, peer.names, said, self._trust.digests(), of_edge=self._of_edge)
        self._front.joined(port)

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
                message = stream.outgoing.get(timeout=heartbeat_seconds(self._timeout))
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
        stream.pulse.beat()
        try:
            received = self._decode(stream, data)
        except HalfpassError as error:
            self._reject(stream, error)
            return
        if received.kind == "alive":
            return
        with self._changed:
            if received.kind == "failed" and received.message is not None:
                stream.failure = _failure_of(stream.client, received.message.failed)
            else:
                stream.finished = received.kind == "finished"
                while stream.incoming_bytes > self._window_bytes and stream.failure is None and not self._stopped:
                    self._changed.wait(0.2)  # a client that sends more than its window is held back by TCP
                    stream.pulse.beat()  # it is we who do not listen
                stream.incoming.append(received)
                stream.incoming_bytes += received.size
                if received.kind == "epoch_end" and received.message is not None:
                    stream.ends.append(received.message.epoch_end)
            self._changed.notify_all()

    def _reject(self, stream: _Stream, error: HalfpassError) -> None:
        stream.rejected += 1
        if stream.rejected <= MOST_REJECTED:
            LOG.warning("rejected a message of client %d: %s", stream.client, error)
            stream.outgoing.put(pb.ServerMessage(rejected=pb.Rejected(reason=str(error))))
        elif stream.failure is None:
            with self._changed:
                expected = f"at most {MOST_REJECTED} messages that cannot be used"
                remedy = "look at what was said of them"
                stream.failure = RunError(f"client {stream.client}", expected, "more", remedy)
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
            return Received(kind, len(data) + EACH_BYTES, message)
        self._check(stream.client, message.batch)
        batch = messages.read_batch(message.batch, stream.buffers)
        self._check_values(stream.client, batch)
        upload = message.batch if self._keep_uploads else None
        return Received(kind, len(data) + EACH_BYTES, batch=batch, test=message.batch.test, upload=upload)


def _parse(data: bytes) -> pb.ClientMessage | None:
    if not messages.few_parts(data):
        return None
    try:
        message = pb.ClientMessage.FromString(data)
    except DecodeError:
        return None
    return message if message.WhichOneof("kind") else None


def _failure_of(client: int, failed: pb.Failed) -> PassedOnError:
    """A client's own words, with its number where they do not begin with it."""
    named = failed.reason.startswith(f"client {client}")
    return PassedOnError(failed.reason if named else f"client {client}: {failed.reason}", failed.exit_status)


def _of_kind(received: Received, kinds: tuple[str, ...], client: int) -> Received:
    if received.kind not in kinds:
        raise RunError(f"client {client}", " or ".join(kinds), received.kind, "both sides must run the same halfpass")
    return received


def _listen(
    bind: str, limit_bytes: int, clients: int, session: Callable[..., Iterator[bytes]]
) -> tuple[grpc.Server, int]:
    # A thread per stream, and some for newcomers that must be refused.
    threads = ThreadPoolExecutor(clients + 8, thread_name_prefix="session")
    server = grpc.server(threads, options=channel_options(limit_bytes))
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
