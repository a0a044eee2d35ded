"""Stream mode: a node is given an address, a token and a certificate, and its client joins halfpass's own server there.

The run is that of `halfpass serve` and `halfpass join`; Flower starts the processes and carries two messages to a node:
which client is it, and how does it get in. Authority and tokens are made for this one run, and nowhere else of use.
"""

import contextlib
import ipaddress
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfpass.bounded import parse_json
from halfpass.commands.certs import make_certificates
from halfpass.config import Config, TlsConfig
from halfpass.errors import HalfpassError, InputError, PassedOnError, RunError
from halfpass.files import alone_in, make_folder
from halfpass.flower.settings import address_of
from halfpass.run.children import for_peer
from halfpass.run.client_process import client_folder, join
from halfpass.run.round_hub import MOST_SENT, Exchange, Reply
from halfpass.run.server_process import serve

LOG = logging.getLogger("halfpass")
PLACE = "the server's message"
PAUSE_SECONDS = 2.0  # before a message goes again to a node that Flower had no reply of
ANSWER_SECONDS = 600.0  # for a node to say which client it is


def serve_streams(config: Config, address: str, exchange: Exchange) -> None:
    """One run, to its folder, whose clients are told by `exchange` to join at `address`, HOST:PORT. Raises as
    `server_process.serve`, and RunError where a node cannot join."""
    host, port = address_of(address)
    nodes = _meet(exchange, config.clients.count)
    with tempfile.TemporaryDirectory(prefix="halfpass-") as folder:
        keys = Path(folder, "keys")
        make_certificates(keys, clients=config.clients.count, hosts=[host.strip("[]")], tokens=True)
        (keys / "authority-key.pem").unlink()  # which has signed all that it was for
        calls = _Calls(exchange)

        def announce(port: int) -> None:
            for client, node in nodes.items():
                token, authority = (keys / name for name in (f"client-{client}.token", "authority.pem"))
                calls.begin(client, node, {
                    "address": f"{host}:{port}", "token": token.read_text().strip(), "authority": authority.read_text(),
                })  # fmt: skip
                token.unlink()

        everywhere = "[::]" if host.startswith("[") else "0.0.0.0"
        bind = f"{host if _is_loopback(host) else everywhere}:{port}"
        settings = replace(config, tls=TlsConfig(folder=str(keys)))
        try:
            serve(settings, bind, announce, engine="flower", trouble=calls.trouble)
        finally:
            calls.end()


def answer(message: bytes, config: Callable[[], Config], index: Callable[[], int], node: int) -> bytes:
    """What a node says to a message of `serve_streams`: its client's number, or, behind the run, nothing or why not."""
    try:
        said, number = _read(message, PLACE), index()
        if not said:
            return _write({"client": number})
        settings = config()
        with tempfile.TemporaryDirectory(prefix="halfpass-") as folder:
            token, authority = Path(folder, "token"), Path(folder, "authority.pem")
            token.touch(0o600)
            token.write_text(_text(said, "token"))
            authority.write_text(_text(said, "authority"))
            tls = TlsConfig(token=str(token), authority=str(authority))
            with _alone(settings, number) as alone:
                if alone:  # else another ClientApp is at it, whose message Flower believed lost
                    again = client_folder(settings.folder, number).exists()  # of one that was killed
                    join(replace(settings, tls=tls), _text(said, "address"), number, again=again)
        return _write({})
    except Exception as error:
        if not isinstance(error, PassedOnError):
            LOG.error("node %d: %s", node, error, exc_info=not isinstance(error, HalfpassError))
        reason, status = for_peer(f"node {node}", error)
        return _write({"failed": reason, "exit_status": status})


@contextlib.contextmanager
def _alone(config: Config, client: int) -> Iterator[bool]:
    """Whether this process is the only one of that client on this machine, which it is until the end."""
    folder = config.folder / f"client-{client}.lock"
    make_folder("out", folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(folder))
        except InputError:
            yield False
            return
        try:
            yield True
        finally:
            folder.rmdir()


