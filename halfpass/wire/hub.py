"""The server's end of all clients' streams (`service.py` says what a stream is): a client whose stream is lost may make
another, and goes on where that one ended."""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError, printable
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.front import Front
from halfpass.wire.meter import Meter
from halfpass.wire.outbox import Outbox
from halfpass.wire.service import (
    ANSWER,
    LOG,
    METHOD,
    OVERHEAD_BYTES,
    SERVICE,
    STATUS,
    STOP_SECONDS,
    Allowance,
    Interrupted,
    Patience,
    Pulse,
    channel_options,
    check_address,
    heartbeat_seconds,
)
from halfpass.wire.sockets import connection_traffic
from halfpass.wire.trust import Trust, check_identity, check_trusted, number_shown

JOIN_SECONDS = 10.0  # for a newcomer to say Join, for others to ask
MOST_STREAMS = 16  # of a connection
MOST_CALLS = 4  # of one caller that have not joined, and questions
MORE_STREAMS = 8  # that have not joined, beyond one of each client; and as many threads more, for questions
STREAMS_AT_ONCE, STREAMS_A_SECOND = 20, 1.0  # of one client, where it has shown that it is that
SIGNS_AT_ONCE, SIGNS_A_SECOND = 100, 4.0  # of life, of one client; more where wire.timeout is short
MOST_JOIN_BYTES = 2**22  # the plan of a cut names all weights
EACH_BYTES = 512  # that a message takes beside its content
SAME_ANSWER_SECONDS = 0.2  # to whoever asks how far the run is
GONE_SECONDS = 0.3  # within which gRPC says so, where a connection broke
MOST_REJECTED = 100  # messages of a client, then it is dropped; ours stops at the first
MOST_NAMED = 10  # clients that a line names
MOST_DROPPED = 3  # times that a client is, then it is refused
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


class Misbehaved(RunError):
    """A client has said what it should not: `Hub.drop` is for it."""

    def __init__(self, client: int, expected: str, found: str, remedy: str, place: str = "") -> None:
        super().__init__(place or f"client {client}", expected, found, remedy)
        self.client = client


@dataclass(frozen=True, eq=False)
class _Call:
    """That has not joined, or is a question."""

    who: str
    context: grpc.ServicerContext
    began: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class _Stream:
    """One of a client's streams."""

    remote_port: int
    context: grpc.ServicerContext
    sent: int  # place up to which the server's sequence was sent on it, or need not be
    changed: threading.Condition  # of its own: what concerns one stream wakes no other's threads
    control: deque[pb.ServerMessage] = field(default_factory=deque)  # what has no place
    pulse: Pulse = field(default_factory=Pulse)
    said: float = field(default_factory=time.monotonic)  # when its newest message came
    held: bool = False  # what comes is not read on, as the client's window is full
    again: int = 0  # place of the newest message that had come before
    begun: bool = False  # Joined is on its way
    over: bool = False
    last_word: pb.ServerMessage | None = None  # that is said when it is over
    released: bool = False  # to be ended in good order


@dataclass(eq=False)
class Peer:
    """A client of the run, whether it is there or not."""

    client: int
    outbox: Outbox = field(default_factory=Outbox)
    meter: Meter = field(default_factory=Meter)
    received: int = 0  # place up to which its messages have come
    taken: int = 0  # and up to which they have been taken
    applied: int = 0  # and up to which they have been worked off
    durable: int = 0  # and up to which they are in a checkpoint
    ended: int = 0  # its ends of epochs and rounds that were taken ahead of their place, which is behind `taken`
    known_ends: int = 0  # so many of those that come are such ones
    sockets: tuple[int, int] | None = (0, 0)  # (up, down) bytes of streams that are over; None: not known
    stream: _Stream | None = None
    streams: int = 0  # that it has had
    process: int = 0  # at the other end of the newest one; 0 where it has not said which
    away: float | None = None  # since when it has none
    at_work: Received | None = None  # that was taken, and not worked off
    incoming: deque[Received] = field(default_factory=deque)
    incoming_bytes: int = 0
    ends: deque[pb.EpochEnd] = field(default_factory=deque)
    buffers: messages.Buffers = field(default_factory=messages.Buffers)
    failure: HalfpassError | None = None  # which ends the run
    dropped: HalfpassError | None = None  # why it is away: what it did wrong, or why it left
    fault: str = ""  # what it was dropped for last
    faults: int = 0  # how often it was
    barred: int = 0  # the process that was dropped last
    finished: bool = False
    given_up: bool = False  # the run goes on without it
    anew: int | None = None  # it begins anew behind that place of the server's, and has not heard of it yet
    rejected: int = 0  # messages that could not be used
    unusable: int = 0  # of those, since it was dropped last

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
    dropped: int  # times
    held: bool  # its window is full: it waits


