"""A run between processes while it goes on, as a table: who is how far, how fast, and who waits for whom.

It is made of two answers to `halfpass status`, one behind the other; the server shows it above its bar, and
`halfpass status --watch` asks for it. Tests: tests/test_live.py.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from halfpass.errors import printable
from halfpass.wire import halfpass_pb2 as pb

LOOK_SECONDS = 0.5  # from one look to the next
RECENT_SECONDS = 10.0  # over which speeds are
WORTH_SECONDS = 1.0  # a shorter wait is none
COLUMNS = ("process", "state", "step", "samples/s", "bytes/s", "total", "down", "lag", "waits for")
NEEDED = ("process", "step", "lag", "waits for", "samples/s", "bytes/s", "total", "state", "down")  # most wanted first
LEAST_WAITS = 15  # columns, of the only one that may be cut


class LiveTable:
    """Called for a terminal of so many columns and lines."""

    def __init__(self, ask: Callable[[], pb.StatusReply]) -> None:
        self._ask = ask
        self._looks: deque[tuple[float, pb.StatusReply]] = deque()
        self._widths = {name: len(name) for name in COLUMNS}  # only grow, or columns would come and go
        self._waits: dict[int, tuple[str, float]] = {}  # by client: for whom, since when

    def __call__(self, columns: int, lines: int) -> Table:
        now = time.monotonic()
        if not self._looks or now - self._looks[-1][0] >= LOOK_SECONDS:
            self.add(now, self._ask())
        return self.table(columns, lines)

    def add(self, now: float, reply: pb.StatusReply) -> None:
        """One more answer, of that time."""
        self._looks.append((now, reply))
        while len(self._looks) > 2 and now - self._looks[1][0] >= RECENT_SECONDS:
            self._looks.popleft()
        for client in reply.clients:
            if self._waits.get(client.client, ("", 0.0))[0] != client.waits:
                self._waits[client.client] = client.waits, now

    def table(self, columns: int, lines: int) -> Table:
        reply = self._looks[-1][1]
        clients, room = list(reply.clients), max(1, lines - 5)
        shown = clients if len(clients) < room else sorted(clients, key=_interest)[: max(0, room - 2)]
        rows = [self._client(client) for client in sorted(shown, key=lambda client: client.client)]
        if (more := reply.clients_count - len(shown)) > 0:
            rows.append({name: f"{more} more" if name == "process" else "" for name in COLUMNS})
        rows.append(self._server())
        for name, width in self._widths.items():
            self._widths[name] = max(width, *(len(row[name]) for row in rows))
        return _drawn(rows, self._widths | {"waits for": LEAST_WAITS}, columns, _title(reply))

    def _client(self, client: pb.ClientStatus) -> dict[str, str]:
        before, seconds = self._before(client.client)
        since = f" for {seconds_said(client.away_seconds)}" if client.state in ("away", "absent") else ""
        whom, when = self._waits.get(client.client, ("", 0.0))
        waited = self._looks[-1][0] - when
        waits = f"{printable(whom)}, {seconds_said(waited)}" if whom and waited >= WORTH_SECONDS else ""
        return {
            "process": f"client {client.client}", "state": printable(client.state) + since,
            "step": f"{client.step:,}/{client.steps:,}",
            "samples/s": _rate(client.samples - before.samples, seconds),
            "bytes/s": bytes_said((client.bytes_up - before.bytes_up) / seconds) if seconds else "–",
            "total": bytes_said(client.bytes_up), "down": bytes_said(client.bytes_down),
            "lag": f"{client.received - client.applied:,}",
            "waits for": waits or (f"({printable(client.state)}{since})" if client.state != "connected" else ""),
        }  # fmt: skip

    def _server(self) -> dict[str, str]:
        (then, old), (now, reply) = self._looks[0], self._looks[-1]
        seconds, samples = now - then, sum(c.samples for c in reply.clients) - sum(c.samples for c in old.clients)
        up = sum(c.bytes_up for c in reply.clients)
        waits = ""
        if reply.waits_for and reply.waiting_seconds >= WORTH_SECONDS:
            whom = ", ".join(map(str, reply.waits_for[:4])) + (", …" if len(reply.waits_for) > 4 else "")
            waits = f"client {whom}, {seconds_said(reply.waiting_seconds)}"
        busy = (reply.busy_seconds - old.busy_seconds) / seconds if seconds else 0.0
        return {
            "process": "server", "state": f"busy {min(1.0, busy):.0%}" if seconds else "",
            "step": f"{reply.step:,}/{reply.steps:,}", "samples/s": _rate(samples, seconds),
            "bytes/s": bytes_said((up - sum(c.bytes_up for c in old.clients)) / seconds) if seconds else "–",
            "total": bytes_said(up), "down": bytes_said(sum(c.bytes_down for c in reply.clients)),
            "lag": f"{sum(c.received - c.applied for c in reply.clients):,}", "waits for": waits,
        }  # fmt: skip

    def _before(self, client: int) -> tuple[pb.ClientStatus, float]:
        """What was known of it then, and how many seconds ago that is."""
        then, reply = self._looks[0]
        found = next((known for known in reply.clients if known.client == client), pb.ClientStatus())
        return found, self._looks[-1][0] - then


def _drawn(rows: Sequence[Mapping[str, str]], widths: Mapping[str, int], columns: int, title: str) -> Table:
    """With those columns for which there is room; numbers are whole."""
    names, room = set[str](), columns
    for name in NEEDED:
        if (room := room - widths[name] - 2) < 0:
            break
        names.add(name)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False, title=Text(title),
                  title_justify="left")  # fmt: skip
    for name in (chosen := [name for name in COLUMNS if name in names]):
        left = name in ("process", "state", "waits for")
        table.add_column(name, justify="left" if left else "right", min_width=widths[name], no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[name]) for name in chosen))
    return table


def _title(reply: pb.StatusReply) -> str:
    if not reply.epoch:
        missing = reply.clients_count - reply.connected
        return f"{printable(reply.phase)}: waiting for {missing} more client(s)"
    left = f", about {seconds_said(reply.seconds_left)} left" if reply.seconds_left > 0 else ""
    return f"{printable(reply.phase)}: epoch {reply.epoch} of {reply.epochs}{left}"


def _interest(client: pb.ClientStatus) -> tuple[bool, int, int]:
    """Those first that hold the run up."""
    return client.state == "connected", client.step - client.steps, client.applied - client.received


def _rate(count: float, seconds: float) -> str:
    return f"{max(0.0, count / seconds):,.0f}" if seconds else "–"


def bytes_said(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{max(0.0, count):.0f} B"


def seconds_said(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
