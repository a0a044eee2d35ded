"""What a site sees of its own client while it trains: on a terminal a line that is drawn anew, elsewhere, beside the
line per epoch, for how many others it waits at the start. Tests: tests/test_live.py.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc
from rich.console import Console
from rich.live import Live
from rich.text import Text

from halfpass.config import Config
from halfpass.run import children, logs
from halfpass.run.live import WORTH_SECONDS, seconds_said
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Look

LOG = logging.getLogger("halfpass")
ASK_SECONDS = 2.0  # from one question to the server, who is missing, to the next


class Training(Protocol):
    """`client_process.ClientRun`."""

    steps: int

    def progress(self) -> tuple[int, int, int, float]:
        """(epoch from 1, its steps done, its samples, its mean loss)"""


class Way(Protocol):
    """`wire.connection.Connection`."""

    waits: tuple[str, float] | None

    def look(self) -> Look: ...
    def ask(self) -> pb.StatusReply: ...


class SiteLine:
    """How far a client is, in one line, the most wanted thing first."""

    def __init__(self, run: Training, way: Way, epochs: int, index: int) -> None:
        self._run, self._way, self._epochs, self.index = run, way, epochs, index
        self.missing = 0  # others who have not joined
        self._began: tuple[float, float] | None = None  # when training was first seen, and the part that was done

    def text(self) -> str:
        (epoch, step, _, loss), look, now = self._run.progress(), self._way.look(), time.monotonic()
        parts = [f"client {self.index}"]
        if epoch:
            parts += [f"epoch {epoch}/{self._epochs}", f"step {step:,}/{self._run.steps:,}"]
            parts += [] if math.isnan(loss) else [f"loss {loss:.4f}"]
        if waits := self._waits(look, now, begun=epoch > 0):
            parts.append(waits)
        if (left := self._seconds_left(epoch, step, now)) is not None:
            parts.append(f"about {seconds_said(left)} left")
        if (behind := look.made - look.applied) > 0:
            parts.append(f"{behind:,} sent and not learned from")
        return ", ".join(parts)

    def _waits(self, look: Look, now: float, *, begun: bool) -> str:
        if look.away is not None:
            return f"the server is away for {seconds_said(look.away)}"
        if self.missing and not begun:
            return f"waiting for {self.missing} more client{'s' if self.missing > 1 else ''}"
        if (waits := self._way.waits) is not None and now - waits[1] >= WORTH_SECONDS:
            return f"waiting for the server since {seconds_said(now - waits[1])}"
        return ""

    def _seconds_left(self, epoch: int, step: int, now: float) -> float | None:
        """As fast as it has been in this process."""
        if not epoch:
            return None
        done = (epoch - 1 + min(1.0, step / self._run.steps)) / self._epochs
        began = self._began = self._began or (now, done)
        return None if done <= began[1] else (now - began[0]) / (done - began[1]) * (1 - done)


@contextmanager
def watched(run: Training, way: Way, config: Config, index: int) -> Iterator[None]:
    """Shows how far the client is meanwhile. Nothing of a command's child, whose parent shows the server's table."""
    if children.IS_CHILD:
        yield
        return
    line, over = SiteLine(run, way, config.train.epochs, index), threading.Event()
    threading.Thread(target=_find_who_is_missing, args=(line, run, way, over.wait), daemon=True).start()
    console = Console(stderr=True)
    try:
        if not console.is_terminal or logs.in_json():
            yield
            return
        shown = Live(
            get_renderable=lambda: Text(line.text(), no_wrap=True, overflow="ellipsis"), console=console,
            refresh_per_second=2, transient=True,
        )  # fmt: skip
        with shown:
            yield
    finally:
        over.set()


def _find_who_is_missing(line: SiteLine, run: Training, way: Way, over: Callable[[float], bool]) -> None:
    """Asks until training begins; says it where it has changed."""
    while not run.progress()[0]:
        try:
            reply = way.ask()
        except grpc.RpcError:  # the server is away, or will not say: then it is not known
            return
        missing = max(0, reply.clients_count - reply.connected) if reply.phase == "joining" else 0
        if missing != line.missing:
            line.missing = missing
            if missing:
                what = f"waiting for {missing} more client{'s' if missing > 1 else ''}"
                LOG.info("%s", what, extra={"event": "waiting", "client": line.index})
        if reply.phase != "joining" or over(ASK_SECONDS):
            return
