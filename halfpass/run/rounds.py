"""Who trains when, and who holds the newest client half: the three topologies, the same for either runtime."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from halfpass.algorithm.handover import average_weights


def turns(topology: str, steps: Sequence[int], rounds: int) -> list[dict[int, int]]:
    """The turns of an epoch: each one's clients, and up to which of its steps each goes on, given all their numbers of
    batches. One after the other in a relay, else all of them at once, in `rounds` even parts."""
    if topology == "relay":
        return [{k: count} for k, count in enumerate(steps)]
    return [{k: _end_of_round(count, r, rounds) for k, count in enumerate(steps)} for r in range(rounds)]


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


def testers(topology: str, clients: int, *, own_data: bool) -> list[int]:
    """The clients that bring a test set: one that holds the shared client half, or each where halves or data differ."""
    if topology == "independent" or own_data:
        return list(range(clients))
    return [clients - 1] if topology == "relay" else [0]


def schedule_position(topology: str, steps: Sequence[int], client: int, epoch: int, epochs: int) -> tuple[int, int]:
    """(number of a client's first step of an epoch, number of all steps) in the learning-rate schedule.

    In a relay there is one client half, which takes the steps of all clients.
    """
    if topology == "relay":
        return epoch * sum(steps) + sum(steps[:client]), epochs * sum(steps)
    return epoch * steps[client], epochs * steps[client]


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
