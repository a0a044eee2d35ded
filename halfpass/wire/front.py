"""The door of a server that strangers can reach: TLS ends here, and what came through is passed on to gRPC.

gRPC's own TLS refuses without a word on either side, and knows no limit for connections. Here each refusal has its
reason, which is logged and goes to the peer as a TLS alert; connections that have not joined are few, in all and for
each address, and end after a while. Tests: tests/test_trust.py.
"""

import contextlib
import selectors
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfpass.errors import HalfpassError, InputError
from halfpass.wire.service import LOG, Allowance
from halfpass.wire.sockets import traffic_of
from halfpass.wire.trust import Trust

HANDSHAKE_SECONDS = 10.0
WAITING, WAITING_EACH = 64, 16  # connections of whom it is not known who they are: in all, and of one address
WAITING_SECONDS = 30.0  # that one may be so
WAITING_BYTES = 5 * 2**20  # that it may send: a Join, and a little
WAITING_CALLS = 8  # that it may make
STRANGERS_AT_ONCE, STRANGERS_A_SECOND = 128, 16.0  # connections that show nobody, in all
EACH_AT_ONCE, EACH_A_SECOND = 32, 2.0  # and of one address
MOST_ADDRESSES = 4096  # that are remembered
REFUSAL_SECONDS = 0.02  # that a refusal takes at least: a flood waits in the system, where it costs little
PIECE = 2**18  # bytes that are passed on at once


@dataclass
class Peer:
    """Who is at the other end of a connection."""

    host: str
    names: list[str]  # in its certificate; none without one
    outer: ssl.SSLSocket
    certified: bool  # it has shown a certificate of the authority
    known: bool = False  # who it is
    shown: bool = False  # somebody that may ask
    calls: int = 0  # that it made before