def _meet(exchange: Exchange, count: int) -> dict[int, int]:
    """The node of each client."""
    there = list(exchange.nodes())
    if len(there) != count:
        remedy = "start as many nodes as clients.count says, or change that"
        raise InputError("nodes", f"{count}, one for each client", str(len(there)), remedy)
    for node in there:
        exchange.send(node, _write({}))
    found, tries = dict[int, int](), dict.fromkeys(there, 1)
    deadline = time.monotonic() + ANSWER_SECONDS
    while len(found) < count:
        reply = exchange.receive(max(0.0, deadline - time.monotonic()))
        if reply is None:
            silent = ", ".join(str(node) for node in there if node not in found.values())
            raise RunError(f"node {silent}", f"an answer within {ANSWER_SECONDS:g} s", "none", "see its log")
        if reply.failure and reply.again and tries[reply.node] < MOST_SENT:
            tries[reply.node] += 1
            time.sleep(PAUSE_SECONDS)
            exchange.send(reply.node, _write({}))
            continue
        if (trouble := _trouble(f"node {reply.node}", reply)) is not None:
            raise trouble
        client = _read(reply.data, f"node {reply.node}").get("client")
        if not isinstance(client, int) or client in found or not 0 <= client < count:
            expected = f"a client number of its own, from 0 to {count - 1}"
            raise InputError(f"node {reply.node}", expected, repr(client), "give each node another partition-id")
        found[client] = reply.node
    return found


class _Calls:
    """Messages that have clients join: sent again where Flower gives one up, which is when a ClientApp was killed."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._calls: dict[int, tuple[int, bytes]] = {}  # client and message, by node
        self._sent: dict[int, int] = {}
        self._trouble: HalfpassError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flower streams", daemon=True)

    def begin(self, client: int, node: int, said: Mapping[str, str]) -> None:
        self._calls[node], self._sent[node] = (client, _write(said)), 1
        self._exchange.send(node, self._calls[node][1])
        if not self._thread.is_alive():
            self._thread.start()

    def trouble(self) -> HalfpassError | None:
        """Why a client does not join, once that is known."""
        return self._trouble

    def end(self) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _watch(self) -> None:
        again = list[tuple[float, int]]()  # when, and which node
        while not self._over.is_set():
            try:
                reply = self._exchange.receive(0.2)
            except HalfpassError as error:  # the grid is gone, the streams are not
                LOG.warning("%s; clients that have joined go on", error, extra={"event": "lost"})
                return
            while again and time.monotonic() > again[0][0] and again[0][1] in self._exchange.nodes():
                _, node = again.pop(0)
                self._sent[node] += 1
                self._exchange.send(node, self._calls[node][1])
            if reply is None or reply.node not in self._calls:
                continue
            client, _ = self._calls[reply.node]
            if reply.failure and reply.again and self._sent[reply.node] < MOST_SENT:
                known = {"event": "lost", "client": client}
                LOG.warning("client %d: %s; starting it again", client, reply.failure, extra=known)
                again.append((time.monotonic() + PAUSE_SECONDS, reply.node))
            elif (trouble := _trouble(f"client {client}", reply)) is not None:
                self._trouble = self._trouble or trouble


def _trouble(place: str, reply: Reply) -> HalfpassError | None:
    if reply.failure:
        return RunError(place, "a reply", reply.failure, "see its log")
    try:
        said = _read(reply.data, place)
    except InputError as error:
        return error
    if "failed" not in said:
        return None
    return PassedOnError(f"{place}: {said['failed']}", 2 if said.get("exit_status") == 2 else 1)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _write(said: Mapping[str, object]) -> bytes:
    return json.dumps(said).encode()


def _read(data: bytes, place: str) -> dict[str, Any]:
    try:
        said = parse_json(data.decode())
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise InputError(place, "a message of halfpass", "another", "both apps must be halfpass's")
    return said


def _text(said: Mapping[str, object], name: str) -> str:
    if not isinstance(text := said.get(name), str):
        raise InputError(PLACE, f"its {name}", repr(type(text).__name__), "both sides must run the same halfpass")
    return text
