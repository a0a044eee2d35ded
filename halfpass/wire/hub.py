"""The server's end of all clients' streams (`service.py` says what a stream is): a client whose stream is lost may make
another, and goes on where that one ended."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError, printable
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.front import Front
from halfpass.wire.meter import Meter
from halfpass.wire.outbox import Outbox
from halfpass.wire.service import (
    LOG,
    METHOD,
    OVERHEAD_BYTES,
    SERVICE,
    STATUS,
    STOP_SECONDS,
    Interrupted,
    Patience,
    Pulse,
    channel_options,
    check_address,
    heartbeat_seconds,
)
from halfpass.wire.sockets import connection_traffic
from halfpass.wire.trust import Trust, check_identity, check_trusted

JOIN_SECONDS = 10.0  # for a newcomer to say Join
MOST_JOIN_BYTES = 2**22  # the plan of a cut names all weights
EACH_BYTES = 512  # that a message takes beside its content
SAME_ANSWER_SECONDS = 0.2  # to whoever asks how far the run is
MOST_REJECTED = 100  # messages of a client; ours stops at the first
NUMBERED = ("begin", "take", "gradients", "finish")  # what has a place in the server's sequence to a client
UNNUMBERED = ("join", "alive", "failed", "test_end")  # what has none in a client's, with a test's batches


@dataclass(frozen=True)
class Received:
    """A message from a client; a batch in decoded form, and as it came where the hub is to keep that."""

    kind: str
    size: int
    message: pb.ClientMessage | None = None
    batch: CutBatch | None = None
    test: bool = False
    upload: pb.Batch | None = None
    place: int = 0  # in its client's sequence; 0 of a test's


class ClientLost(Exception):
    """A client that is waited for has been away for long, or misbehaves, and the others are enough."""

    def __init__(self, client: int, why: str) -> None:
        super().__init__(client, why)
        self.client, self.why = client, why


class StreamLost(Exception):
    """A client's stream was lost while what is not sent again came on it: a test."""


@dataclass(eq=False)
class _Stream:
    """One of a client's streams."""

    remote_port: int
    context: grpc.ServicerContext
    sent: int  # place up to which the server's sequence was sent on it, or need not be
    control: deque[pb.ServerMessage] = field(default_factory=deque)  # what has no place
    pulse: Pulse = field(default_factory=Pulse)
    begun: bool = False  # Joined is on its way
    over: bool = False
    released: bool = False  # to be ended in good order


@dataclass(eq=False)
class Peer:
    """A client of the run, whether it is there or not."""

    client: int
    outbox: Outbox = field(default_factory=Outbox)
    meter: Meter = field(default_factory=Meter)
    received: int = 0  # place up to which its messages have come
    applied: int = 0  # and up to which they have been worked off
    durable: int = 0  # and up to which they are in a checkpoint
    ended: int = 0  # its ends of epochs and rounds that were taken ahead of their place, which is behind `applied`
    known_ends: int = 0  # so many of those that come are such ones
    sockets: tuple[int, int] | None = (0, 0)  # (up, down) bytes of streams that are over; None: not known
    stream: _Stream | None = None
    streams: int = 0  # that it has had
    away: float | None = None  # since when it has none
    incoming: deque[Received] = field(default_factory=deque)
    incoming_bytes: int = 0
    ends: deque[pb.EpochEnd] = field(default_factory=deque)
    buffers: messages.Buffers = field(default_factory=messages.Buffers)
    failure: HalfpassError | None = None
    finished: bool = False
    given_up: bool = False  # the run goes on without it
    anew: int | None = None  # it begins anew behind that place of the server's, and has not heard of it yet
    rejected: int = 0  # messages that could not be used

    def control(self, message: pb.ServerMessage) -> None:
        """To be sent while its stream lasts."""
        if self.stream is not None:
            message.applied, message.durable = self.applied, self.durable
            if message == pb.ServerMessage(ack=pb.Ack(), applied=self.applied, durable=self.durable):
                waiting = self.stream.control
                if waiting and waiting[-1].WhichOneof("kind") == "ack" and not waiting[-1].ack.test:
                    waiting.pop()  # the new one says as much; a client that reads nothing fills no memory
            self.stream.control.append(message)


