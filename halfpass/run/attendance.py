"""Who takes part in a run between processes, when. All clients do all the time, unless `clients.quorum` of them are
enough: then they may come late, be lost, come back and leave early. What an operator sees of it:
docs/how-to/some-clients-away.md.

Each half's schedule of learning rates counts the steps that this half has been through, and what those that are there
have still to do: a client that is never there leaves no trace.
"""

from collections.abc import Collection, Mapping
from typing import Any

from halfpass.config import Config
from halfpass.run.roles import Clients
from halfpass.run.rounds import Schedule
from halfpass.wire import halfpass_pb2 as pb

Where = dict[str, int | None]  # epoch and round, from 1; behind an epoch's rounds None: in its test, or at the end


class Attendance:
    """Who is there, what an epoch has of each, and who was absent when."""

    def __init__(self, config: Config, hub: Clients, joins: Mapping[int, pb.Join]) -> None:
        """`joins`: of all that have joined, which may become more."""
        self._hub, self._joins, self._config = hub, joins, config
        self._recipe, self._clients = config.train, config.clients
        self.steps = [0] * config.clients.count  # per epoch, by client; 0 of one that has never joined
        self.trained = [0] * config.clients.count  # steps of each that its client half, or the shared one, has in it
        self._meet()
        here: Where = {"epoch": 1, "round": 1}
        self._here = here  # how far clients have been told to go
        self.absent: list[dict[str, Any]] = [
            {"client": k, "why": "it had not joined", "from": here, "to": None}
            for k in range(config.clients.count) if k not in joins
        ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        return {"trained": self.trained, "absent": self.absent, "here": self._here}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.trained, self._here = list(state["trained"]), state["here"]
        self.absent = [dict(entry) for entry in state["absent"]]

    def _meet(self) -> None:
        for k, join in list(self._joins.items()):
            self.steps[k] = join.steps
        self.schedule = Schedule(self._config, self.steps)

    def call(self, epoch: int, turn: int) -> set[int]:
        """The clients that are there for a turn of an epoch, both from 0, or for what is behind its last one; some of
        them are back."""
        there = {k for k in range(len(self.steps)) if self._hub.present(k)}
        if any(self.steps[k] == 0 for k in there):
            self._meet()
        for entry in self.absent:
            if entry["client"] in there and entry["to"] is None:
                entry["to"] = self._here
        self._here = self._where(epoch, turn)
        return there

    def lose(self, client: int, why: str, epoch: int, turn: int) -> None:
        """The run goes on without the client, from that turn on."""
        self._hub.give_up(client)
        self.absent.append({"client": client, "why": why, "from": self._where(epoch, turn), "to": None})

    def _where(self, epoch: int, turn: int) -> Where:
        behind = turn == self.schedule.count
        return {"epoch": epoch + 1, "round": None if behind else 1 if self._clients.topology == "relay" else turn + 1}

    def left(self, clients: Collection[int], epoch: int, turn: int) -> int:
        """Steps that those have to do from that turn to the end."""
        return self.schedule.left(clients, epoch, turn)

    def place(self, client: int, there: Collection[int], epoch: int, turn: int) -> tuple[int, int]:
        """(number of the client's first step of the epoch, number of all steps) in its learning-rate schedule."""
        if self._clients.topology == "relay":  # one client half takes the steps of all
            done = sum(self.trained)
            return done, done + self.left(there, epoch, turn)
        epochs, steps = self._recipe.epochs, self.steps[client]
        if self._clients.topology == "splitfed":  # what they share has been through all rounds
            return epoch * steps, epochs * steps
        return self.trained[client], self.trained[client] + (epochs - epoch) * steps
