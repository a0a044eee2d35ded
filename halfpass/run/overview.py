"""How far a server's run is, for whoever asks (`halfpass status`), and for Prometheus (`metrics.py`).

All of it is read when it is asked for, from what the server counts anyway; a step adds only its time to `Pace`.
"""

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from halfpass.config import Config
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.asking import MOST_CLIENTS
from halfpass.wire.hub import Hub, Look

RECENT_SECONDS = 60.0  # over which it is said how fast the run is
MARK_SECONDS = 1.0
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds, of a histogram


class Pace:
    """How many batches were learned from, and how long that took."""

    def __init__(self, clients: Iterable[int]) -> None:
        self.batches = dict.fromkeys(clients, 0)  # by client
        self.samples_of = dict.fromkeys(self.batches, 0)
        self.samples, self.seconds = 0, 0.0
        self.steps = [0] * (len(BOUNDS) + 1)  # that took up to each of the bounds and more than the one before
        self._done, self._part, self._latest = 0, 0.0, 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=round(RECENT_SECONDS / MARK_SECONDS) + 4)

    def add(self, client: int, samples: int, seconds: float, *, last: bool = True) -> None:
        """A batch, or a micro-batch: a batch is done with its `last` one."""
        self.samples += samples
        self.samples_of[client] += samples
        self.seconds += seconds
        self._part += seconds
        if not last:
            return
        now = self._latest = time.monotonic()
        if not self._marks:
            self._marks.append((now - self._part, 0))
        self.batches[client] += 1
        self.steps[bisect_left(BOUNDS, self._part)] += 1
        self._done, self._part = self._done + 1, 0.0
        if now - self._marks[-1][0] >= MARK_SECONDS:
            self._marks.append((now, self._done))

    def per_second(self) -> float:
        """Batches, of late."""
        now, marks = time.monotonic(), list(self._marks)
        if not marks or now - self._latest >= RECENT_SECONDS:
            return 0.0
        since, before = next((mark for mark in reversed(marks) if now - mark[0] >= RECENT_SECONDS), marks[0])
        return (self._done - before) / max(now - since, 1e-3)


@dataclass(frozen=True)
class Kept:
    """The newest checkpoint."""

    epoch: int  # from 1
    step: int  # of all clients' in that epoch
    when: float = field(default_factory=time.time)  # of day, for Prometheus
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    phase: str
    epoch: int  # from 1
    steps: Mapping[int, int]  # by client: of this epoch, up to which the server has learned from it
    loss: float  # of the server half, mean of this epoch so far
    kept: Kept | None


NOWHERE = Position("joining", 0, {}, float("nan"), None)


class Run(Protocol):
    """`server_process.ServerRun`."""

    steps: list[int]  # per epoch, by client
    pace: Pace

    def position(self) -> Position: ...


class Overview:
    """Of a run from the time when clients may join; there is a `hub` soon, and a `run` once all have."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hub: Hub | None = None
        self.run: Run | None = None
        self.name = ""
        self._began: tuple[float, float] | None = None  # when it was first looked at in training, and how much was done

    @property
    def position(self) -> Position:
        return NOWHERE if self.run is None else self.run.position()

    @property
    def pace(self) -> Pace:
        return Pace(()) if self.run is None else self.run.pace

    @property
    def steps(self) -> list[int]:
        return [] if self.run is None else self.run.steps

    def clients(self) -> list[Look]:
        return [] if self.hub is None else self.hub.look()

    def status(self) -> pb.StatusReply:
        """For whoever may join: no losses, no scores, no addresses."""
        at, looks, count = self.position, {look.client: look for look in self.clients()}, self.config.clients.count
        reply = pb.StatusReply(
            run=self.name, phase=at.phase, epoch=at.epoch, epochs=self.config.train.epochs,
            step=sum(at.steps.values()), steps=sum(self.steps), batches_per_second=self.pace.per_second(),
            clients_count=count, connected=sum(look.away is None for look in looks.values()),
        )  # fmt: skip
        reply.busy_seconds, reply.seconds_left = self.pace.seconds, self._seconds_left(at)
        if self.hub is not None and (waits := self.hub.waiting()) is not None:
            reply.waits_for[:], reply.waiting_seconds = waits[0][:MOST_CLIENTS], waits[1]
        if (kept := at.kept) is not None:
            ago = time.monotonic() - kept.since
            reply.checkpoint.CopyFrom(pb.Checkpoint(epoch=kept.epoch, step=kept.step, seconds_ago=ago))
        for k in range(min(count, MOST_CLIENTS)):
            said = pb.ClientStatus(client=k, state="not joined")
            if (look := looks.get(k)) is not None:
                state = "finished" if look.finished else "connected" if look.away is None else "away"
                state = "absent" if look.given_up else state
                said = pb.ClientStatus(
                    client=k, state=state, away_seconds=look.away or 0.0, received=look.received, applied=look.applied,
                    queued=look.queued, queued_bytes=look.queued_bytes, reconnections=look.reconnections,
                    step=at.steps.get(k, 0), steps=self.steps[k] if k < len(self.steps) else 0,
                    samples=self.pace.samples_of.get(k, 0), bytes_up=sum(look.up.values()),
                    bytes_down=sum(look.down.values()), waits=self._waits(at, look),
                )  # fmt: skip
            reply.clients.append(said)
        return reply

    def _waits(self, at: Position, look: Look) -> str:
        """For whom a client waits: "server", "clients" or "" where that is not known."""
        if look.away is not None or look.finished or at.phase != "training":
            return ""
        if look.held or (self.config.method == "conventional" and look.received > look.applied):
            return "server"
        done = {k: at.steps.get(k, 0) >= steps for k, steps in enumerate(self.steps)}
        through = done.get(look.client, False) and look.received == look.applied
        return "clients" if through and not all(done.values()) else ""

    def _seconds_left(self, at: Position) -> float:
        """Of the run, as fast as it has been since it was first asked for; 0 where that is not known."""
        if self.run is None or not at.epoch or not sum(self.steps):
            return 0.0
        done = (at.epoch - 1 + min(1.0, sum(at.steps.values()) / sum(self.steps))) / self.config.train.epochs
        began = self._began = self._began or (time.monotonic(), done)
        if done <= began[1]:
            return 0.0
        return (time.monotonic() - began[0]) / (done - began[1]) * max(0.0, 1 - done)
