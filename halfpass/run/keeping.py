"""What a server keeps of its run, to go on with: checkpoints, and in them how far each client's messages are."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfpass.config import Config
from halfpass.errors import RunError
from halfpass.run.checkpoint import not_kept
from halfpass.run.logs import Seldom
from halfpass.run.overview import Kept
from halfpass.run.records import RunFolder
from halfpass.run.roles import Clients
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.hub import Peer
from halfpass.wire.outbox import Outbox

LOG = logging.getLogger("halfpass")


class Keeper:
    """Writes checkpoints, every so many steps and when it is told to."""

    def __init__(self, config: Config, hub: Clients, folder: RunFolder | None, run: str) -> None:
        """`folder` is None where nothing is kept. `run` names the run."""
        self._config, self._hub, self._folder, self._run = config, hub, folder, run
        self._since = 0  # steps since the last one
        self._applied: dict[int, int] = {}  # places of clients' messages that are in it
        self._seldom = Seldom()
        self.newest: Kept | None = None

    def load(self, peers: Mapping[int, Mapping[str, Any]]) -> None:
        """An earlier process has kept this of the clients."""
        self._applied = {k: peer["applied"] for k, peer in peers.items()}

    def count(self) -> bool:
        """One more step; whether a checkpoint is due."""
        every = self._config.checkpoint.every
        self._since += 1
        return self._folder is not None and every is not None and self._since >= every

    def save(self, epochs: int, state: Callable[[], Mapping[str, Any]], at: tuple[int, int]) -> None:
        """Behind so many epochs, `at` (epoch from 1, step of all clients'). Where there is no room for it, the one
        before stays, and the training goes on."""
        try:
            self.write(epochs, state, at)
        except RunError as error:
            not_kept(error)

    def write(self, epochs: int, state: Callable[[], Mapping[str, Any]], at: tuple[int, int]) -> None:
        """As `save`; raises RunError where there is no room."""
        self._since = 0
        if self._folder is None:
            return
        began, kept = time.perf_counter(), state()  # which is where the clients' spools are written too
        self._folder.save_checkpoint(self._config, epochs, kept, self._run)
        before, self._applied = self._applied, {k: peer["applied"] for k, peer in kept["peers"].items()}
        self._hub.kept(before)  # what the older of the two checkpoints has
        seconds, self.newest = time.perf_counter() - began, Kept(*at)
        known = {"event": "checkpoint", "epoch": at[0], "step": at[1], "seconds": seconds}
        LOG.log(self._seldom.level(), "checkpoint in epoch %d, behind step %d, %.2f s", *at, seconds, extra=known)


def as_tensor(data: bytes) -> Tensor:
    """For a checkpoint, in which PyTorch would write each byte as a character."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The inverse of `as_tensor`."""
    return bytes(tensor.numpy().tobytes())


def peer_state(peer: Peer) -> dict[str, Any]:
    """What is kept of a client: how far its messages have been worked off, and what of the server's it may need."""
    peer.outbox.save()
    peer.outbox.sync()
    taken_before = max(0, -peer.ended)  # ends that were worked off, and not yet taken
    return {
        "applied": peer.applied, "ended": peer.ended, "meter": peer.meter.state(), "sockets": peer.sockets,
        "ends": [as_tensor(end.SerializeToString()) for end in list(peer.ends)[:taken_before]],
        "finished": peer.finished and peer.applied >= peer.received,
        "last": peer.outbox.last, "durable": peer.outbox.durable, "given_up": peer.given_up, "anew": peer.anew,
    }  # fmt: skip


def peer_of(client: int, outbox: Outbox, state: Mapping[str, Any]) -> Peer:
    """The inverse of `peer_state`; `outbox` is empty. Raises InputError where its spool has not what it should."""
    outbox.load(state["last"], state["durable"])
    peer = Peer(
        client, outbox, received=state["applied"], taken=state["applied"], applied=state["applied"],
        ended=state["ended"], known_ends=max(0, state["ended"]), sockets=state["sockets"] and tuple(state["sockets"]),
        finished=state["finished"], given_up=state["given_up"], anew=state["anew"],
    )  # fmt: skip
    peer.meter.load_state(state["meter"])
    peer.ends.extend(pb.EpochEnd.FromString(as_bytes(end)) for end in state["ends"])
    return peer
