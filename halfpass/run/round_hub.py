"""The server's end of a run in rounds: over an engine that carries one message to a client, and one reply back.

What a client's stream would have carried comes as one reply, whose messages stay as they came until they are taken. A
client has one message at a time; its next one goes as soon as the reply to the last is there, before the server has
learned from that. Messages are numbered, so that one may be sent again: `round_client.py` answers it alike.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire import messages
from halfpass.wire.frames import NO_RUN, pack, unpack
from halfpass.wire.hub import ClientLost, Misbehaved, Peer, Received, failure_of, parsed
from halfpass.wire.meter import Meter
from halfpass.wire.service import Patience

LOG = logging.getLogger("halfpass")
MOST_SENT = 4  # times that a message is sent, where no reply comes
PAUSE_SECONDS = 2.0  # before a node that did not say who it is is asked again
GRACE_SECONDS = 30.0  # for an engine to say that a message was lost, beyond wire.reconnect
MEET_SECONDS = 5.0  # from one look for new nodes to the next, where a client's is lost
MOST_REPLIES = 2**20  # messages in one reply
_ASKING = ("begin", "test", "finish")  # what has a client do something; the others go with it
_BATCH = 0x12  # the first byte of a ClientMessage that holds a batch, as protobuf writes it


@dataclass(frozen=True)
class Reply:
    """What came of a message to a node: its answer, or why there is none, and whether the message may be sent again."""

    node: int
    data: bytes = b""
    failure: str = ""
    again: bool = False


class Exchange(Protocol):
    """An engine. A node has one message at a time."""

    def nodes(self) -> Collection[int]:
        """Those that can be reached now."""

    def send(self, node: int, message: bytes) -> None:
        """Begins to carry it there; `receive` gives what comes of it."""

    def receive(self, seconds: float) -> Reply | None:
        """What has come next, of any node; waits for it up to so long."""


@dataclass(eq=False)
class _Client:
    client: int
    node: int
    meter: Meter = field(default_factory=Meter)
    buffers: messages.Buffers = field(default_factory=messages.Buffers)
    orders: list[pb.ServerMessage] = field(default_factory=list)  # that wait to be sent
    number: int = 0  # of its newest message
    message: bytes | None = None  # that is out
    sent: int = 0  # how often it was
    since: float = 0.0  # when its node was last heard of, or given it
    lost: str = ""  # why there is no node that could be given it
    incoming: deque[memoryview | pb.ClientMessage] = field(default_factory=deque)
    ends: deque[pb.EpochEnd] = field(default_factory=deque)
    ended: int = 0  # ends that were taken ahead of their place
    failure: HalfpassError | None = None
    given_up: bool = False


class RoundHub:
    """All clients of a run, by the nodes of an engine: what `ServerRun` wants of `Hub`."""

    ahead = True

    def __init__(
        self, exchange: Exchange, config: Config, *, run: str, admit: Callable[[pb.Join], None],
        check: Callable[[int, pb.Batch], None], check_values: Callable[[int, CutBatch], None],
        keep_uploads: bool = False,
    ) -> None:  # fmt: skip
        """`run` has 16 characters; the others as in `Hub`."""
        self._exchange, self._run, self._config = exchange, run, config
        self._admit, self._check, self._check_values, self._keep_uploads = admit, check, check_values, keep_uploads
        self._quorum, self._patience_seconds = config.clients.quorum, config.wire.reconnect + GRACE_SECONDS
        self._clients: dict[int, _Client] = {}
        self._joining: dict[int, float] = {}  # nodes that were asked who they are, and when
        self._of_node: dict[int, _Client] = {}
        self._met, self._turn = 0.0, 0

    # -- who is there

    def wait_for_clients(self, seconds: float) -> None:
        """Until every client has said who it is, each within so long of the one before. Raises InputError where there
        are too few nodes for that, or one of them cannot take part, and RunError where one does not answer."""
        count, nodes = self._config.clients.count, list(self._exchange.nodes())
        if len(nodes) != count:
            remedy = "start as many nodes as clients.count says, or change that"
            raise InputError("nodes", f"{count}, one for each client", str(len(nodes)), remedy)
        self._ask_who(nodes, NO_RUN)
        deadline, tries, again = time.monotonic() + seconds, dict.fromkeys(nodes, 1), list[tuple[float, int]]()
        while len(self._clients) < count:
            reply = self._exchange.receive(0.2)
            if reply is not None and reply.failure:
                if not reply.again or tries[reply.node] >= MOST_SENT:
                    raise RunError(f"node {reply.node}", "to hear which client it is", reply.failure, "see its log")
                tries[reply.node] += 1
                again.append((time.monotonic() + PAUSE_SECONDS, reply.node))
            elif reply is not None:
                self._meet(reply)
                deadline = time.monotonic() + seconds  # of ten thousand nodes the last one is asked late
            if time.monotonic() > deadline:
                silent = ", ".join(map(str, sorted(self._joining)))
                raise RunError(f"node {silent}", f"an answer within {seconds:g} s", "none", "see its log")
            while again and time.monotonic() > again[0][0]:
                self._ask_who([again.pop(0)[1]], NO_RUN)

    def _ask_who(self, nodes: Collection[int], run: str) -> None:
        """`run`: named once it goes on."""
        for node in nodes:
            self._joining[node] = time.monotonic()
            self._exchange.send(node, pack(0, run, []))

    def _meet(self, reply: Reply) -> None:
        """A node has said which client it is: a new one, or one whose node was lost."""
        self._joining.pop(reply.node, None)
        place = f"node {reply.node}"
        frames = unpack(place, reply.data, 1)
        message = parsed(bytes(frames.messages[0])) if frames.messages else None
        kind = None if message is None else message.WhichOneof("kind")
        if message is not None and kind == "failed":
            raise PassedOnError(f"{place}: {message.failed.reason}", message.failed.exit_status)
        if message is None or kind != "join" or frames.run not in (self._run, NO_RUN):
            raise InputError(place, "Join, of this run", "something else", "both sides must run the same halfpass")
        join = message.join
        known = self._clients.get(join.client)
        if join.client >= self._config.clients.count or (known is not None and not known.lost):
            expected = f"a client number of its own, from 0 to {self._config.clients.count - 1}"
            raise InputError(place, expected, f"{join.client}", "give each node another partition-id")
        self._admit(join)
        client = known or _Client(join.client, reply.node)
        client.meter.count_up(message, len(frames.messages[0]))
        client.node, client.lost = reply.node, ""
        self._clients[join.client] = self._of_node[reply.node] = client
        LOG.info("client %d is node %d", join.client, reply.node, extra={"event": "joined", "client": join.client})
        if client.message is not None:
            self._send_out(client)

    # -- what `ServerRun` calls

    def take(self, clients: Collection[int], *kinds: str, of: int | None = None) -> tuple[int, Received]:
        """As `Hub.take`; a batch is decoded now."""
        patience = Patience()
        while True:
            self._come_in(0.0)
            if self._quorum is None:  # whoever fails ends the run, whose turn it is or not
                for each in self._clients.values():
                    self._raise_lost(each)
            for client in sorted(clients, key=lambda c: (c - self._turn) % self._config.clients.count):
                each = self._clients[client]
                if self.has_come(client):
                    self._turn = client + 1
                    try:
                        return client, self._next(each, kinds)
                    except HalfpassError as error:
                        self.drop(client, error)
                        break
            else:
                waits = [self._clients[client] for client in clients]
                self._check_all_may_come(waits, kinds)
                patience.tell(f"client {', '.join(str(each.client) for each in waits)}", " or ".join(kinds))
                self._come_in(0.2)

    def _next(self, each: _Client, kinds: Collection[str]) -> Received:
        """Its next message, decoded and checked."""
        k, raw = each.client, each.incoming.popleft()
        message = raw if isinstance(raw, pb.ClientMessage) else parsed(bytes(raw))
        kind = "none" if message is None else str(message.WhichOneof("kind"))
        if message is None or kind not in kinds or (isinstance(raw, memoryview) and kind != "batch"):
            remedy = "both sides must run the same halfpass"
            raise Misbehaved(k, " or ".join(kinds), kind, remedy)
        if kind != "batch":
            each.ended -= kind == "epoch_end"
            return Received(kind, 0, message)
        size = message.ByteSize()
        each.meter.count_up(message, size)
        self._check(k, message.batch)
        batch = messages.read_batch(message.batch, each.buffers)
        self._check_values(k, batch)
        upload = message.batch if self._keep_uploads else None
        return Received(kind, size, batch=batch, test=message.batch.test, upload=upload)

    def has_come(self, client: int) -> bool:
        """Whether something of the client waits to be taken. Raises what it failed by."""
        each = self._clients[client]
        if not each.incoming:  # with a quorum what it had sent before counts
            self._raise_lost(each)
        return bool(each.incoming)

    def _check_all_may_come(self, waits: Collection[_Client], kinds: Collection[str]) -> None:
        """Raises what is wrong with a client that was asked for nothing more, and has not said what is waited for."""
        for each in waits:
            if each.message is None and not each.incoming and not each.given_up:
                expected, found = f"{' or '.join(kinds)} in its reply to message {each.number}", "neither"
                remedy = "both sides must run the same halfpass"
                each.failure = RunError(f"client {each.client}", expected, found, remedy)
                self._raise_lost(each)

    def take_ends(self, clients: Collection[int]) -> dict[int, pb.EpochEnd] | None:
        self._come_in(0.0)
        if not all(self._clients[client].ends for client in clients):
            return None
        for client in clients:
            self._clients[client].ended += 1
        return {client: self._clients[client].ends.popleft() for client in clients}

    def untake_ends(self, ends: Mapping[int, pb.EpochEnd]) -> None:
        for client, end in ends.items():
            self._clients[client].ended -= 1
            self._clients[client].ends.appendleft(end)

    def has_looked_at(self, client: int) -> bool:
        return self._clients[client].ended < 0

    def send(self, client: int, *said: pb.ServerMessage) -> None:
        """What it is to do next, as one message where that is possible."""
        if not self._clients[client].given_up:
            self._clients[client].orders += said
            self._ask(self._clients[client])

    def done(self, client: int, received: Received) -> None:
        """Nothing: a round is acknowledged by the next one."""

    def acknowledge(self, client: int, *, test: bool = False) -> None:
        """Nothing, as `done`."""

    def kept(self, durable: Mapping[int, int]) -> None:
        """Nothing: a client keeps what it was before its last round."""

    def give_back(self, client: int, batch: CutBatch) -> None:
        for tensor in batch.tensors:
            self._clients[client].buffers.give_back(tensor)

    def peer(self, client: int) -> Peer:
        raise NotImplementedError("a run in rounds keeps no state of its server")

    def meter(self, client: int) -> Meter:
        return self._clients[client].meter

    def socket_traffic(self, client: int) -> tuple[int, int] | None:
        """Not known: the engine has the sockets."""
        return None

    def streams(self, client: int) -> int:
        return 1

    def present(self, client: int) -> bool:
        return not self._clients[client].given_up

    def enough_without(self, client: int) -> bool:
        others = sum(not each.given_up for each in self._clients.values() if each.client != client)
        return self._quorum is not None and others >= self._quorum

    def drop(self, client: int, why: HalfpassError) -> None:
        """What it has sent cannot be used, and it is not asked again."""
        each = self._clients[client]
        if isinstance(why, Misbehaved):  # which a run waits for to be mended: nobody comes again here
            why = RunError(why.place, why.expected, why.found, why.remedy)
        each.failure = each.failure or why
        each.incoming.clear()
        each.ends.clear()
        LOG.warning("dropped client %d: %s", client, why, extra={"event": "dropped", "client": client})

    def give_up(self, client: int) -> None:
        each = self._clients[client]
        each.given_up, each.message, each.orders, each.failure = True, None, [], None
        each.incoming.clear()
        each.ends.clear()
        each.ended = 0

    def end_without(self) -> None:
        """Nothing: who was given up does not come back."""

    def release(self, client: int) -> None:
        """Nothing: there is no stream."""

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells every client that is not at work why the run ends."""
        failed = pb.ServerMessage(failed=pb.Failed(reason=reason, exit_status=exit_status)).SerializeToString()
        for each in self._clients.values():
            if not each.given_up and not each.lost and each.message is None:
                self._exchange.send(each.node, pack(each.number + 1, self._run, [failed]))

    # -- messages and replies

    def _ask(self, each: _Client) -> None:
        """Sends what waits for the client, once there is something to do, and nothing is out."""
        if each.message is not None or not any(order.WhichOneof("kind") in _ASKING for order in each.orders):
            return
        frames = [order.SerializeToString() for order in each.orders]
        for order, frame in zip(each.orders, frames, strict=True):
            each.meter.count_down(order, len(frame))
        each.number, each.orders, each.sent = each.number + 1, [], 0
        each.message = pack(each.number, self._run, frames)
        self._send_out(each)

    def _send_out(self, each: _Client) -> None:
        assert each.message is not None
        each.sent, each.since = each.sent + 1, time.monotonic()
        self._exchange.send(each.node, each.message)

    def _come_in(self, seconds: float) -> None:
        """Takes in the replies that are there, or that come within so long."""
        while (reply := self._exchange.receive(seconds)) is not None:
            seconds = 0.0
            each = self._of_node.get(reply.node)
            if reply.node in self._joining:
                self._meet_again(reply)
            elif each is None or each.node != reply.node or each.message is None:
                continue  # of one that was given up, or a second reply
            elif reply.failure:
                self._failed(each, reply)
            else:
                self._reply(each, reply.data)
        now = time.monotonic()
        if any(each.lost and not each.given_up for each in self._clients.values()) and now - self._met > MEET_SECONDS:
            self._met = now
            known = {each.node for each in self._clients.values() if not each.lost} | self._joining.keys()
            self._ask_who([node for node in self._exchange.nodes() if node not in known], self._run)
        for each in self._clients.values():
            if each.message is not None and not each.given_up and now - each.since > self._patience_seconds:
                each.failure = each.failure or RunError(
                    f"client {each.client}", f"a reply to message {each.number} within {self._patience_seconds:g} s",
                    each.lost or "none", "see its log, or raise wire.reconnect",
                )  # fmt: skip

    def _meet_again(self, reply: Reply) -> None:
        """While the run goes on, a node that is none of a client's that was lost is nobody's concern."""
        if reply.failure:
            self._joining.pop(reply.node)
            return
        try:
            self._meet(reply)
        except HalfpassError as error:
            LOG.warning("refused a newcomer: %s", error, extra={"event": "refused"})

    def _failed(self, each: _Client, reply: Reply) -> None:
        """The engine has no reply for a message."""
        known = {"event": "lost", "client": each.client}
        if not reply.again:
            each.failure = RunError(f"client {each.client}", "a reply", reply.failure, "see its log")
        elif each.sent >= MOST_SENT:
            expected = f"a reply to message {each.number}, which was sent {each.sent} times"
            each.failure = RunError(f"client {each.client}", expected, reply.failure, "see its log")
        elif each.node in self._exchange.nodes():
            LOG.warning("client %d: %s; sending message %d again", each.client, reply.failure, each.number, extra=known)
            self._send_out(each)
        else:
            each.lost, each.since = reply.failure, time.monotonic()
            text = "lost client %d: %s; waiting for its node for %g s"
            LOG.warning(text, each.client, reply.failure, self._patience_seconds, extra=known)

    def _reply(self, each: _Client, data: bytes) -> None:
        """What a client says of its newest message. Batches stay as they came."""
        each.message, k = None, each.client
        if each.failure is not None:
            return
        try:
            frames = unpack(f"client {k}", data, MOST_REPLIES)
            if (frames.number, frames.run) != (each.number, self._run):
                expected, found = f"a reply to message {each.number}", f"one to {frames.number}"
                raise InputError(f"client {k}", expected, found, "both sides must run the same halfpass")
            for frame in frames.messages:
                if len(frame) and frame[0] == _BATCH:
                    each.incoming.append(frame)
                    continue
                message = parsed(bytes(frame))
                if message is None:
                    raise Misbehaved(k, "messages that can be read", "others", "both sides must run the same halfpass")
                each.meter.count_up(message, len(frame))
                kind = message.WhichOneof("kind")
                if kind == "failed":
                    raise failure_of(k, message.failed)
                each.incoming.append(message)
                if kind == "epoch_end":
                    each.ends.append(message.epoch_end)
        except HalfpassError as error:
            each.failure = each.failure or error
            return
        self._ask(each)

    def _raise_lost(self, each: _Client) -> None:
        if each.given_up:
            raise ClientLost(each.client, "it was given up")
        if each.failure is None:
            return
        if self.enough_without(each.client):
            raise ClientLost(each.client, str(each.failure))
        raise each.failure
