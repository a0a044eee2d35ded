"""Who trains when, and who holds the newest client half: the three topologies, the same for either runtime."""

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from halfpass.algorithm.handover import average_weights
from halfpass.config import ClientsConfig, Config
from halfpass.seed import derive_seed

Turn = Mapping[int, range]  # by client, of its steps in the epoch


def chosen(config: ClientsConfig, seed: int, epoch: int) -> Sequence[int]:
    """The clients that take part in an epoch: all, or so many of them, drawn for that epoch without replacement."""
    if config.sample is None:
        return range(config.count)
    draws = random.Random(derive_seed(seed, "clients", epoch))
    return sorted(draws.sample(range(config.count), config.sample))


def turns(topology: str, steps: Sequence[int], rounds: int, clients: Iterable[int] | None = None) -> list[Turn]:
    """The turns of an epoch: each one's clients, and the steps that each takes, given all their numbers of batches. One
    after the other in a relay, else all of them at once, in `rounds` even parts. `clients`: of them, if not all."""
    clients = range(len(steps)) if clients is None else list(clients)
    if topology == "relay":
        return [{k: range(steps[k])} for k in clients]
    return [{k: _of_round(steps[k], r, rounds) for k in clients} for r in range(rounds)]


class Schedule:
    """The turns of every epoch, given all clients' numbers of batches."""

    def __init__(self, config: Config, steps: Sequence[int]) -> None:
        self._config, self._steps = config, list(steps)
        self.count = len(self.of(0))  # turns of each epoch

    @lru_cache(maxsize=8)  # noqa: B019  # as many of these as there are runs
    def of(self, epoch: int) -> list[Turn]:
        clients = self._config.clients
        who = chosen(clients, self._config.train.seed, epoch)
        return turns(clients.topology, self._steps, clients.rounds, who)

    def left(self, clients: Collection[int], epoch: int, turn: int) -> int:
        """Steps of those clients from that turn of an epoch to the end of the last."""
        epochs = self._config.train.epochs
        this = sum(len(part) for parts in self.of(epoch)[turn:] for k, part in parts.items() if k in clients)
        if self._config.clients.sample is None:  # all epochs are alike
            return this + (epochs - epoch - 1) * sum(self._steps[k] for k in clients)
        return this + sum(
            self._steps[k] for e in range(epoch + 1, epochs) for turn in self.of(e) for k in turn if k in clients
        )


def _of_round(steps: int, r: int, rounds: int) -> range:
    return range(_end_of_round(steps, r - 1, rounds), _end_of_round(steps, r, rounds))


def _end_of_round(steps: int, r: int, rounds: int) -> int:
    return steps * (r + 1) // rounds


def in_turn(turn: Collection[int], active: Collection[int]) -> Iterator[int]:
    """The clients of a turn, round and round, as long as they are in `active`, which shrinks meanwhile."""
    while active:
        for client in turn:
            if client in active:
                yield client


def place_in_epoch(topology: str, steps: Sequence[int], rounds: int, client: int, step: int) -> int:
    """How many batches of an epoch come before a client's `step` in the order (round, step in it, client), or turn by
    turn in a relay, given each client's number of batches."""
    if topology == "relay":
        return sum(steps[:client]) + step
    r = -(-rounds * (step + 1) // steps[client]) - 1  # the first round that ends behind this step
    begins = [_end_of_round(count, r - 1, rounds) for count in steps]
    ends = [_end_of_round(count, r, rounds) for count in steps]
    inside = step - begins[client]
    return sum(min(end, begin + inside + (k < client)) for k, (begin, end) in enumerate(zip(begins, ends, strict=True)))


def testers(topology: str, clients: int, trained: Sequence[int], *, own_data: bool) -> list[int]:
    """The clients that bring a test set: one that holds the shared client half, or each where halves or data differ.
    `trained`: who has, in the epoch before the test."""
    if topology == "independent" or own_data:
        return list(range(clients))
    return [clients - 1] if topology == "relay" else [trained[0]]


def schedule_position(topology: str, steps: Sequence[int], client: int, epoch: int, epochs: int) -> tuple[int, int]:
    """(number of a client's first step of an epoch, number of all steps) in the learning-rate schedule.

    In a relay there is one client half, which takes the steps of all clients.
    """
    if topology == "relay":
        return epoch * sum(steps) + sum(steps[:client]), epochs * sum(steps)
    return epoch * steps[client], epochs * steps[client]


class Course:
    """Where the server half is in its learning-rate schedule, which has a slot for each step of a client, uploaded or
    not: those that were trained, and those that the clients that are there have still to take. Where all are there all
    the time, these are the places in all epochs."""

    def __init__(self) -> None:
        self.turn: dict[int, range] = {}  # that goes on, or what is left of it since a client was lost
        self.done = self.left = 0  # slots before it, and from its begin to the end
        self.epoch = 0  # slots of an epoch of the clients that are there

    def begin(self, turn: Turn, behind: int, epoch: int) -> None:
        """A turn, with so many slots behind it, and of an epoch."""
        self.turn, self.left, self.epoch = dict(turn), sum(map(len, turn.values())) + behind, epoch

    def slot(self, client: int, step: int) -> int:
        """In the order (step of the turn, client)."""
        own = self.turn[client]
        inside = max(0, min(step - own.start, len(own) - 1))
        return self.done + sum(min(len(part), inside + (k < client)) for k, part in self.turn.items())

    def end(self, reached: Mapping[int, int] | None = None) -> None:
        """Of the turn, or before its end, by the step that each client has reached."""
        steps = sum((part.stop if reached is None else reached[k]) - part.start for k, part in self.turn.items())
        self.done, self.left, self.turn = self.done + steps, self.left - steps, {}

    def state(self) -> dict[str, Any]:
        return {**vars(self), "turn": {k: (part.start, part.stop) for k, part in self.turn.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, turn={k: range(*part) for k, part in state["turn"].items()})


class Handover:
    """The newest shared client half, and which clients hold it already.

    With one client, or with independent ones, nothing is ever handed over.
    """

    def __init__(self, topology: str, clients: int) -> None:
        self.needed = topology != "independent" and clients > 1
        self._relay = topology == "relay"
        self._newest: dict[str, Tensor] = {}
        self._holders: set[int] = set()

    def state(self) -> dict[str, Any]:
        return {"newest": self._newest, "holders": list(self._holders)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._newest, self._holders = dict(state["newest"]), set(state["holders"])

    def drop(self, client: int) -> None:
        """The client has perhaps not got what it was given."""
        self._holders.discard(client)

    def give(self, client: int) -> dict[str, Tensor]:
        """What `client` must load before it goes on; empty when it is up to date."""
        if client in self._holders:
            return {}
        self._holders.add(client)
        return self._newest

    def take(self, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """After a turn: what its clients gave back, by client (nothing where nothing is handed over)."""
        if not self.needed or not states:
            return
        if self._relay:
            ((client, state),) = states.items()
            self._newest, self._holders = dict(state), {client}
            return
        order = sorted(states)
        self._newest = average_weights([states[k] for k in order])
        self._holders = set()
