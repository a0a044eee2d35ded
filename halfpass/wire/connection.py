"""A client's end of its stream to the server (`service.py` says what a stream is)."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import grpc

from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import few_parts
from halfpass.wire.reach import reach
from halfpass.wire.service import (
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
from halfpass.wire.trust import Trust

CONNECT_SECONDS = 10.0  # to reach a server
MOST_INCOMING = 64  # messages that wait to be taken: a server says one thing at a time
AHEAD_BATCHES = 2  # not encoded yet, beyond the window: one at work and one behind it


class Connection:
    """A client's stream to the server. Encoding, sending and reading go on beside the caller's work, which waits only
    where the window is full."""

    def __init__(
        self, address: str, *, window_bytes: int, timeout: float, trust: Trust | None = None, insecure: bool = False
    ) -> None:
        """`trust`: of a client whose server encrypts. `insecure`: the server may be another machine, without that."""
        check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
        self._who, self._timeout, self._window_bytes = f"server at {address}", timeout, window_bytes
        self._outgoing: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
        self._to_make: deque[Callable[[], Sequence[pb.ClientMessage]]] = deque()
        self._unacknowledged: deque[tuple[tuple[int, int, int], int]] = deque()  # (place, bytes), oldest first
        self._incoming: deque[pb.ServerMessage] = deque()
        self._changed = threading.Condition()
        self._pulse, self._port = Pulse(), int(address.rpartition(":")[2])
        self._failure: HalfpassError | None = None
        self._ended = self._closed = False
        if trust is not None:  # gRPC would try a refused handshake again and again, and not say why
            reach(address, trust, CONNECT_SECONDS)
        options = channel_options(window_bytes + OVERHEAD_BYTES)
        if trust is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            named = [] if trust.name is None else [("grpc.ssl_target_name_override", trust.name)]
            self._channel = grpc.secure_channel(address, trust.channel_credentials(), options=[*options, *named])
        self._connect(address, trust)
        metadata = [] if trust is None else trust.metadata()
        self._call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")(self._requests(), metadata=metadata)
        threading.Thread(target=self._read, daemon=True).start()
        self._encoder = threading.Thread(target=self._encode, daemon=True)
        self._encoder.start()

    def _connect(self, address: str, trust: Trust | None) -> None:
        ready = grpc.channel_ready_future(self._channel)
        first = min(1.0, CONNECT_SECONDS)
        try:
            with contextlib.suppress(grpc.FutureTimeoutError):
                ready.result(timeout=first)
                return
            reach(address, trust, CONNECT_SECONDS - first, waited=first)  # says why, or that it is there by now
            ready.result(timeout=CONNECT_SECONDS)
        except InputError:
            self._channel.close()
            raise
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise InputError(
                "server address", f"a halfpass server within {CONNECT_SECONDS:g} s", f"none at {address}",
                "look at what the server printed",
            ) from None  # fmt: skip

    def send(self, *messages: pb.ClientMessage) -> None:
        """At once, or a batch as soon as the window has room for it."""
        for message in messages:
            if message.HasField("batch"):
                with self._changed:
                    self._wait_for_window(message)
            self._outgoing.put(message)

    def send_in_turn(self, make: Callable[[], Sequence[pb.ClientMessage]]) -> None:
        """Has a batch, or what comes after batches, made and sent beside the caller's work, in the order of the calls.

        Blocks while AHEAD_BATCHES wait for that, because the window is full or the encoding slow. `make` may find that
        there is nothing to send.
        """
        with self._changed:
            self._wait(lambda: len(self._to_make) < AHEAD_BATCHES, "an acknowledgement")
            if self._failure is not None:
                raise self._failure
            self._to_make.append(make)
            self._changed.notify_all()

    def _encode(self) -> None:
        """On a thread of its own: batch by batch, once the window has room for it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_make or self._closed)
                if self._closed:
                    return
            try:
                self.send(*self._to_make[0]())
                with self._changed:
                    self._to_make.popleft()
                    self._changed.notify_all()
            except HalfpassError as error:
                self._fail(error)
                return
            except Exception as error:  # a defect of ours must not look like a slow client
                self._fail(RunError("encoding a batch", "a message", repr(error), "report this"))
                return

    def _wait_for_window(self, message: pb.ClientMessage) -> None:
        size = message.ByteSize()
        self._wait(lambda: self._in_flight() + size <= self._window_bytes or not self._unacknowledged,
                   "an acknowledgement")  # fmt: skip
        batch = message.batch
        self._unacknowledged.append(((batch.epoch, batch.step, batch.before), size))

    def _fail(self, error: HalfpassError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

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
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._outgoing.put(None)
        self._channel.close()
        self._encoder.join(STOP_SECONDS)  # a thread inside PyTorch when Python ends would abort the process

    def _in_flight(self) -> int:
        return sum(size for _, size in self._unacknowledged)

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        patience = Patience()
        while not ready():
            if self._failure is not None:
                raise self._failure
            if self._ended or self._closed:
                raise RunError(self._who, what, "the end of the stream", "look at what the server printed")
            if self._pulse.is_lost(self._timeout, self._bytes_that_came):
                raise RunError(
                    self._who, f"{what} or a sign of life within {self._timeout:g} s", "none",
                    "see whether it still runs, or raise wire.timeout",
                )  # fmt: skip
            patience.tell(self._who, what)
            self._changed.wait(min(0.2, self._timeout))

    def _bytes_that_came(self) -> int | None:
        traffic = connection_traffic(None, self._port)
        return None if traffic is None else traffic[1]

    def _requests(self) -> Iterator[bytes]:
        while True:
            try:
                message = self._outgoing.get(timeout=heartbeat_seconds(self._timeout))
            except queue.Empty:
                message = pb.ClientMessage(alive=pb.Alive())
            if message is None:
                return
            data = message.SerializeToString()
            del message  # what is sent is not kept while the next is waited for
            yield data
            del data

    def _read(self) -> None:
        failure: HalfpassError | None = None
        try:
            for data in self._call:
                if not few_parts(data) or len(self._incoming) > MOST_INCOMING:
                    expected = f"messages of few parts, and at most {MOST_INCOMING} at a time"
                    raise RunError(self._who, expected, "more", "it is no halfpass server, or a broken one")
                self._accept(pb.ServerMessage.FromString(data))
        except HalfpassError as error:
            failure = error
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
            self._pulse.beat()
            if kind == "ack":
                self._acknowledge(message.ack.epoch, message.ack.step, message.ack.before)
            elif kind == "failed":
                self._failure = PassedOnError(message.failed.reason, message.failed.exit_status)
            elif kind == "rejected":
                self._failure = PassedOnError(f"{self._who} rejected a message: {message.rejected.reason}")
            elif kind != "alive":
                if kind == "gradients":
                    self._acknowledge(message.gradients.epoch, message.gradients.step)
                self._incoming.append(message)
            self._changed.notify_all()

    def _acknowledge(self, epoch: int, step: int, before: int = 0) -> None:
        """Everything up to and including this batch is done with."""
        while self._unacknowledged and self._unacknowledged[0][0] <= (epoch, step, before):
            self._unacknowledged.popleft()
