"""A client's end of its streams to the server (`service.py` says what a stream is): one after the other, where one is
lost."""

import contextlib
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import few_parts
from halfpass.wire.outbox import Outbox
from halfpass.wire.reach import reach
from halfpass.wire.service import (
    LOG,
    METHOD,
    OVERHEAD_BYTES,
    SERVICE,
    STATUS,
    STOP_SECONDS,
    Anew,
    Interrupted,
    Patience,
    Pulse,
    channel_options,
    check_address,
    heartbeat_seconds,
)
from halfpass.wire.sockets import connection_traffic
from halfpass.wire.trust import Trust

CONNECT_SECONDS = 10.0  # to reach a server
MOST_INCOMING = 64  # messages that wait to be taken: a server says one thing at a time
AHEAD_BATCHES = 2  # not encoded yet, beyond the window: one at work and one behind it
ASK_SECONDS = 5.0  # for an answer how far the run is
LONGEST_PAUSE = 5.0  # seconds between two attempts to reach a server again
KEPT_SECONDS = 0.5  # between two words of what is kept: checkpoints may be many
_JITTER = random.SystemRandom()  # training's own numbers are left alone, and forked clients do not wait alike
NUMBERED = ("epoch_end", "finished")  # with the batches that are no test's: what has a place in the client's sequence


@dataclass(eq=False)
class _Link:
    """One stream, from its connection to its end."""

    channel: grpc.Channel
    number: int
    pulse: Pulse = field(default_factory=Pulse)
    control: deque[pb.ClientMessage] = field(default_factory=deque)  # what has no place
    sent: int | None = None  # place up to which the sequence was sent on it; None before the server has said Joined
    call: Any = None
    begun: bool = False  # Join is on its way
    over: bool = False


@dataclass(frozen=True)
class Look:
    """What is known of a connection, at one time; places in the client's sequence."""

    made: int
    applied: int
    durable: int
    spool_bytes: int
    reconnections: int
    away: float | None  # seconds for which there has been no stream


