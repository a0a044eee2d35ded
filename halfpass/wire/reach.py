"""Whether a server can be reached, and if not, why: gRPC says only that a socket was closed.

Tests: tests/test_trust.py.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Callable

from halfpass.errors import InputError
from halfpass.wire.service import Interrupted
from halfpass.wire.trust import Trust

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # HTTP/2's first bytes (RFC 9113, 3.4)
ANSWER_SECONDS = 5.0
REFUSED = {  # what a server's TLS alert means
    "CERTIFICATE_REQUIRED": ("none", "give --tls.folder or --tls.certificate and --tls.key"),
    "UNKNOWN_CA": ("one of another authority", "ask for one of the server's authority"),
    "CERTIFICATE_EXPIRED": ("one that has expired", "ask for a new one"),
    "BAD_CERTIFICATE": ("one that it does not take", "look at the server's log"),
    "CERTIFICATE_UNKNOWN": ("one that it does not take", "look at the server's log"),
}
NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH", "UNEXPECTED_EOF")


def reach(
    address: str, trust: Trust | None, seconds: float, waited: float = 0.0, leaving: Callable[[], bool] = lambda: False
) -> None:
    """Returns once a server answers there as it will answer gRPC; raises InputError that says what is wrong, after so
    many seconds, and those that the caller has `waited` before. Raises Interrupted where the process is `leaving`."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), max(1.0, seconds)) as connection:
                connection.settimeout(ANSWER_SECONDS)
                _greet(address, host.strip("[]"), connection, trust)
            return
        except (OSError, OverflowError) as error:
            if leaving():
                raise Interrupted from None
            if time.monotonic() < deadline and not isinstance(error, socket.gaierror):
                time.sleep(0.2)
                continue
            unknown = f" ({error.strerror})" if isinstance(error, socket.gaierror) else ""
            found = f"none at {address}{unknown}"
            expected = f"a halfpass server within {seconds + waited:g} s"
            raise InputError("server address", expected, found, "start one with halfpass serve") from None


def _greet(address: str, host: str, connection: socket.socket, trust: Trust | None) -> None:
    if trust is None:
        connection.sendall(HELLO)
        if _answer(connection)[:1] in (b"", b"\x15"):  # a TLS alert, or the end
            expected, remedy = "a server without TLS", "give --tls.folder, as the server has"
            raise InputError(f"server at {address}", expected, "one that wants TLS, or no halfpass server", remedy)
        return
    try:
        outer = trust.client_context().wrap_socket(connection, server_hostname=trust.name or host)
        with contextlib.suppress(OSError):  # a refusal may be on its way already, and is read below
            outer.sendall(HELLO)
        answer = outer.recv(16)
        with contextlib.suppress(OSError, ValueError):
            outer.unwrap()
    except ssl.SSLCertVerificationError as error:
        expected = f"a certificate for {trust.name or host}, of {trust.authority}"
        remedy = "copy the server's authority.pem, or give tls.server_name"
        raise InputError(f"server at {address}", expected, error.verify_message, remedy) from None
    except ssl.SSLError as error:
        raise _refusal(address, error) from None
    except ConnectionError:
        answer = b""
    if not answer:
        expected, remedy = "a server that takes this process's certificate", "look at the server's log"
        raise InputError(f"server at {address}", expected, "one that ended the connection", remedy)


def _answer(connection: socket.socket) -> bytes:
    try:
        return connection.recv(16)
    except ConnectionError:
        return b""


def _refusal(address: str, error: ssl.SSLError) -> InputError:
    said = (error.reason or str(error)).upper()
    for alert, (found, remedy) in REFUSED.items():
        if said.endswith(alert):
            return InputError(f"server at {address}", "this client's certificate, of its authority", found, remedy)
    if any(word in said for word in NO_TLS):
        remedy = "start it with --tls.folder, or leave that out here"
        return InputError(f"server at {address}", "a server with TLS", "one without", remedy)
    return InputError(f"server at {address}", "TLS", said.lower().replace("_", " "), "look at the server's log")
