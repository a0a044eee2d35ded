"""What both ends of a gRPC stream share: its name, limits, and who may be reached.

There is one bidirectional stream per client, from Join to Finished. `hub.py` is the server's end of all of them,
`connection.py` a client's end of its own. Either reads on a thread of its own, so that acknowledgements and gradients
are taken while a sender is blocked, and says `Alive` when it has nothing else to say, so that a peer that is frozen can
be told from one that is busy.
"""

import logging
import time
from collections.abc import Callable

from halfpass.errors import InputError

LOG = logging.getLogger("halfpass")
CONTROL_BYTES = 1024  # that gRPC's own frames may have between two looks, also of a peer that does nothing
MOST_REFUSALS, REFUSALS_SECONDS = 50, 10.0  # lines in so many seconds
FIRST_WORD_SECONDS = 60.0  # of a wait, before it is logged
SERVICE, METHOD, STATUS, ANSWER = "halfpass.SplitLearning", "Session", "Status", "Answer"
STOP_SECONDS = 2.0
OVERHEAD_BYTES = 2**20  # of a message beyond the tensors that the window admits
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class FewRefusals(logging.Filter):
    """Of refusals, which strangers can cause at will, so many lines are logged in a while, and then how many more there
    were."""

    def __init__(self) -> None:
        super().__init__()
        self._since, self._said, self._more = 0.0, 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "event", None) != "refused":
            return True
        if time.monotonic() - self._since > REFUSALS_SECONDS:
            if self._more:
                record.msg, record.args = f"{record.getMessage()} (and {self._more} more before it)", ()
            self._since, self._said, self._more = time.monotonic(), 0, 0
        self._said += 1
        self._more += self._said > MOST_REFUSALS
        return self._said <= MOST_REFUSALS


LOG.addFilter(FewRefusals())


def check_address(address: str, place: str, *, encrypted: bool = False, insecure: bool = False) -> None:
    """Raises InputError where it is no HOST:PORT, or activations and labels would travel in the clear beyond this
    machine, and nobody has said that they may."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535 or not host:
        raise InputError(place, "HOST:PORT", repr(address), "for example 127.0.0.1:7465")
    if host not in LOOPBACK_HOSTS and not encrypted and not insecure:
        raise InputError(
            place, f"a loopback host ({', '.join(LOOPBACK_HOSTS)}) without TLS", repr(host),
            "make certificates with halfpass certs and give --tls.folder, or say --insecure",
        )  # fmt: skip


class Interrupted(Exception):
    """A wait was given up, because its process was told to leave."""


class Anew(Exception):
    """The run went on without this client, which is to begin anew with the server's next order."""


class Pulse:
    """When a peer was last heard of. A message that takes longer than the timeout to come is no silence, as long as
    more of it comes."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        """It was heard."""
        self.heard = time.monotonic()
        self._came: int | None = None  # bytes at the socket when it was last looked, since it was last heard

    def is_lost(self, timeout: float, bytes_that_came: Callable[[], int | None]) -> bool:
        """Whether it has been silent for longer than that; to be asked several times in half of it. Bytes are None
        where the system does not say."""
        if time.monotonic() - self.heard > timeout / 2:
            before, self._came = self._came, bytes_that_came()
            if before is not None and self._came is not None and self._came > before + CONTROL_BYTES:
                self.heard = time.monotonic()
        return time.monotonic() - self.heard > timeout


class Allowance:
    """So many of something at once, and then so many a second. For one thread at a time."""

    def __init__(self) -> None:
        self._spent, self._when = 0.0, time.monotonic()

    def take(self, at_once: float, a_second: float) -> bool:
        """One; False where that is too many."""
        now = time.monotonic()
        self._spent, self._when = max(0.0, self._spent - (now - self._when) * a_second), now
        if self._spent + 1 > at_once:
            return False
        self._spent += 1
        return True

    def give_back(self, count: float) -> None:
        """So many that were taken cost nothing."""
        self._spent = max(0.0, self._spent - count)


class Patience:
    """One wait for a peer that lives: after a minute, two, four and so on it is logged for whom."""

    def __init__(self) -> None:
        self._began, self._next = time.monotonic(), FIRST_WORD_SECONDS

    def tell(self, who: str, what: str) -> None:
        if (waited := time.monotonic() - self._began) > self._next:
            self._next *= 2
            known = {"event": "slow", "peer": who, "seconds": round(waited, 1)}
            line = "waiting for %s since %.0f s: %s is to come, and signs of life alone have"
            LOG.warning(line, who, waited, what, extra=known)


def channel_options(limit_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limit_bytes),
        ("grpc.max_send_message_length", limit_bytes),
        ("grpc.enable_http_proxy", 0),  # what is meant for loopback stays there, whatever http_proxy says
        ("grpc.so_reuseport", 0),  # or a second server would share the port instead of being told that it is in use
    ]


def heartbeat_seconds(timeout: float) -> float:
    return min(5.0, timeout / 4)