class Hub:
    """All clients' streams, at the server.

    `keep_uploads` hands batches on as they came, too, for a store. `admit(join)` raises the reason for refusing a
    newcomer; it runs on the newcomer's thread. `check(client, batch)` raises the reason for rejecting a batch before it
    is decoded, `check_values(client, batch)` afterwards.
    """

    ahead = False  # a test that is cut short begins anew, by the halves as they are

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
        leaving: Callable[[], bool] = lambda: False, trouble: Callable[[], HalfpassError | None] = lambda: None,
        status: Callable[[], pb.StatusReply] = pb.StatusReply,
        answer: Callable[[bytes, Callable[[], bool]], bytes] | None = None,
        watched: bool = False,
        opened: bool = True,
    ) -> None:
        """`trust`: of a server that encrypts. `insecure`: strangers may reach one that does not. `of_edge`: its
        client is an edge. `reconnect`: seconds for which a lost client is waited for; or `timeout`, where as many
        others as `quorum` says are there. `run` names the run for those that come again; without a name nobody can.
        `outbox` makes what is kept for a client. `peers`: of a run that is gone on with. `leaving`: whether waits are
        to be given up, with Interrupted. `status` says how far the run is, on a thread of gRPC's. `watched`: a client
        that fails or misbehaves ends the run, as somebody watches them all. `trouble`: why a client does not come,
        once that is known, which ends a run that needs all of them. `answer`: of a server that answers questions
        after the training, to a Question's bytes, on a thread of gRPC's; it may ask whether somebody still waits.
        Without `opened`, nobody may join before `open`."""
        self._trust, self._of_edge = trust, of_edge
        self._clients, self._window_bytes, self._timeout = clients, window_bytes, timeout
        self._admit, self._check, self._check_values, self._keep_uploads = admit, check, check_values, keep_uploads
        self._reconnect, self._run, self._outbox, self._leaving = reconnect if run else 0.0, run, outbox, leaving
        self._forgives = self._reconnect > 0 and not watched
        self._quorum, self._closing, self._trouble = quorum, False, trouble
        self._peers = {peer.client: peer for peer in peers}
        self._gone_on_with = bool(peers)  # then clients may have more of its messages than this process has sent
        for peer in peers:
            peer.away = time.monotonic()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for the thread that trains
        self._admitting, self._answering = threading.Lock(), threading.Lock()
        self._turn = 0
        self._waits: tuple[Collection[int], float] | None = None  # clients of which one is waited for, since when
        self._stopped = False
        self.refused = 0  # newcomers
        self._readers: list[threading.Thread] = []
        self._calls: dict[_Call, bool] = {}  # whether a word of it has come; the oldest first
        self._streams_of: dict[str, Allowance] = {}
        self._signs_of: dict[int, Allowance] = {}
        self._ending: list[tuple[float, _Stream]] = []  # since when
        check_address(bind, "server address", encrypted=trust is not None, insecure=insecure)
        self._front: Front | None = None
        self._status, self._told = status, (0.0, b"")  # when it was last said, and what
        self._reply_to = answer
        self._health, self._opened = HealthServicer(), False
        for service in ("", SERVICE):
            self._health.set(service, HealthCheckResponse.NOT_SERVING)
        if opened:
            self.open()
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
        # A thread for each client that has joined, for each call that has not, and some for those that are refused.
        count = 2 * (self._clients + MORE_STREAMS)
        threads = ThreadPoolExecutor(count, thread_name_prefix="session")
        options = [*channel_options(limit_bytes), ("grpc.max_concurrent_streams", MOST_STREAMS)]
        server = grpc.server(threads, options=options)
        # Bytes in, bytes out: parsed and counted here. Questions are streams of one message, or gRPC would keep a
        # thread for as long as it does not come.
        session = grpc.stream_stream_rpc_method_handler(self._session)
        status, check, answer = map(
            grpc.stream_unary_rpc_method_handler, (self._say_status, self._check_health, self._answer)
        )
        methods = {METHOD: session, STATUS: status} | ({} if self._reply_to is None else {ANSWER: answer})
        server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(HEALTH, {"Check": check}),
        ))  # fmt: skip
        port = take_port(server, bind)
        server.start()
        return server, port

    # -- what the training loop calls

    def open(self) -> None:
        """From now on clients may join, and the question of health is answered by SERVING."""
        self._opened = True
        for service in ("", SERVICE):
            self._health.set(service, HealthCheckResponse.SERVING)

    def wait_for_clients(self, seconds: float, enough: int | None = None) -> None:
        """Until every client has joined, and has not left; or `enough` have, and none for the timeout: then the others
        are given up. Raises RunError naming those that have not."""
        least, deadline = enough or self._clients, time.monotonic() + seconds
        there, since, told = 0, time.monotonic(), self._clients
        with self._changed:
            while missing := [k for k in range(self._clients) if k not in self._peers or self._peers[k].dropped]:
                if enough is None:
                    self._raise_failures(missing)
                elif self._leaving():
                    raise Interrupted
                before, there = there, self._clients - len(missing)
                since = time.monotonic() if there > before else since
                if there >= least and time.monotonic() - since > self._timeout:
                    for k in missing:
                        known = {"event": "given up", "client": k}
                        if k in self._peers:
                            line = "beginning without client %d: %s"
                            LOG.warning(line, k, self._peers[k].dropped, extra=known)
                            self.give_up(k)
                            continue
                        LOG.warning("beginning without client %d: it has not joined", k, extra=known)
                        self._peers[k] = Peer(k, self._outbox(k), given_up=True, anew=0, away=since)
                elif there < least and time.monotonic() > deadline:
                    left = [f"{k} left: {self._peers[k].dropped}" for k in missing if k in self._peers]
                    raise RunError(
                        f"server on port {self.port}", f"{least} clients within {seconds:g} s",
                        "; ".join([f"none with number {', '.join(map(str, missing))}", *left]),
                        "start them with halfpass join",
                    )  # fmt: skip
                self._waits = missing, self._waits[1] if self._waits else time.monotonic()
                if (still := len(missing)) != told and there:
                    told, known = still, {"event": "waiting", "clients": missing[:MOST_NAMED]}
                    numbers = ", ".join(map(str, missing[:MOST_NAMED])) + (", …" if still > MOST_NAMED else "")
                    LOG.info("waiting for %d more client(s): %s", still, numbers, extra=known)
                self._changed.wait(min(0.2, self._timeout))
        self._waits = None

    def take(self, clients: Collection[int], *kinds: str, of: int | None = None) -> tuple[int, Received]:
        """The next message of any of `clients`, which must be of one of `kinds`; taken in turn where several wait.

        Raises RunError when a client of the run is lost for longer than `reconnect`. A wait for one that says that it
        lives, and nothing else, is logged from time to time. `of`: the number of the stream on which the message is to
        come, as `streams` gives it; raises StreamLost where another has taken its place. With a quorum, ClientLost is
        raised for one of them that is away for longer than the timeout, or was dropped, where the others are enough.
        """
        patience = Patience()
        try:
            return self._take(clients, kinds, of, patience)
        finally:
            self._waits = None

    def _take(
        self, clients: Collection[int], kinds: Collection[str], of: int | None, patience: Patience
    ) -> tuple[int, Received]:
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
                        peer.taken, peer.at_work = max(peer.taken, received.place), received
                        peer.ended -= received.kind == "epoch_end"
                        _wake(peer)
                        if received.kind in kinds:
                            return client, received
                        expected, remedy = " or ".join(kinds), "both sides must run the same halfpass"
                        self.drop(client, Misbehaved(client, expected, received.kind, remedy))
                        break
                self._waits = self._waits or (clients, time.monotonic())
                if all(self._peers[client].away is None for client in clients):
                    patience.tell(f"client {', '.join(map(str, sorted(clients)))}", " or ".join(kinds))
                self._changed.wait(min(0.2, self._timeout))

    def _raise_lost(self, clients: Collection[int]) -> None:
        if self._leaving():
            raise Interrupted
        self._raise_trouble()
        for peer in (self._peers[client] for client in clients):
            if peer.given_up:
                raise ClientLost(peer.client, "it was given up")
            why = peer.failure or peer.dropped
            silent = 0.0 if peer.away is None or peer.incoming else time.monotonic() - peer.away
            if why is None and silent <= self._timeout:
                continue
            if self.enough_without(peer.client):
                raise ClientLost(peer.client, str(why or f"it was away for more than {self._timeout:g} s"))
            self._raise_failure(peer)

    def enough_without(self, client: int) -> bool:
        """Whether the run may go on without the client."""
        others = sum(not peer.given_up for peer in self._peers.values() if peer.client != client)
        return self._quorum is not None and others >= self._quorum

    def give_up(self, client: int) -> None:
        """The run goes on without the client, and what it has sent that was not worked off is nothing."""
        with self._changed:
            peer = self._peers[client]
            peer.given_up, peer.finished, peer.failure, peer.dropped = True, False, None, None
            peer.anew = peer.outbox.last
            if (stream := peer.stream) is not None:
                self._end(peer, stream)
                stream.context.cancel()
            peer.incoming.clear()
            peer.ends.clear()
            peer.incoming_bytes = peer.ended = peer.known_ends = 0
            peer.applied = peer.taken = peer.received
            peer.at_work = None
            peer.outbox.let_go(peer.outbox.last)

    def drop(self, client: int, why: HalfpassError) -> None:
        """Ends a client's stream for what it has done, and tells it so. From then on it is one that is lost; what of
        it is at work has not come."""
        with self._changed:
            peer = self._peers[client]
            if peer.at_work is not None:
                peer.ended += peer.at_work.kind == "epoch_end"
                peer.taken, peer.at_work = peer.applied, None
            self._drop(peer, why)

    def _drop(self, peer: Peer, why: HalfpassError) -> None:
        peer.faults, peer.fault, peer.unusable = peer.faults + 1, str(why), 0
        peer.barred = peer.process
        self._let_go(peer, why, f"dropped client {peer.client}", "dropped")

    def _let_go(self, peer: Peer, why: HalfpassError, line: str, event: str) -> None:
        """Ends a client's stream with the reason. What it sent that was not taken has not come: a mended client makes
        it anew."""
        peer.dropped = why
        if not self._forgives:
            peer.failure = peer.failure or why
        else:
            text = "%s: %s; waiting for it for %g s"
            LOG.warning(text, line, why, self._reconnect, extra={"event": event, "client": peer.client})
        if (stream := peer.stream) is not None:
            failed = pb.Failed(reason=str(why), exit_status=why.exit_status)
            stream.last_word = pb.ServerMessage(failed=failed)
            self._ending.append((time.monotonic(), stream))  # which it may not listen to
            self._end(peer, stream)
        peer.finished = peer.finished and peer.taken >= peer.received
        peer.received = peer.taken
        peer.incoming.clear()
        peer.incoming_bytes, peer.known_ends = 0, max(0, peer.ended)
        for _ in range(len(peer.ends) - max(0, -peer.ended)):  # but those that were worked off and not yet taken
            peer.ends.pop()
        self._changed.notify_all()

    def end_without(self) -> None:
        """From now on nobody is let in that was given up."""
        with self._changed:
            self._closing = True

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

    def untake_ends(self, ends: Mapping[int, pb.EpochEnd]) -> None:
        """Puts back what `take_ends` gave."""
        with self._changed:
            for client, end in ends.items():
                self._peers[client].ended -= 1
                self._peers[client].ends.appendleft(end)

    def has_looked_at(self, client: int) -> bool:
        """Whether the end of an epoch or round that was taken last is one that `take_ends` gave before."""
        return self._peers[client].ended < 0

    def give_back(self, client: int, batch: CutBatch) -> None:
        """The batch is done with: later ones are decoded into its tensors."""
        for tensor in batch.tensors:
            self._peers[client].buffers.give_back(tensor)

    def send(self, client: int, *said: pb.ServerMessage) -> None:
        """What has a place in the server's sequence is kept until the client has it durably; other messages are for a
        client that is there."""
        with self._changed:
            peer = self._peers[client]
            for message in said:
                if message.WhichOneof("kind") in NUMBERED:
                    message.place = peer.outbox.last + 1
                    message.applied, message.durable = peer.applied, peer.durable
                    data = message.SerializeToString()
                    peer.outbox.add(data)
                    peer.meter.count_down(message, len(data))
                else:
                    peer.control(message)
            _wake(peer)

    def done(self, client: int, received: Received) -> None:
        """The message has been worked off, and with it all before it."""
        with self._changed:
            peer = self._peers[client]
            peer.applied, peer.at_work = max(peer.applied, received.place), None
            if not self._run:  # nothing is kept, nothing is gone on with
                peer.durable = peer.applied

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
                stream.changed.notify_all()

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells every client why the run ends."""
        self._health.enter_graceful_shutdown()
        with self._changed:
            for peer in self._peers.values():
                if peer.stream is not None:
                    failed = pb.ServerMessage(failed=pb.Failed(reason=reason, exit_status=exit_status))
                    peer.stream.control.append(failed)
                    peer.stream.released = True
                _wake(peer)
            self._changed.notify_all()

    def stop(self) -> None:
        self._health.enter_graceful_shutdown()
        with self._changed:
            self._stopped = True
            for peer in self._peers.values():
                if peer.stream is not None:
                    peer.stream.released = True  # what is to be said on it is still said
                _wake(peer)
            self._changed.notify_all()
        if self._front is not None:
            self._front.close()
        self._grpc.stop(STOP_SECONDS).wait(2 * STOP_SECONDS)
        for reader in self._readers:  # a thread inside PyTorch when Python ends would abort the process
            reader.join(STOP_SECONDS)

    def _raise_failures(self, still_to_join: Collection[int] = ()) -> None:
        if self._leaving():
            raise Interrupted
        self._raise_trouble()
        for peer in self._peers.values():
            if peer.client not in still_to_join:
                self._raise_failure(peer)

    def _raise_trouble(self) -> None:
        if self._quorum is None and (why := self._trouble()) is not None:
            raise why

    def _raise_failure(self, peer: Peer) -> None:
        if peer.failure is not None:
            raise peer.failure
        if peer.away is not None and not peer.finished and time.monotonic() - peer.away > self._reconnect:
            remedy = "see what it printed, and go on with halfpass resume on both sides"
            found = f"none for {self._reconnect:g} s"
            if peer.dropped is not None:
                found += f", after: {peer.dropped}"
            raise RunError(f"client {peer.client}", "a connection, or another one", found, remedy)

    def _watch(self) -> None:
        """On a thread of its own: ends streams on which nothing comes, and calls."""
        seconds, looked = min(1.0, self._timeout / 10), 0.0
        while not self._stopped:
            time.sleep(min(0.2, self._timeout / 4))
            if self._leaving():
                self._health.enter_graceful_shutdown()
            now = time.monotonic()
            with self._changed:
                over = [stream for since, stream in self._ending if now - since > STOP_SECONDS]
                self._ending = [(since, stream) for since, stream in self._ending if stream not in over]
                silent = [call for call, spoken in self._calls.items() if not spoken]
            for context in [*(stream.context for stream in over),
                            *(call.context for call in silent if now - call.began > JOIN_SECONDS)]:  # fmt: skip
                context.cancel()
            if now - looked < seconds:
                continue
            looked = now
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
                    peer.finished, peer.given_up, peer.rejected, peer.faults,
                    peer.stream is not None and peer.stream.held,
                ) for k, peer in sorted(self._peers.items())
            ]  # fmt: skip

    def waiting(self) -> tuple[list[int], float] | None:
        """Clients of which one is waited for, and since how many seconds; None where there is other work."""
        waits = self._waits
        return None if waits is None else (sorted(waits[0]), time.monotonic() - waits[1])

    @property
    def refusals(self) -> dict[str, int]:
        """How often a connection was refused, and somebody that wanted to join or know something."""
        return {"connection": 0 if self._front is None else self._front.refused, "newcomer": self.refused}

    def _trusted(self, place: str, context: grpc.ServicerContext) -> str:
        """As `_who`; ends the call of a stranger."""
        try:
            return self._who(place, context)
        except InputError as error:
            self.refused += 1
            LOG.warning("refused to say: %s", str(error), extra={"event": "refused", "host": self._host(context)})
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    def _answer(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """What the server half predicts. From when they come to their answers questions are few at a time, and so their
        memory has a bound."""
        assert self._reply_to is not None
        who = self._trusted("asking", context)
        if self._front is not None:
            self._front.settle(int(context.peer().rpartition(":")[2]))
        with self._few(who, context) as call:
            data = next(requests, b"")
            with self._changed:
                if call in self._calls:
                    self._calls[call] = True
            try:
                return self._reply_to(data, context.is_active)
            except HalfpassError as error:
                self.refused += 1
                known = {"event": "refused", "host": self._host(context)}
                LOG.warning("refused a question: %s", str(error), extra=known)
                code = grpc.StatusCode.INVALID_ARGUMENT if error.exit_status == 2 else grpc.StatusCode.INTERNAL
                context.abort(code, str(error))
                raise

    def _say_status(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """A question how far the run is; what it says is nothing. It costs the same however often it comes."""
        with self._few(self._trusted("status", context), context):
            next(requests, b"")
        with self._answering:
            if time.monotonic() - self._told[0] > SAME_ANSWER_SECONDS:
                self._told = time.monotonic(), self._status().SerializeToString()
            return self._told[1]

    def _check_health(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """grpc.health.v1: whoever reaches the server may ask."""
        if self._front is not None:
            self._front.count_call(int(context.peer().rpartition(":")[2]))
        with self._few(self._host(context) if self._front is not None else context.peer(), context):
            data = next(requests, b"")
        try:
            request = HealthCheckRequest.FromString(data)
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected a HealthCheckRequest")
        return self._health.Check(request, context).SerializeToString()

    def _who(self, place: str, context: grpc.ServicerContext) -> str:
        """Whom a call is from, before a word of it is read: a client, or another that has a certificate, or, without
        TLS, a connection. Raises InputError for a stranger."""
        if self._front is None or self._trust is None:
            return context.peer()
        port = int(context.peer().rpartition(":")[2])
        peer = self._front.peer(port)
        said = {str(key): str(value) for key, value in context.invocation_metadata()}
        if peer is None:
            expected, found = "a connection with TLS", "one to the port behind it"
            raise InputError(place, expected, found, "use the server's address")
        digests = self._trust.digests()
        try:
            check_trusted(place, peer.certified, said, digests)
        except InputError:
            self._front.count_call(port)
            raise
        self._front.vouch(port)
        number = number_shown(place, peer.names, said, digests)
        return f"client {number}" if number is not None else ", ".join(peer.names)[:80]

    @contextmanager
    def _few(self, who: str, context: grpc.ServicerContext) -> Iterator[_Call]:
        """Of calls that have not joined, and of questions, there are few of one caller, and few in all: where those are
        too many, the oldest goes on which nothing has come."""
        call, most = _Call(who, context), self._clients + MORE_STREAMS
        with self._changed:
            enough = sum(other.who == who for other in self._calls) >= MOST_CALLS
            oldest = next((other for other, spoken in self._calls.items() if not spoken), None)
            full = len(self._calls) >= most
            if not enough and not (full and oldest is None):
                self._calls[call] = False
                if full and oldest is not None:
                    del self._calls[oldest]
                    oldest.context.cancel()
        if enough:
            self._send_away(context, who, f"at most {MOST_CALLS} calls at once that have not joined")
        elif call not in self._calls:
            self._send_away(context, who, f"at most {most} calls at once, of all, that have not joined")
        try:
            yield call
        finally:
            with self._changed:
                self._calls.pop(call, None)

    def _send_away(self, context: grpc.ServicerContext, who: str, expected: str) -> None:
        """Ends a call of one too many, which may come again later."""
        self.refused += 1
        if self._front is not None:
            self._front.count_call(int(context.peer().rpartition(":")[2]), too_many=True)
        said = f"{who}: expected {expected}, found more; try again later"
        LOG.warning("refused a call from %s", said, extra={"event": "refused", "host": self._host(context)})
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)

    def _bytes_of(self, stream: _Stream) -> int | None:
        """That came on it, at the socket."""
        traffic = self._traffic(stream)
        return None if traffic is None else traffic[0]

    # -- one client's stream, on gRPC's threads

    def _session(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            who = self._who("joining", context)
            if self._front is not None:
                with self._changed:
                    few = self._streams_of.setdefault(who, Allowance()).take(STREAMS_AT_ONCE, STREAMS_A_SECOND)
                if not few:
                    expected = f"at most {STREAMS_AT_ONCE} streams at first, and {STREAMS_A_SECOND:g} a second"
                    self._send_away(context, who, expected)
            with self._few(who, context) as call:
                first = next(requests, b"")
                with self._changed:
                    if call in self._calls:
                        self._calls[call] = True
                if not self._opened:  # one that was there before comes again
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the server takes up its kept state")
                peer, stream = yield from self._joined(first, context)
        except HalfpassError as error:
            self.refused += 1
            LOG.warning("refused a newcomer: %s", str(error), extra={"event": "refused", "host": self._host(context)})
            failed = pb.Failed(reason=str(error), exit_status=error.exit_status)
            yield pb.ServerMessage(failed=failed).SerializeToString()
            return
        except grpc.RpcError:
            return
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
        message = parsed(data) if len(data) <= MOST_JOIN_BYTES else None
        if message is None or message.WhichOneof("kind") != "join":
            raise InputError("first message of a client", "Join", "something else", "use halfpass join")
        join, port = message.join, int(context.peer().rpartition(":")[2])
        self._identify(join, port, context)
        dead = self._wait_for_place(join)
        with self._admitting:  # the network is built for the first one, and those that are there go on
            with self._changed:
                self._refuse_number(join, dead)
            self._admit(join)
            with self._changed:
                self._refuse_number(join, dead)
                peer = self._peers.get(join.client)
                if peer is None:
                    peer = Peer(join.client, self._outbox(join.client))
                    self._peers[join.client] = peer
                peer.meter.count_up(message, len(data))
                stream = self._attach(peer, join, port, context)
                self._changed.notify_all()
        if self._front is not None:
            self._front.joined(port, join.client)
        return peer, stream

    def _wait_for_place(self, join: pb.Join) -> _Stream | None:
        """The stream of another process of that client's, once it is known that nobody is at its other end; None where
        somebody is, or there is none. One that lives says so, every few seconds."""
        began, silence = time.monotonic(), 2 * heartbeat_seconds(self._timeout)
        with self._changed:
            peer = self._peers.get(join.client)
            stream = None if peer is None else peer.stream
        if peer is None or stream is None or _same_process(join, peer):
            return None
        while not stream.over and stream.context.is_active():
            if not stream.held and stream.pulse.is_lost(silence, partial(self._bytes_of, stream)):
                break
            if stream.said > began or time.monotonic() - began > self._timeout:
                return None
            time.sleep(0.05)
        return stream

    def _attach(self, peer: Peer, join: pb.Join, port: int, context: grpc.ServicerContext) -> _Stream:
        """Puts a new stream in the place of the one that the client had."""
        if (before := peer.stream) is not None:
            self._end(peer, before)
            before.context.cancel()  # its client may read nothing of it
        event, host = "joined" if peer.streams == 0 and not join.run else "back", self._host(context)
        known = {"event": event, "client": peer.client, "host": host}
        LOG.info("client %d %s, from %s", peer.client, "is back" if event == "back" else event, host, extra=known)
        peer.incoming = deque(received for received in peer.incoming if received.place)  # no test's
        peer.incoming_bytes = sum(received.size for received in peer.incoming)
        stream = _Stream(port, context, join.received, threading.Condition(self._lock))
        peer.stream, peer.away, peer.dropped = stream, None, None
        peer.streams, peer.process = peer.streams + 1, join.process
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
        stream.changed.notify_all()
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

    def _refuse_number(self, join: pb.Join, dead: _Stream | None) -> None:
        """Raises InputError unless the client may join: as one that has not yet, or as one that goes on with the run,
        where each side has what the other needs. `dead` is a stream of its that may be taken over."""
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
        if peer.faults >= MOST_DROPPED:
            expected = f"a client that was dropped less than {MOST_DROPPED} times"
            found = f"one that was for the last time as follows: {peer.fault}"
            raise InputError(place, expected, found, "mend it, have the server started again, and resume both")
        if join.process and join.process == peer.barred:
            found = f"the one that was dropped: {peer.fault}"
            raise InputError(place, "another process", found, "mend it, and go on with halfpass resume")
        if peer.stream is not None and peer.stream is not dead and not _same_process(join, peer):
            found = "one that has joined already, and is connected"
            raise InputError(place, "a number that is free", found, "choose another with --client, or stop that one")
        if peer.given_up and self._closing:
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
                stream.changed.wait_for(
                    lambda: stream.over or stream.control or stream.released or _behind(peer, stream),
                    heartbeat_seconds(self._timeout),
                )
                if stream.over and stream.last_word is None:
                    return
                if stream.over and stream.last_word is not None:
                    message, stream.last_word = stream.last_word, None
                    data = message.SerializeToString()
                    peer.meter.count_down(message, len(data))
                elif stream.begun and _behind(peer, stream):  # Joined first
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
        left = False
        try:
            for data in requests:
                self._accept(peer, stream, data)
                if stream.over:
                    return
            left = not peer.finished and _is_there(stream)
        except grpc.RpcError:
            pass  # the connection is gone
        except Exception as error:  # a defect of ours must not look like a silent client
            expected = "a message that can be read"
            self._drop_from(peer, stream, Misbehaved(peer.client, expected, repr(error), "report this"))
        self._lose(peer, stream, lost, left=left)

    def _drop_from(self, peer: Peer, stream: _Stream, why: HalfpassError) -> None:
        """Drops the client, unless it has another stream by now."""
        with self._changed:
            if not stream.over:
                self._drop(peer, why)

    def _lose(self, peer: Peer, stream: _Stream, reason: RunError, *, left: bool = False) -> None:
        """A stream has ended, before its client has finished or behind that; `left`: in good order."""
        with self._changed:
            if stream.over:
                return
            self._end(peer, stream)
            if peer.finished or peer.failure is not None or self._stopped:
                return
            seconds = self._timeout if self.enough_without(peer.client) else self._reconnect
            if self._reconnect == 0:
                peer.failure = reason
            elif left:
                known = {"event": "left", "client": peer.client}
                LOG.info("client %d left; waiting for it for %g s", peer.client, seconds, extra=known)
            else:
                known = {"event": "lost", "client": peer.client}
                LOG.warning("lost %s; waiting for it for %g s", reason, seconds, extra=known)

    def _accept(self, peer: Peer, stream: _Stream, data: bytes) -> None:
        """Takes in one message; what cannot be used is rejected with the reason, and the stream goes on."""
        stream.pulse.beat()
        stream.said = time.monotonic()
        try:
            received = self._decode(peer, stream, data)
        except HalfpassError as error:
            self._reject(peer, stream, error)
            return
        if received is None:
            return
        if received.kind == "alive":
            self._count_sign(peer, stream)
            return
        with self._changed:
            while peer.incoming_bytes > self._window_bytes and peer.failure is None and not self._stopped:
                if stream.over:
                    return
                stream.held = True
                stream.changed.wait(0.2)  # a client that sends more than its window is held back by TCP
                stream.pulse.beat()  # it is we who do not listen
            stream.held = False
            if stream.over:
                return
            if received.kind == "failed" and received.message is not None:
                if not peer.finished and not stream.released:  # else it was told to go
                    why = failure_of(peer.client, received.message.failed)
                    self._let_go(peer, why, f"client {peer.client} left", "lost")
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

    def _count_sign(self, peer: Peer, stream: _Stream) -> None:
        """Of life: one that says many has nothing to say, and takes the server's time."""
        often = max(SIGNS_A_SECOND, 2 / heartbeat_seconds(self._timeout))
        if not self._signs_of.setdefault(peer.client, Allowance()).take(SIGNS_AT_ONCE, often):
            expected = f"at most {SIGNS_AT_ONCE} signs of life, and {often:g} a second"
            remedy = "send one where nothing else was sent for a while"
            self._drop_from(peer, stream, Misbehaved(peer.client, expected, "more", remedy))

    def _reject(self, peer: Peer, stream: _Stream, error: HalfpassError) -> None:
        with self._changed:
            if stream.over:
                return
            peer.rejected, peer.unusable = peer.rejected + 1, peer.unusable + 1
            if peer.unusable > MOST_REJECTED:
                expected = f"at most {MOST_REJECTED} messages that cannot be used"
                self._drop(peer, Misbehaved(peer.client, expected, "more", f"the last was: {error}"))
                return
        known = {"event": "rejected", "client": peer.client}
        LOG.warning("rejected a message of client %d: %s", peer.client, error, extra=known)
        self.send(peer.client, pb.ServerMessage(rejected=pb.Rejected(reason=str(error))))

    def _decode(self, peer: Peer, stream: _Stream, data: bytes) -> Received | None:
        """None for what has come before, on another stream."""
        message = parsed(data)
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
            if max(stream.again, peer.durable) < message.place <= peer.received:
                stream.again = message.place
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
            with self._changed:
                if not stream.over:
                    peer.received = max(peer.received, message.place)  # the client may go on with the next one
            raise
        upload = message.batch if self._keep_uploads else None
        size, test = len(data) + EACH_BYTES, message.batch.test
        return Received(kind, size, batch=batch, test=test, upload=upload, place=message.place)