class Front:
    """Listens in gRPC's place; `backend` is the port on loopback that gRPC listens on."""

    def __init__(self, bind: str, trust: Trust, backend: int) -> None:
        self._trust, self._backend = trust, backend
        self._files = [file for file in (trust.certificate, trust.key, trust.authority) if file is not None]
        self._loaded, self._context = self._changed(), trust.server_context()
        self._peers: dict[int, Peer] = {}  # by the port of the connection to gRPC
        self._joined: dict[int, Peer] = {}  # by client
        self._waiting: Counter[str] = Counter()
        self._strangers, self._strangers_of = Allowance(), dict[str, Allowance]()  # in all, and by address
        self._lock = threading.Lock()
        self._closed = False
        self.refused = 0  # connections, for a count that is not exact where two are at once
        host, _, port = bind.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        try:
            self._listener = socket.create_server((host.strip("[]"), int(port)), family=family, backlog=128)
        except OSError as error:
            raise InputError("server address", "a free port", f"{bind} ({error.strerror})", "choose another") from None
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def peer(self, port: int) -> Peer | None:
        """Whose connection reached gRPC from that port; None where it came another way."""
        return self._peers.get(port)

    def traffic(self, port: int) -> tuple[int, int] | None:
        """(bytes sent, bytes received) on the outer connection, encrypted; None where the system does not say."""
        peer = self._peers.get(port)
        try:
            return None if peer is None else traffic_of(peer.outer)
        except OSError:
            return None

    def joined(self, port: int, client: int) -> None:
        """It is known whose connection it is: it may stay, in the place of the one that the client had."""
        with self._lock:
            if (peer := self._peers.get(port)) is None:
                return
            before, self._joined[client] = self._joined.get(client), peer
        self.settle(port)
        if before is not None and before is not peer:
            _cut(before)

    def settle(self, port: int) -> None:
        """It is known whose connection it is, and it may stay."""
        with self._lock:
            if (peer := self._peers.get(port)) is not None and not peer.known:
                peer.known = True
                self._leave(peer.host)
        self.vouch(port)

    def vouch(self, port: int) -> None:
        """It has shown that it is no stranger's, and so the one before it was none by which a client looks."""
        with self._lock:
            if (peer := self._peers.get(port)) is not None and not peer.shown:
                peer.shown = True
                self._give_back(peer.host, 2)

    def count_call(self, port: int, *, too_many: bool = False) -> None:
        """A call of somebody of whom nothing is known, or one of `too_many`: who makes many is sent away, and has shown
        nobody."""
        with self._lock:
            if (peer := self._peers.get(port)) is None or (peer.known and not too_many):
                return
            peer.calls += 1
            if peer.calls <= WAITING_CALLS:
                return
            if peer.shown:
                peer.shown = False
                self._give_back(peer.host, -2)
        _cut(peer)

    def _give_back(self, host: str, connections: int) -> None:
        for allowance in (self._strangers, self._strangers_of.get(host)):
            if allowance is not None:
                allowance.give_back(connections)

    def _admits(self, host: str) -> bool:
        """Whether another connection of it may come in, of which nothing is known yet."""
        if self._waiting.total() >= WAITING or self._waiting[host] >= WAITING_EACH:
            return False
        if host not in self._strangers_of and len(self._strangers_of) >= MOST_ADDRESSES:
            self._strangers_of.clear()
        own = self._strangers_of.setdefault(host, Allowance())
        return own.take(EACH_AT_ONCE, EACH_A_SECOND) and self._strangers.take(STRANGERS_AT_ONCE, STRANGERS_A_SECOND)

    def _leave(self, host: str) -> None:
        self._waiting[host] -= 1
        if not self._waiting[host]:
            del self._waiting[host]

    def _refuse(self, host: str, reason: str) -> None:
        self.refused += 1
        LOG.warning("refused a connection from %s: %s", host, reason, extra={"event": "refused", "host": host})

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # -- one thread for newcomers, and one for each connection

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, address = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.1)  # such as too many open files
                continue
            host = address[0]
            with self._lock:
                few = self._admits(host)
                self._waiting[host] += few
            if not few:
                self._refuse(host, "too many have not said who they are")
                connection.close()
                time.sleep(REFUSAL_SECONDS)
                continue
            threading.Thread(target=self._serve, args=(connection, host), daemon=True).start()

    def _serve(self, connection: socket.socket, host: str) -> None:
        peer: Peer | None = None
        try:
            connection.settimeout(HANDSHAKE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                outer = self._current().wrap_socket(connection, server_side=True)
            except (OSError, ValueError) as error:
                self._refuse(host, why(error))
                return
            inner = socket.create_connection(("127.0.0.1", self._backend), HANDSHAKE_SECONDS)
            with outer, inner:
                certificate: Any = outer.getpeercert() or {}
                names = [str(value) for kind, value in certificate.get("subjectAltName", ()) if kind in ("URI", "DNS")]
                own, port = Peer(host, names, outer, bool(certificate)), inner.getsockname()[1]
                peer = own
                self._peers[port] = peer
                if certificate:
                    self.vouch(port)
                try:
                    if not pass_on(outer, inner, lambda: own.known):
                        known = {"event": "refused", "host": host}
                        LOG.warning("ended a connection from %s: it has not said who it is", host, extra=known)
                        self.refused += 1
                finally:
                    del self._peers[port]
        except OSError as error:
            LOG.debug("a connection from %s ended: %s", host, why(error))
        finally:
            connection.close()
            with self._lock:
                if peer is None or not peer.known:
                    self._leave(host)

    def _changed(self) -> list[tuple[int, int]]:
        return [(stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in self._files)]

    def _current(self) -> ssl.SSLContext:
        """The context, made anew where one of its files is another; the old one as long as the new ones are unfit."""
        with self._lock, contextlib.suppress(OSError):
            if (found := self._changed()) != self._loaded:
                self._loaded = found
                try:
                    self._context = self._trust.server_context()
                    known = {"event": "certificate"}
                    LOG.info("took the renewed certificate %s", self._trust.certificate, extra=known)
                except HalfpassError as error:
                    LOG.warning("kept the old certificate: %s", error, extra={"event": "certificate"})
        return self._context


def _cut(peer: Peer) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(peer.outer, socket.SHUT_RDWR)  # SSLSocket's own would go on in plain text


def why(error: BaseException) -> str:
    """What went wrong in a handshake, for a log."""
    text = str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in text:
        return "it showed no certificate"
    if any(word in text for word in ("HTTP_REQUEST", "WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "NO_PROTOCOLS")):
        return "it does not speak TLS"
    if isinstance(error, TimeoutError):
        return f"no handshake within {HANDSHAKE_SECONDS:g} s"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return text or type(error).__name__


def pass_on(outer: ssl.SSLSocket, inner: socket.socket, known: Callable[[], bool]) -> bool:
    """Bytes both ways until either side ends; a side that reads slowly holds the other one back. False where it is not
    `known` soon enough, or before many bytes, who it is."""
    deadline = time.monotonic() + WAITING_SECONDS
    for one in (outer, inner):
        one.setblocking(False)
    up, down = _Pump(outer, inner), _Pump(inner, outer)
    with selectors.DefaultSelector() as ready:
        for one in (outer, inner):
            ready.register(one, selectors.EVENT_READ)
        while not (up.done or down.done):
            moved = up.move() | down.move()
            if up.carried > WAITING_BYTES and not known():
                return False
            if moved:
                continue
            events = {outer: up.waits_for(outer) | down.waits_for(outer),
                      inner: up.waits_for(inner) | down.waits_for(inner)}  # fmt: skip
            for one, mask in events.items():
                # a socket that is waited for in no way is left out: a selector takes no empty mask
                if one in ready.get_map() and not mask:
                    ready.unregister(one)
                elif mask and one not in ready.get_map():
                    ready.register(one, mask)
                elif mask:
                    ready.modify(one, mask)
            ready.select(None if known() else 1.0)
            if time.monotonic() > deadline and not known():
                return False
    return True


class _Pump:
    """One direction."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self._source, self._sink, self.done, self.carried = source, sink, False, 0
        self._buffer, self._view = bytearray(PIECE), memoryview(b"")
        self._source_waits, self._sink_waits = selectors.EVENT_READ, 0

    def waits_for(self, one: socket.socket) -> int:
        if one is self._source:
            return 0 if self._view else self._source_waits
        return self._sink_waits if self._view else 0

    def move(self) -> bool:
        """Takes and gives what it can without waiting; whether that was anything."""
        moved = False
        if not self._view:
            filled = 0
            while filled < PIECE:
                count = self._take(filled)
                if count <= 0:
                    self.done = count == 0 and filled == 0
                    break
                filled += count
            self._view, self.carried = memoryview(self._buffer)[:filled], self.carried + filled
            moved = filled > 0
        while self._view:
            try:
                sent = self._sink.send(self._view)
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._sink_waits = selectors.EVENT_WRITE
                break
            except ssl.SSLWantReadError:
                self._sink_waits = selectors.EVENT_READ
                break
            self._view = self._view[sent:]
            moved = True
        return moved

    def _take(self, filled: int) -> int:
        """Bytes that were read behind the first `filled`; 0 at the end, -1 where none are there."""
        try:
            return self._source.recv_into(memoryview(self._buffer)[filled:])
        except (BlockingIOError, ssl.SSLWantReadError):
            self._source_waits = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            self._source_waits = selectors.EVENT_WRITE
        except (ConnectionError, ssl.SSLError):
            return 0
        return -1