@dataclass(frozen=True)
class Look:
    """What is known of a client, at one time; places as in `Peer`."""

    client: int
    received: int
    applied: int
    durable: int
    queued: int  # messages that wait to be taken
    queued_bytes: int
    up: dict[str, int]  # bytes by kind
    down: dict[str, int]
    kept_bytes: int  # that the client may need again
    reconnections: int
    away: float | None  # seconds for which it has had no stream
    finished: bool
    given_up: bool
    rejected: int


class _Health(HealthServicer):
    """Answers questions, each with little work; nobody is told of changes for as long as he likes to listen."""

    def __init__(self) -> None:
        super().__init__(experimental_non_blocking=False)

    def Watch(self, request: object, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask by Check")
        return iter(())


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
        reconnect: float = 0.0,
        quorum: int | None = None,
        run: str = "",
        outbox: Callable[[int], Outbox] = lambda client: Outbox(),
        peers: Sequence[Peer] = (),
        leaving: Callable[[], bool] = lambda: False,
        status: Callable[[], pb.StatusReply] = pb.StatusReply,
    ) -> None:
        """`trust`: of a server that encrypts. `insecure`: strangers may reach one that does not. `of_edge`: its client
        is an edge. `reconnect`: seconds for which a lost client is waited for; or `timeout`, where as many others as
        `quorum` says are there. `run` names the run for those that come
        again; `outbox` makes what is kept for a client. `peers`: of a run that is gone on with. `leaving`: whether
        waits are to be given up, with Interrupted. `status` says how far the run is, on a thread of gRPC's."""
        self._trust, self._of_edge = trust, of_edge
        self._clients, self._window_bytes, self._timeout = clients, window_bytes, timeout
        self._admit, self._check, self._check_values, self._keep_uploads = admit, check, check_values, keep_uploads
        self._reconnect, self._run, self._outbox, self._leaving = reconnect, run, outbox, leaving
        self._quorum, self._ending = quorum, False
        self._peers = {peer.client: peer for peer in peers}
        self._gone_on_with = bool(peers)  # then clients may have more of its messages than this process has sent
        for peer in peers:
            peer.away = time.monotonic()
        self._changed, self._admitting, self._answering = threading.Condition(), threading.Lock(), threading.Lock()
        self._turn = 0
        self._stopped = False
        self.refused = 0  # newcomers
        self._readers: list[threading.Thread] = []
        check_address(bind, "server address", encrypted=trust is not None, insecure=insecure)
        self._front: Front | None = None
        self._status, self._told = status, (0.0, b"")  # when it was last said, and what
        self._health = _Health()
        self._health.set(SERVICE, HealthCheckResponse.SERVING)
        inner = bind if trust is None else "127.0.0.1:0"
        self._grpc, self.port = self._listen(inner, window_bytes + OVERHEAD_BYTES)
        if trust is not None:
            trust.check_server()
            try:
                self._front = Front(bind, trust, self.port)
            except InputError:
                self._grpc.stop(0)
                raise
            self.port = self._front.port
        threading.Thread(target=self._watch, daemon=True).start()

    def _listen(self, bind: str, limit_bytes: int) -> tuple[grpc.Server, int]:
        # A thread per stream, and some for newcomers that must be refused, and questions.
        threads = ThreadPoolExecutor(self._clients + 8, thread_name_prefix="session")
        server = grpc.server(threads, options=channel_options(limit_bytes))
        handlers = {  # bytes in, bytes out: parsed and counted here
            METHOD: grpc.stream_stream_rpc_method_handler(self._session),
            STATUS: grpc.unary_unary_rpc_method_handler(self._answer),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        add_HealthServicer_to_server(self._health, server)
        try:
            port = server.add_insecure_port(bind)
        except RuntimeError:
            port = 0
        if port == 0:
            raise InputError("server address", "a free port", f"{bind}, which is in use", "choose another with --bind")
        server.start()
        return server, port

    # -- what the training loop calls

    def wait_for_clients(self, seconds: float, enough: int | None = None) -> None:
        """Until every client has joined, or `enough` have, and none for the timeout: then the others are given up.
        Raises RunError naming those that have not."""
        least, deadline = enough or self._clients, time.monotonic() + seconds
        there, since = 0, time.monotonic()
        with self._changed:
            while len(self._peers) < self._clients:
                if enough is None:
                    self._raise_failures()
                elif self._leaving():
                    raise Interrupted
                if len(self._peers) > there:
                    there, since = len(self._peers), time.monotonic()
                missing = sorted(set(range(self._clients)) - set(self._peers))
                if there >= least and time.monotonic() - since > self._timeout:
                    for k in missing:
                        known = {"event": "given up", "client": k}
                        LOG.warning("beginning without client %d: it has not joined", k, extra=known)
                        self._peers[k] = Peer(k, self._outbox(k), given_up=True, anew=0, away=since)
                elif there < least and time.monotonic() > deadline:
                    raise RunError(
                        f"server on port {self.port}", f"{least} clients within {seconds:g} s",
                        f"none with number {', '.join(map(str, missing))}", "start them with halfpass join",
                    )  # fmt: skip
                self._changed.wait(min(0.2, self._timeout))

    def take(
        self, clients: Collection[int], *kinds: str, of: int | None = None
    ) -> tuple[int, Received]:
        """The next message of any of `clients`, which must be of one of `kinds`; taken in turn where several wait.

        Raises RunError when a client of the run is lost for longer than `reconnect`. A wait for one that says that it
        lives, and nothing else, is logged from time to time. `of`: the number of the stream on which the message is to
        come, as `streams` gives it; raises StreamLost where another has taken its place. With a quorum, ClientLost is
        raised for one of them that is away for longer than the timeout, or misbehaves, where the others are enough.
        """
        patience = Patience()
        with self._changed:
            while True:
                # First, or one that misbehaves goes on as long as others have messages waiting.
                if self._quorum is None:
                    self._raise_failures()
                else:
                    self._raise_lost(clients)
                for client in sorted(clients, key=lambda c: (c - self._turn) % self._clients):
                    peer = self._peers[client]
                    if of is not None and peer.streams != of:
                        raise StreamLost
                    if peer.incoming:
                        self._turn = client + 1
                        received = peer.incoming.popleft()
                        peer.incoming_bytes -= received.size
                        self._changed.notify_all()
                        return client, _of_kind(received, kinds, client)
                if all(self._peers[client].away is None for client in clients):
                    patience.tell(f"client {', '.join(map(str, sorted(clients)))}", " or ".join(kinds))
                self._changed.wait(min(0.2, self._timeout))

    def _raise_lost(self, clients: Collection[int]) -> None:
        if self._leaving():
            raise Interrupted
        for peer in (self._peers[client] for client in clients):
            if peer.given_up:
                raise ClientLost(peer.client, "it was given up")
            silent = 0.0 if peer.away is None or peer.incoming else time.monotonic() - peer.away
            if peer.failure is None and silent <= self._timeout:
                continue
            if self.enough_without(peer.client):
                why = f"it was away for {self._timeout:g} s" if peer.failure is None else str(peer.failure)
                raise ClientLost(peer.client, why)
            self._raise_failure(peer)

    def enough_without(self, client: int) -> bool:
        """Whether the run may go on without the client."""
        others = sum(not peer.given_up for peer in self._peers.values() if peer.client != client)
        return self._quorum is not None and others >= self._quorum

    def give_up(self, client: int) -> None:
        """The run goes on without the client, and what it has sent that was not worked off is nothing."""
        with self._changed:
            peer = self._peers[client]
            peer.given_up, peer.finished, peer.failure, peer.rejected = True, False, None, 0
            peer.anew = peer.outbox.last
            if (stream := peer.stream) is not None:
                self._end(peer, stream)
                stream.context.cancel()
            peer.incoming.clear()
            peer.ends.clear()
            peer.incoming_bytes = peer.ended = peer.known_ends = 0
            peer.applied = peer.received
            peer.outbox.let_go(peer.outbox.last)

    def end_without(self) -> None:
        """From now on nobody is let in that was given up."""
        with self._changed:
            self._ending = True

    def present(self, client: int) -> bool:
        """Whether the run counts on the client."""
        return not self._peers[client].given_up

    def streams(self, client: int) -> int:
        """How many streams the client has had so far, which is the number of the one that it has."""
        return self._peers[client].streams

    def take_ends(self, clients: Collection[int]) -> dict[int, pb.EpochEnd] | None:
        """The next end of an epoch or round of each of `clients`, once all have come. What came before it is still to
        be taken with `take`, and the end itself in its place."""
        with self._changed:
            if not all(self._peers[client].ends for client in clients):
                return None
            for client in clients:
                self._peers[client].ended += 1
            return {client: self._peers[client].ends.popleft() for client in clients}

    def give_back(self, client: int, batch: CutBatch) -> None:
        """The batch is done with: later ones are decoded into its tensors."""
        for tensor in batch.tensors:
            self._peers[client].buffers.give_back(tensor)

    def send(self, client: int, message: pb.ServerMessage) -> None:
        """What has a place in the server's sequence is kept until the client has it durably; other messages are for a
        client that is there."""
        with self._changed:
            peer = self._peers[client]
            if message.WhichOneof("kind") in NUMBERED:
                message.place = peer.outbox.last + 1
                message.applied, message.durable = peer.applied, peer.durable
                data = message.SerializeToString()
                peer.outbox.add(data)
                peer.meter.count_down(message, len(data))
            else:
                peer.control(message)
            self._changed.notify_all()

    def done(self, client: int, received: Received) -> None:
        """The message has been worked off, and with it all before it."""
        with self._changed:
            peer = self._peers[client]
            peer.applied = max(peer.applied, received.place)
            if not self._run:  # nothing is kept, nothing is gone on with
                peer.durable = peer.applied
            if received.kind == "epoch_end":
                peer.ended -= 1

    def acknowledge(self, client: int, *, test: bool = False) -> None:
        """Tells the client what has been worked off."""
        self.send(client, pb.ServerMessage(ack=pb.Ack(test=test)))

    def kept(self, durable: Mapping[int, int]) -> None:
        """Tells clients up to which place their messages are in a checkpoint."""
        for client, place in durable.items():
            self._peers[client].durable = max(self._peers[client].durable, place)
            self.acknowledge(client)

    def peer(self, client: int) -> Peer:
        return self._peers[client]

    def meter(self, client: int) -> Meter:
        return self._peers[client].meter

    def socket_traffic(self, client: int) -> tuple[int, int] | None:
        """(up, down) bytes on the client's connections so far, or None where the system does not say."""
        peer = self._peers[client]
        with self._changed:
            now = (0, 0) if peer.stream is None else self._traffic(peer.stream)
            past = peer.sockets
        return None if now is None or past is None else (past[0] + now[0], past[1] + now[1])

    def _traffic(self, stream: _Stream) -> tuple[int, int] | None:
        remote = stream.remote_port
        traffic = connection_traffic(self.port, remote) if self._front is None else self._front.traffic(remote)
        return None if traffic is None else (traffic[1], traffic[0])

    def release(self, client: int) -> None:
        """Ends a client's stream in good order, once it has said Finished."""
        with self._changed:
            if (stream := self._peers[client].stream) is not None:
                stream.released = True
            self._changed.notify_all()

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells every client why the run ends."""
        self._health.enter_graceful_shutdown()
        with self._changed:
            for peer in self._peers.values():
                if peer.stream is not None:
                    failed = pb.ServerMessage(failed=pb.Failed(reason=reason, exit_status=exit_status))
                    peer.stream.control.append(failed)
                    peer.stream.released = True
            self._changed.notify_all()

    def stop(self) -> None:
        self._health.enter_graceful_shutdown()
        with self._changed:
            self._stopped = True
            for peer in self._peers.values():
                if peer.stream is not None:
                    peer.stream.released = True  # what is to be said on it is still said
            self._changed.notify_all()
        if self._front is not None:
            self._front.close()
        self._grpc.stop(STOP_SECONDS).wait(2 * STOP_SECONDS)
        for reader in self._readers:  # a thread inside PyTorch when Python ends would abort the process
            reader.join(STOP_SECONDS)

    def _raise_failures(self) -> None:
        if self._leaving():
            raise Interrupted
        for peer in self._peers.values():
            self._raise_failure(peer)

    def _raise_failure(self, peer: Peer) -> None:
        if peer.failure is not None:
            raise peer.failure
        if peer.away is not None and not peer.finished and time.monotonic() - peer.away > self._reconnect:
            remedy = "see what it printed, and go on with halfpass resume on both sides"
            found = f"none for {self._reconnect:g} s"
            raise RunError(f"client {peer.client}", "a connection, or another one", found, remedy)

    def _watch(self) -> None:
        """On a thread of its own: ends streams on which nothing comes."""
        while not self._stopped:
            time.sleep(min(0.2, self._timeout / 4))
            if self._leaving():
                self._health.enter_graceful_shutdown()
            with self._changed:
                streams = [(peer, peer.stream) for peer in self._peers.values() if peer.stream is not None]
            for peer, stream in streams:
                if not stream.over and stream.pulse.is_lost(self._timeout, partial(self._bytes_of, stream)):
                    silence = RunError(
                        f"client {peer.client}", f"a message or a sign of life within {self._timeout:g} s",
                        "none", "see whether it still runs, or raise wire.timeout",
                    )  # fmt: skip
                    self._lose(peer, stream, silence)
                    stream.context.cancel()

    # -- who asks, and does not join

    def look(self) -> list[Look]:
        """What is known of each client that has joined."""
        now = time.monotonic()
        with self._changed:
            return [
                Look(
                    k, peer.received, peer.applied, peer.durable, len(peer.incoming), peer.incoming_bytes,
                    dict(peer.meter.up) | {"evaluation": peer.meter.evaluation_up},
                    dict(peer.meter.down) | {"evaluation": peer.meter.evaluation_down},
                    peer.outbox.kept_bytes, max(0, peer.streams - 1), None if peer.away is None else now - peer.away,
                    peer.finished, peer.given_up, peer.rejected,
                ) for k, peer in sorted(self._peers.items())
            ]  # fmt: skip

    @property
    def refusals(self) -> dict[str, int]:
        """How often a connection was refused, and somebody that wanted to join or know something."""
        return {"connection": 0 if self._front is None else self._front.refused, "newcomer": self.refused}

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """A question how far the run is; what it says is nothing. It costs the same however often it comes."""
        try:
            self._refuse_strangers("status", context)
        except InputError as error:
            self.refused += 1
            LOG.warning("refused to say: %s", error, extra={"event": "refused", "host": self._host(context)})
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        with self._answering:
            if time.monotonic() - self._told[0] > SAME_ANSWER_SECONDS:
                self._told = time.monotonic(), self._status().SerializeToString()
            return self._told[1]

    def _refuse_strangers(self, place: str, context: grpc.ServicerContext) -> None:
        """Raises InputError unless somebody has shown a certificate or a token: before a word of his is read."""
        if self._front is not None and self._trust is not None:
            peer = self._front.peer(int(context.peer().rpartition(":")[2]))
            said = {str(key): str(value) for key, value in context.invocation_metadata()}
            if peer is None:
                expected, found = "a connection with TLS", "one to the port behind it"
                raise InputError(place, expected, found, "use the server's address")
            check_trusted(place, peer.certified, said, self._trust.digests())

    def _bytes_of(self, stream: _Stream) -> int | None:
        """That came on it, at the socket."""
        traffic = self._traffic(stream)
        return None if traffic is None else traffic[0]

    # -- one client's stream, on gRPC's threads

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        guard = threading.Timer(JOIN_SECONDS, context.cancel)  # whoever connects and says nothing
        guard.daemon = True
        try:
            self._refuse_strangers("joining", context)
            guard.start()
            first = next(requests, b"")
            guard.cancel()
            peer, stream = yield from self._joined(first, context)
        except HalfpassError as error:
            self.refused += 1
            LOG.warning("refused a newcomer: %s", error, extra={"event": "refused", "host": self._host(context)})
            failed = pb.Failed(reason=str(error), exit_status=error.exit_status)
            yield pb.ServerMessage(failed=failed).SerializeToString()
            return
        except grpc.RpcError:
            return
        finally:
            guard.cancel()
        reader = threading.Thread(target=self._read, args=(peer, stream, requests), daemon=True)
        self._readers = [r for r in self._readers if r.is_alive()] + [reader]
        reader.start()
        yield from self._replies(peer, stream)

    def _joined(self, first: bytes, context: grpc.ServicerContext) -> Generator[bytes, None, tuple[Peer, _Stream]]:
        """Admits a newcomer, with signs of life meanwhile: with the first one the network is built."""
        alive = pb.ServerMessage(alive=pb.Alive())
        said = 0
        with ThreadPoolExecutor(1) as aside:
            joining = aside.submit(self._join, first, context)
            while not wait([joining], heartbeat_seconds(self._timeout)).done:
                yield alive.SerializeToString()
                said += 1
        peer, stream = joining.result()
        for _ in range(said):
            peer.meter.count_down(alive, alive.ByteSize())
        return peer, stream

    def _join(self, data: bytes, context: grpc.ServicerContext) -> tuple[Peer, _Stream]:
        message = _parse(data) if len(data) <= MOST_JOIN_BYTES else None
        if message is None or message.WhichOneof("kind") != "join":
            raise InputError("first message of a client", "Join", "something else", "use halfpass join")
        join, port = message.join, int(context.peer().rpartition(":")[2])
        self._identify(join, port, context)
        with self._admitting:  # the network is built for the first one, and those that are there go on
            with self._changed:
                self._refuse_number(join)
            self._admit(join)
            with self._changed:
                self._refuse_number(join)
                peer = self._peers.get(join.client)
                if peer is None:
                    peer = Peer(join.client, self._outbox(join.client))
                    self._peers[join.client] = peer
                peer.meter.count_up(message, len(data))
                stream = self._attach(peer, join, port, context)
                self._changed.notify_all()
        if self._front is not None:
            self._front.joined(port)
        return peer, stream

    def _attach(self, peer: Peer, join: pb.Join, port: int, context: grpc.ServicerContext) -> _Stream:
        """Puts a new stream in the place of the one that the client had."""
        if peer.stream is not None:
            self._end(peer, peer.stream)
        event, host = "joined" if peer.streams == 0 and not join.run else "back", self._host(context)
        known = {"event": event, "client": peer.client, "host": host}
        LOG.info("client %d %s, from %s", peer.client, "is back" if event == "back" else event, host, extra=known)
        peer.incoming = deque(received for received in peer.incoming if received.place)  # no test's
        peer.incoming_bytes = sum(received.size for received in peer.incoming)
        stream = _Stream(port, context, sent=join.received)
        peer.stream, peer.away, peer.streams = stream, None, peer.streams + 1
        joined = pb.Joined(run=self._run, received=peer.received)
        if peer.anew is not None:
            joined.anew, joined.sent, stream.sent, peer.given_up = True, peer.anew, peer.anew, False
        peer.control(pb.ServerMessage(joined=joined))
        return stream

    def _host(self, context: grpc.ServicerContext) -> str:
        """Where a stream comes from."""
        address = context.peer().partition(":")[2]
        behind = None if self._front is None else self._front.peer(int(address.rpartition(":")[2]))
        return unquote(address).rpartition(":")[0] if behind is None else behind.host

    def _end(self, peer: Peer, stream: _Stream) -> None:
        """The stream is over, whatever it still says."""
        stream.over = True
        if peer.stream is stream:
            now, past = self._traffic(stream), peer.sockets
            peer.sockets = None if now is None or past is None else (past[0] + now[0], past[1] + now[1])
            peer.stream, peer.away = None, time.monotonic()
        self._changed.notify_all()

    def _identify(self, join: pb.Join, port: int, context: grpc.ServicerContext) -> None:
        """Raises InputError unless a newcomer has shown that it is the client as which it joins."""
        if self._front is None or self._trust is None:
            return
        place, peer = f"client {join.client} at joining", self._front.peer(port)
        if peer is None:  # it has gone meanwhile
            raise InputError(place, "a connection with TLS", "none", "join again")
        said = {str(key): str(value) for key, value in context.invocation_metadata()}
        check_identity(place, join.client, peer.names, said, self._trust.digests(), of_edge=self._of_edge)

    def _refuse_number(self, join: pb.Join) -> None:
        """Raises InputError unless the client may join: as one that has not yet, or as one that goes on with the run,
        where each side has what the other needs."""
        place = f"client {join.client} at joining"
        if join.client >= self._clients:
            expected = f"a number from 0 to {self._clients - 1}"
            raise InputError(place, expected, str(join.client), "choose another with --client")
        peer = self._peers.get(join.client)
        if join.run and join.run != self._run:
            expected, found = f"a client of run {self._run}", f"one of run {printable(join.run[:40])}"
            raise InputError(place, expected, found, "give it a folder of its own, to begin anew")
        if peer is None:
            if join.received or join.first > 1:
                raise InputError(place, "a client that begins", "one that goes on", "begin it anew")
            return
        if peer.stream is not None and (not join.run or peer.finished):
            raise InputError(place, "a number that is free", "one that has joined already",
                             "choose another with --client")  # fmt: skip
        if peer.given_up and self._ending:
            expected, found = "a run that goes on", "one that ends, and has gone on without it"
            raise InputError(place, expected, found, "nothing is left to do; take the server's half without this one's")
        if peer.anew is not None:
            return  # it begins anew
        if join.received < peer.outbox.durable:
            expected, found = f"one that has this server's messages up to {peer.outbox.durable}", f"{join.received}"
            raise InputError(place, expected, found, "go on with its own run folder: halfpass resume")
        if join.received > peer.outbox.last and not self._gone_on_with:
            expected = f"at most {peer.outbox.last} of this server's messages received"
            raise InputError(place, expected, f"{join.received}", "go on with its own run folder: halfpass resume")
        if join.first > peer.received + 1:
            expected, found = f"one that can send its message {peer.received + 1} again", f"from {join.first}"
            raise InputError(place, expected, found, "restore this server's run folder, or begin anew")

    def _replies(self, peer: Peer, stream: _Stream) -> Iterator[bytes]:
        """What is sent on a stream: what is to be, in order, and signs of life."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: stream.over or stream.control or stream.released or _behind(peer, stream),
                    heartbeat_seconds(self._timeout),
                )
                if stream.over:
                    return
                if stream.begun and _behind(peer, stream):  # Joined first
                    stream.sent = max(stream.sent, peer.outbox.durable) + 1
                    data = peer.outbox.get(stream.sent)
                elif stream.control or not stream.released:
                    message = stream.control.popleft() if stream.control else pb.ServerMessage(alive=pb.Alive())
                    data, stream.begun = message.SerializeToString(), True
                    peer.meter.count_down(message, len(data))
                else:
                    return
            yield data

    def _read(self, peer: Peer, stream: _Stream, requests: Iterator[bytes]) -> None:
        lost = RunError(
            f"client {peer.client}", "its end message", "a stream that ended without it",
            "look at what that client printed",
        )  # fmt: skip
        try:
            for data in requests:
                self._accept(peer, stream, data)
        except grpc.RpcError:
            pass  # the connection is gone
        except Exception as error:  # a defect of ours must not look like a silent client
            with self._changed:
                expected = "a message that can be read"
                peer.failure = RunError(f"client {peer.client}", expected, repr(error), "report this")
        self._lose(peer, stream, lost)

    def _lose(self, peer: Peer, stream: _Stream, reason: RunError) -> None:
        """A stream has ended, before its client has finished or behind that."""
        with self._changed:
            if stream.over:
                return
            self._end(peer, stream)
            if peer.finished or peer.failure is not None or self._stopped:
                return
            if self._reconnect == 0:
                peer.failure = reason
            else:
                known = {"event": "lost", "client": peer.client}
                seconds = self._timeout if self.enough_without(peer.client) else self._reconnect
                LOG.warning("lost %s; waiting for it for %g s", reason, seconds, extra=known)

    def _accept(self, peer: Peer, stream: _Stream, data: bytes) -> None:
        """Takes in one message; what cannot be used is rejected with the reason, and the stream goes on."""
        stream.pulse.beat()
        try:
            received = self._decode(peer, data)
        except HalfpassError as error:
            self._reject(peer, error)
            return
        if received is None or received.kind == "alive":
            return
        with self._changed:
            while peer.incoming_bytes > self._window_bytes and peer.failure is None and not self._stopped:
                if stream.over:
                    return
                self._changed.wait(0.2)  # a client that sends more than its window is held back by TCP
                stream.pulse.beat()  # it is we who do not listen
            if stream.over:
                return
            if received.kind == "failed" and received.message is not None:
                peer.failure = _failure_of(peer.client, received.message.failed)
            else:
                peer.finished = received.kind == "finished"
                peer.received = max(peer.received, received.place)
                peer.incoming.append(received)
                peer.incoming_bytes += received.size
                if received.kind == "epoch_end" and received.message is not None:
                    if peer.known_ends > 0:
                        peer.known_ends -= 1
                    else:
                        peer.ends.append(received.message.epoch_end)
            self._changed.notify_all()

    def _reject(self, peer: Peer, error: HalfpassError) -> None:
        peer.rejected += 1
        if peer.rejected <= MOST_REJECTED:
            known = {"event": "rejected", "client": peer.client}
            LOG.warning("rejected a message of client %d: %s", peer.client, error, extra=known)
            self.send(peer.client, pb.ServerMessage(rejected=pb.Rejected(reason=str(error))))
        elif peer.failure is None:
            with self._changed:
                expected = f"at most {MOST_REJECTED} messages that cannot be used"
                remedy = "look at what was said of them"
                peer.failure = RunError(f"client {peer.client}", expected, "more", remedy)
                self._changed.notify_all()

    def _decode(self, peer: Peer, data: bytes) -> Received | None:
        """None for what has come before, on another stream."""
        message = _parse(data)
        if message is None:
            raise InputError(
                f"message of client {peer.client}", "a ClientMessage", f"{len(data)} bytes that are none",
                "both sides must run the same halfpass",
            )  # fmt: skip
        with self._changed:
            peer.meter.count_up(message, len(data))
            peer.outbox.let_go(min(message.durable, peer.outbox.last))
            if peer.anew is not None and (message.place or message.durable >= peer.anew):
                peer.anew = None  # it has heard of it
            if 0 < message.place <= peer.received:
                return None
        kind = str(message.WhichOneof("kind"))
        expected = 0 if kind in UNNUMBERED or (kind == "batch" and message.batch.test) else peer.received + 1
        if message.place != expected:
            where, remedy = f"{kind} of client {peer.client}", "both sides must run the same halfpass"
            raise InputError(where, f"number {expected} in its sequence", f"{message.place}", remedy)
        if kind == "join":
            where, remedy = f"message of client {peer.client}", "open another stream to join again"
            raise InputError(where, "Join once on a stream", "another", remedy)
        if kind != "batch":
            return Received(kind, len(data) + EACH_BYTES, message, place=message.place)
        try:
            self._check(peer.client, message.batch)
            batch = messages.read_batch(message.batch, peer.buffers)
            self._check_values(peer.client, batch)
        except HalfpassError:
            peer.received = max(peer.received, message.place)  # the client may go on with the next one
            raise
        upload = message.batch if self._keep_uploads else None
        size, test = len(data) + EACH_BYTES, message.batch.test
        return Received(kind, size, batch=batch, test=test, upload=upload, place=message.place)


def _behind(peer: Peer, stream: _Stream) -> bool:
    return max(stream.sent, peer.outbox.durable) < peer.outbox.last


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