def take_port(server: grpc.Server, bind: str) -> int:
    """Has the server listen there; returns the port. Raises InputError where that is not free."""
    try:
        port = server.add_insecure_port(bind)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InputError("server address", "a free port", f"{bind}, which is in use", "choose another with --bind")
    return port


def _same_process(join: pb.Join, peer: Peer) -> bool:
    return join.process != 0 and join.process == peer.process


def _wake(peer: Peer) -> None:
    """The threads of its stream, with the lock held."""
    if peer.stream is not None:
        peer.stream.changed.notify_all()


def _behind(peer: Peer, stream: _Stream) -> bool:
    return max(stream.sent, peer.outbox.durable) < peer.outbox.last


def _is_there(stream: _Stream) -> bool:
    """Whether the client whose messages have ended still listens: one that leaves does, while a connection that broke
    may end in the same way, and is told to be gone within the moment."""
    gone = threading.Event()
    return stream.context.add_callback(gone.set) and not gone.wait(GONE_SECONDS)


def parsed(data: bytes) -> pb.ClientMessage | None:
    if not messages.few_parts(data):
        return None
    try:
        message = pb.ClientMessage.FromString(data)
    except DecodeError:
        return None
    return message if message.WhichOneof("kind") else None


def failure_of(client: int, failed: pb.Failed) -> PassedOnError:
    """A client's own words, with its number where they do not begin with it."""
    named = failed.reason.startswith(f"client {client}")
    return PassedOnError(failed.reason if named else f"client {client}: {failed.reason}", failed.exit_status)