class Connection:
    """A client's way to the server. Encoding, sending and reading go on beside the caller's work, which waits only
    where the window is full, or the spool while the server is away.

    A stream that is lost is made again, for as long as `reconnect` says; what the server has not got is sent again.
    """

    def __init__(
        self, address: str, *, window_bytes: int, timeout: float, trust: Trust | None = None, insecure: bool = False,
        reconnect: float = 0.0, outbox: Outbox | None = None, run: str = "", received: int = 0,
        leaving: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`trust`: of a client whose server encrypts. `insecure`: the server may be another machine, without that.
        `reconnect`: seconds for which a lost server is waited for. `outbox`, `run` and `received` (the place of the
        last message taken) are those of an earlier process that this one goes on for. `leaving`: whether a wait for
        the server's next message is to be given up, with Interrupted."""
        check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
        self._address, self._trust, self._reconnect, self._leaving = address, trust, reconnect, leaving
        self._who, self._timeout, self._window_bytes = f"server at {address}", timeout, window_bytes
        self.outbox = Outbox() if outbox is None else outbox
        self.run, self.taken = run, received
        self._received = received  # place up to which the server's messages have come
        self._durable = received  # and up to which this client has said that it needs none again
        self._applied = self.outbox.durable  # place up to which the server has worked off this client's
        self._to_make: deque[tuple[Callable[[], Sequence[pb.ClientMessage]], int, int]] = deque()
        self._process = secrets.randbits(48) | 1  # whose streams take each other's place
        self._said_kept = 0.0  # when the server was last told what is kept
        self._lives = 0  # how often the run went on without this client
        self._anew = False  # it did, and this client has not heeded it
        self._of_test: deque[int] = deque()  # bytes of a test's batches that are not acknowledged
        self._incoming: deque[tuple[pb.ServerMessage, int]] = deque()  # each with its link's number
        self._test = 0  # number of the link on which the test came that is at work
        self._changed = threading.Condition()
        self.waits: tuple[str, float] | None = None  # what the caller's work waits for, since when
        self._port = int(address.rpartition(":")[2])
        self._failure: HalfpassError | None = None
        self._ended = self._closed = self._finishing = self._has_joined = False
        self._join: pb.Join | None = None
        self._away: float | None = None  # since when there is no stream
        self._pause = 0.1  # before the next attempt to make one
        self._link = self._first()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._keep_up, self._encode, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    # -- what the caller's work calls

    def send(self, *messages: pb.ClientMessage) -> None:
        """At once, or a batch as soon as the window has room for it."""
        for message in messages:
            self._send(message, self._link.number, self._lives)

    def send_in_turn(self, make: Callable[[], Sequence[pb.ClientMessage]]) -> None:
        """Has a batch, or what comes after batches, made and sent beside the caller's work, in the order of the calls.

        Blocks while AHEAD_BATCHES wait for that, because the window is full or the encoding slow. `make` may find that
        there is nothing to send. A test's are dropped where the stream is lost on which the test was asked for.
        """
        with self._changed:
            self._wait(lambda: len(self._to_make) < AHEAD_BATCHES or self._anew, "an acknowledgement")
            self._raise_anew()
            if self._failure is not None:
                raise self._failure
            self._to_make.append((make, self._test, self._lives))
            self._changed.notify_all()

    def drain(self) -> None:
        """Until all that was to be sent in turn has been made, and is kept."""
        with self._changed:
            self._wait(lambda: not self._to_make or self._anew, "an acknowledgement")
            self._raise_anew()

    def go_on_anew(self) -> None:
        """Heeds Anew: what comes from now on is of the server's next order."""
        with self._changed:
            self._anew = False

    def _raise_anew(self) -> None:
        if self._anew:
            raise Anew

    def receive(self, *kinds: str) -> pb.ServerMessage:
        """The next message other than an acknowledgement, which must be of one of `kinds`."""
        with self._changed:
            between = "gradients" not in kinds  # two steps
            while True:
                self._wait(
                    lambda: bool(self._incoming) or self._anew or (between and self._leaving()), " or ".join(kinds)
                )  # fmt: skip
                if "joined" not in kinds:
                    self._raise_anew()
                if not self._incoming:
                    raise Interrupted
                message, link = self._incoming.popleft()
                found = message.WhichOneof("kind")
                if found != "test" or link == self._link.number:  # else the server asks for it again
                    break
            self.taken = max(self.taken, message.place)
            self._test = link if found == "test" else 0
        if found not in kinds:
            raise RunError(self._who, " or ".join(kinds), str(found), "both sides must run the same halfpass")
        return message

    @property
    def test_holds(self) -> bool:
        """Whether a test is at work, and the stream is still there on which it came."""
        with self._changed:
            return self._test == self._link.number and not self._link.over

    def end_test(self) -> bool:
        """No test is at work any more; whether the stream was there all the time."""
        held, self._test = self.test_holds, 0
        return held

    def state(self) -> dict[str, Any]:
        """For a checkpoint, once all is made (`drain`): what a later process is made with. Its outbox is in the spool
        then, and on the disk with `outbox.sync`."""
        self.outbox.save()
        return {"run": self.run, "taken": self.taken, "last": self.outbox.last, "durable": self.outbox.durable}

    def keep(self, taken: int) -> None:
        """Tells the server that messages up to that place are in this client's checkpoint."""
        with self._changed:
            self._durable = max(self._durable, taken)
            if (now := time.monotonic()) - self._said_kept > KEPT_SECONDS:
                self._said_kept = now
                self._link.control.append(pb.ClientMessage(alive=pb.Alive()))
                self._changed.notify_all()

    def look(self) -> Look:
        """For who watches."""
        with self._changed:
            away = None if self._away is None else time.monotonic() - self._away
            outbox = self.outbox
            number = self._link.number - 1
            return Look(outbox.last, self._applied, outbox.durable, outbox.kept_bytes, number, away)

    def ask(self) -> pb.StatusReply:
        """How far the run is, asked beside the stream. Raises grpc.RpcError where there is no answer."""
        with self._changed:
            channel = self._link.channel
        ask = channel.unary_unary(
            f"/{SERVICE}/{STATUS}", request_serializer=pb.StatusRequest.SerializeToString,
            response_deserializer=pb.StatusReply.FromString,
        )  # fmt: skip
        metadata = [] if self._trust is None else self._trust.metadata()
        reply: pb.StatusReply = ask(pb.StatusRequest(), timeout=ASK_SECONDS, metadata=metadata)
        return reply

    def finish(self) -> None:
        """Says Finished and waits for the server to have it, durably, or to end the stream."""
        self.drain()
        self._finishing = True
        self.send(pb.ClientMessage(finished=pb.Finished()))
        with self._changed:
            self._wait(lambda: self._ended or self.outbox.durable >= self.outbox.last, "the end of the stream")
        self.close()

    def fail(self, reason: str, exit_status: int = 1) -> None:
        """Tells the server why this client stops, as far as it still listens."""
        self._leave(pb.ClientMessage(failed=pb.Failed(reason=reason, exit_status=exit_status)))

    def leave(self) -> None:
        """Ends the stream in good order: the server waits for another."""
        self._leave()

    def _leave(self, *last: pb.ClientMessage) -> None:
        with self._changed:
            self._closed = True  # no other stream is made
            self._link.control.clear()
            self._link.control.extend(last)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._link.over or self._ended, timeout=STOP_SECONDS)
        self.close()

    def close(self) -> None:
        """The server sees a stream that is lost, unless Finished was said."""
        with self._changed:
            self._closed = self._ended = True
            self._link.over = True
            self._changed.notify_all()
        self._link.channel.close()
        for thread in self._threads:  # a thread inside PyTorch when Python ends would abort the process
            if thread is not threading.current_thread():
                thread.join(STOP_SECONDS)

    # -- the sequence

    def _send(self, message: pb.ClientMessage, test: int, life: int) -> None:
        kind = message.WhichOneof("kind")
        of_test = kind == "test_end" or (kind == "batch" and message.batch.test)
        with self._changed:
            if of_test:
                size = message.ByteSize()
                self._wait(
                    lambda: test != self._link.number or not self._of_test
                    or sum(self._of_test) + size <= self._window_bytes, "an acknowledgement",
                )  # fmt: skip
                if test == self._link.number:
                    if kind == "batch":
                        self._of_test.append(size)
                    self._link.control.append(message)
            elif kind == "batch" or kind in NUMBERED:
                size = message.ByteSize()
                self._wait(lambda: self._has_room(size) or life != self._lives, "an acknowledgement")
                if life == self._lives:  # else nobody asks for it any more
                    message.place = self.outbox.last + 1
                    self.outbox.add(message.SerializeToString())
            else:
                if kind == "join":
                    self._join = message.join
                    self._join.run, self._join.received = self.run, self._received
                    self._join.first, self._join.process = self.outbox.first, self._process
                self._link.control.append(message)
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        """For a message of the sequence: in the window where the server is there, else, and always, in the outbox."""
        if not self.outbox.has_room(size):
            return False
        if self._away is not None:
            return True
        ahead = self.outbox.bytes_behind(self._applied)
        return ahead == 0 or ahead + size <= self._window_bytes

    def _encode(self) -> None:
        """On a thread of its own: batch by batch, once there is room for it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_make or self._closed)
                if self._closed:
                    return
                make, test, life = self._to_make[0]
            try:
                for message in make():
                    self._send(message, test, life)
                with self._changed:
                    if life == self._lives:
                        self._to_make.popleft()
                    self._changed.notify_all()
                del make
            except HalfpassError as error:
                self._fail(error)
                return
            except Exception as error:  # a defect of ours must not look like a slow client
                self._fail(RunError("encoding a batch", "a message", repr(error), "report this"))
                return

    def _fail(self, error: HalfpassError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        """Until it is ready; says for whom where that takes long."""
        patience, began = Patience(), time.monotonic()
        try:
            self._wait_until(ready, what, patience, began)
        finally:
            self.waits = None

    def _wait_until(self, ready: Callable[[], bool], what: str, patience: Patience, began: float) -> None:
        while not ready():
            self.waits = what, began
            if self._failure is not None:
                raise self._failure
            if self._ended or self._closed:
                raise RunError(self._who, what, "the end of the stream", "look at what the server printed")
            if self._away is None:
                patience.tell(self._who, what)
            self._changed.wait(min(0.2, self._timeout))

    # -- streams, one after the other

    def _first(self) -> _Link:
        """The first stream: for a process that goes on with a run, for as long as a lost server is waited for."""
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                return self._open(1)
            except InputError as error:
                if not self.run or time.monotonic() - began > self._reconnect or self._leaving():
                    raise
                if pause == 0.1:
                    line = "the %s cannot be reached (%s); trying again for %g s"
                    LOG.warning(line, self._who, error, self._reconnect, extra={"event": "lost"})
                time.sleep(_JITTER.uniform(pause / 2, pause))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _open(self, number: int) -> _Link:
        """A stream to the server. Raises InputError where it cannot be reached."""
        if self._trust is not None:  # gRPC would try a refused handshake again and again, and not say why
            reach(self._address, self._trust, CONNECT_SECONDS)
        channel = channel_to(self._address, self._trust, self._window_bytes + OVERHEAD_BYTES)
        self._connect(channel)
        link = _Link(channel, number)
        metadata = [] if self._trust is None else self._trust.metadata()
        link.call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._requests(link), metadata=metadata)
        return link

    def _connect(self, channel: grpc.Channel) -> None:
        ready = grpc.channel_ready_future(channel)
        first = min(1.0, CONNECT_SECONDS)
        try:
            with contextlib.suppress(grpc.FutureTimeoutError):
                ready.result(timeout=first)
                return
            # says why, or that it is there by now
            reach(self._address, self._trust, CONNECT_SECONDS - first, waited=first)
            ready.result(timeout=CONNECT_SECONDS)
        except InputError:
            channel.close()
            raise
        except grpc.FutureTimeoutError:
            channel.close()
            raise InputError(
                "server address", f"a halfpass server within {CONNECT_SECONDS:g} s", f"none at {self._address}",
                "look at what the server printed",
            ) from None  # fmt: skip

    def _keep_up(self) -> None:
        """On a thread of its own: reads the stream, and where it is lost makes another."""
        while True:
            lost = self._read(self._link)
            with self._changed:
                self._link.over = True
                self._of_test.clear()
                if lost is None or self._failure is not None or self._closed or self._join is None or not self.run:
                    self._failure = self._failure or lost
                    self._ended = True
                    self._changed.notify_all()
                    return
                if self._away is None:
                    self._away = time.monotonic()
                    if self._reconnect > 0:
                        line, known = "lost the %s (%s); trying to reach it again for %g s", {"event": "lost"}
                        LOG.warning(line, self._who, lost, self._reconnect, extra=known)
                self._changed.notify_all()
            self._link.channel.close()
            if not self._open_again(lost):
                return

    def _open_again(self, lost: HalfpassError) -> bool:
        """Until there is a stream again, for as long as that may take."""
        assert self._away is not None
        while time.monotonic() - self._away < self._reconnect:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _JITTER.uniform(self._pause / 2, self._pause))
                if self._closed:
                    self._ended = True
                    self._changed.notify_all()
                    return False
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            try:
                link = self._open(self._link.number + 1)
            except HalfpassError as error:
                if str(error) != str(lost):
                    LOG.warning("the %s is not reached yet: %s", self._who, error, extra={"event": "lost"})
                lost = error
                continue
            with self._changed:
                assert self._join is not None
                self._join.run, self._join.received = self.run, self._received
                self._join.first = self.outbox.first
                link.control.append(pb.ClientMessage(join=self._join))
                self._link = link
                self._changed.notify_all()
            return True
        failure = lost
        if self._reconnect > 0:
            remedy = "look at what the server printed, and go on with halfpass resume"
            failure = RunError(self._who, f"a connection again within {self._reconnect:g} s", str(lost), remedy)
        with self._changed:
            self._failure, self._ended = self._failure or failure, True
            self._changed.notify_all()
        return False

    def _watch(self) -> None:
        """On a thread of its own: ends a stream on which nothing comes."""
        while not self._closed and not self._ended:
            time.sleep(min(0.2, self._timeout / 4))
            link = self._link
            if not link.over and link.pulse.is_lost(self._timeout, self._bytes_that_came):
                link.over = True
                link.call.cancel()

    def _bytes_that_came(self) -> int | None:
        traffic = connection_traffic(None, self._port)
        return None if traffic is None else traffic[1]

    def _requests(self, link: _Link) -> Iterator[bytes]:
        """What is sent on a stream: what is to be, in order, and signs of life."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: link.over or link.control or self._closed or self._behind(link),
                    heartbeat_seconds(self._timeout),
                )
                if link.over or (self._closed and not link.control):
                    return
                if not self._closed and self._behind(link):
                    try:
                        data = self._next(link)
                    except HalfpassError as error:
                        self._fail(error)
                        return
                elif link.control or link.begun:
                    message = link.control.popleft() if link.control else pb.ClientMessage(alive=pb.Alive())
                    message.durable, link.begun = self._durable, True
                    data = message.SerializeToString()
                    del message  # what is sent is not kept while the next is waited for
                else:
                    continue
            yield data
            del data

    def _next(self, link: _Link) -> bytes:
        assert link.sent is not None
        link.sent = max(link.sent, self.outbox.durable) + 1
        return self.outbox.get(link.sent)

    def _behind(self, link: _Link) -> bool:
        return link.sent is not None and max(link.sent, self.outbox.durable) < self.outbox.last

    def _read(self, link: _Link) -> HalfpassError | None:
        """To the stream's end; why it ended, None where the server ended it in good order."""
        try:
            for data in link.call:
                if not few_parts(data) or len(self._incoming) > MOST_INCOMING:
                    expected = f"messages of few parts, and at most {MOST_INCOMING} at a time"
                    raise RunError(self._who, expected, "more", "it is no halfpass server, or a broken one")
                self._accept(link, pb.ServerMessage.FromString(data))
        except HalfpassError as error:
            self._fail(error)
            return error
        except grpc.RpcError as error:
            if link.over and error.code() is grpc.StatusCode.CANCELLED:
                return RunError(
                    self._who, f"a message or a sign of life within {self._timeout:g} s", "none",
                    "see whether it still runs, or raise wire.timeout",
                )  # fmt: skip
            return RunError(
                self._who, "a connection until the end", f"{error.code().name.lower()}: {error.details()}",
                "look at what the server printed",
            )  # fmt: skip
        except Exception as error:
            expected = "a message that can be read"
            failure = RunError(self._who, expected, repr(error), "both sides must run the same halfpass")
            self._fail(failure)
            return failure
        with self._changed:
            if (self._finishing and self._applied >= self.outbox.last) or self._reconnect == 0:
                return None
        found, remedy = "the end of the stream", "look at what the server printed"
        return RunError(self._who, "a connection until the end", found, remedy)

    def _accept(self, link: _Link, message: pb.ServerMessage) -> None:
        kind = message.WhichOneof("kind")
        with self._changed:
            link.pulse.beat()
            self._applied = max(self._applied, message.applied)
            self.outbox.let_go(message.durable)
            if kind == "ack":
                if message.ack.test and self._of_test:
                    self._of_test.popleft()
            elif kind == "joined":
                self._joined(link, message)
            elif kind == "failed":
                self._failure = PassedOnError(message.failed.reason, message.failed.exit_status)
            elif kind == "rejected":
                self._failure = PassedOnError(
                    f"{self._who} could not use a message, and this client ends: {message.rejected.reason}"
                )  # fmt: skip
            elif kind != "alive" and (message.place == 0 or message.place > self._received):
                if message.place not in (0, self._received + 1):
                    expected = f"its message {self._received + 1}"
                    raise RunError(self._who, expected, f"number {message.place}", "report this")
                self._received = max(self._received, message.place)
                if self.outbox.folder is None:  # nothing is kept, nothing is gone on with
                    self._durable = self._received
                self._incoming.append((message, link.number))
            self._changed.notify_all()

    def _joined(self, link: _Link, message: pb.ServerMessage) -> None:
        joined = message.joined
        if self.run and joined.run != self.run:
            raise RunError(self._who, f"run {self.run}", f"run {joined.run[:40]!r}", "begin both sides anew")
        self.run = self.outbox.run = joined.run
        if joined.anew:
            self.outbox.restart(joined.received)
            self._received = self.taken = self._durable = joined.sent
            self._lives, self._anew = self._lives + 1, True
            self._incoming.clear()
            self._to_make.clear()
        if joined.received < self.outbox.durable:
            expected, found = f"this client's messages up to {self.outbox.durable}", f"up to {joined.received}"
            raise RunError(self._who, expected, found, "restore the server's run folder, or begin anew")
        link.sent = joined.received
        self._applied = joined.received  # a server that went back to its checkpoint has less than it once said
        if not self._has_joined:
            self._has_joined = True
            self._incoming.append((message, link.number))
        elif self._away is not None:
            away = time.monotonic() - self._away
            known = {"event": "back", "seconds": round(away, 1)}
            LOG.warning("reached the %s again, after %.1f s", self._who, away, extra=known)
        self._away, self._pause = None, 0.1


def channel_to(address: str, trust: Trust | None, limit_bytes: int) -> grpc.Channel:
    """A connection of its own; `limit_bytes` of a message."""
    options = channel_options(limit_bytes)
    options.append(("grpc.use_local_subchannel_pool", 1))  # else a new channel may get the broken connection
    if trust is None:
        return grpc.insecure_channel(address, options=options)
    named = [] if trust.name is None else [("grpc.ssl_target_name_override", trust.name)]
    return grpc.secure_channel(address, trust.channel_credentials(), options=[*options, *named])
