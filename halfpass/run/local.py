"""The whole path in one process: the file to read first.

data → client half → CutBatch → codec → loopback → codec → server half → rows. Clients take their batches in turn, in
the order (step, client), which is also the order of `processes`: equal seeds give equal weights.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.algorithm.server import Server
from halfpass.config import Config
from halfpass.data.batches import test_batches, train_batches
from halfpass.data.datasets import Dataset, Samples
from halfpass.errors import RunError
from halfpass.run import setup
from halfpass.run.above import Above
from halfpass.run.checkpoint import not_kept
from halfpass.run.edge import LocalLink
from halfpass.run.epoch import ClientEpoch, Score, Tally, Test, Values, handed_over, take_over, test_epoch
from halfpass.run.epochs import run_epochs
from halfpass.run.network import Network, above_edge, network_of
from halfpass.run.records import RunFolder, Wires, result
from halfpass.run.replay import Lessons
from halfpass.run.rounds import Handover, Schedule, chosen, in_turn, schedule_position, testers
from halfpass.run.signature import signature_of, write_signature
from halfpass.run.uplink import Uplink
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.loopback import Loopback
from halfpass.wire.messages import read_weights, write_batch, write_weights
from halfpass.wire.meter import Meter
from halfpass.wire.store import UploadStore


class LocalRun:
    """Clients, server and the wires between them. `train` and `test` are one epoch each, `finish` comes last."""

    def __init__(
        self, config: Config, data: Dataset | Sequence[Dataset], shards: list[Samples], network: Network,
        store: UploadStore | None = None, link: Callable[[Server, list[int]], Above] | None = None,
    ) -> None:  # fmt: skip
        """`data`: of all clients, or each one's. `link` makes what is above the server, where that is an edge: of it,
        and its clients' steps per epoch."""
        self.config, self.task = config, network.task
        self.clients = [setup.build_client(config, network, k) for k in range(config.clients.count)]
        self.server = setup.build_server(config, network)
        device = self.server.arithmetic.device
        self.shards = [shard.to(device) for shard in shards]
        self.sites = [data] if isinstance(data, Dataset) else list(data)  # one for all, or by client
        self.test_samples = [site.test.to(device) for site in self.sites]
        self.wires = [Loopback(config.wire.codec) for _ in self.clients]
        self.steps = setup.steps_per_epoch(config, shards)
        self.uplinks = [Uplink(config, steps) for steps in self.steps]
        self.above = Above() if link is None else link(self.server, self.steps)
        self.lessons = Lessons(config, self.server, store, self.above)
        self.has_trained, self.seconds_before, self.watch = False, 0.0, None
        self.handover = Handover(config.clients.topology, config.clients.count)

    def train(self, epoch: int, after_step: Callable[[], None]) -> tuple[dict[int, Tally], Tally]:
        """Trains one epoch of every client; returns the clients' tallies and the server's."""
        self.lessons.after_step = after_step
        self.above.begin(epoch)
        server = Tally(self.server.arithmetic.device)
        epochs: dict[int, ClientEpoch] = {}
        schedule, everybody = Schedule(self.config, self.steps), range(len(self.clients))
        last = self.config.train.epochs - 1
        for number, turn in enumerate(schedule.of(epoch)):
            for k, part in turn.items():
                epochs[k] = self._begin(k, epoch, part.stop, epochs.get(k))
            behind, of_epoch = schedule.left(everybody, epoch, number + 1), schedule.left(everybody, last, 0)
            self.lessons.course.begin(turn, behind, of_epoch)
            active = set(turn)
            for k in in_turn(turn, active):
                if not self._upload(k, epochs[k], turn[k].stop, server):
                    active.remove(k)
            self.lessons.course.end()
            self.handover.take({k: self._end(k, epoch) for k in turn})
        self.lessons.end_epoch(epoch, server)
        return {k: client.tally for k, client in epochs.items()}, server

    def _upload(self, k: int, client: ClientEpoch, until: int, served: Tally) -> bool:
        """Client steps until one of its batches has gone up: the wire, the server's step, and what comes back. False at
        the end of the client's epoch or round, step `until`."""
        while (batch := client.forward(until)) is not None:
            self.has_trained = True
            messages = self.uplinks[k].messages(batch, client.tally)
            for message in messages:
                received, upload = self.wires[k].batch(message)
                gradients = self.lessons.learn(received, upload, served)
                if gradients is None:
                    self.wires[k].ack()
                else:
                    client.backward(self.wires[k].gradients(received, gradients))
            if messages and batch.last:
                return True
        return False

    def _begin(self, k: int, epoch: int, until: int, begun: ClientEpoch | None) -> ClientEpoch:
        """A client takes over the newest client half, where it is another's, and starts on its shard, or goes on."""
        recipe = self.config.train
        first, total = schedule_position(self.config.clients.topology, self.steps, k, epoch, recipe.epochs)
        begin = pb.Begin(
            epoch=epoch, first_step=first, total_steps=total, until=until, return_weights=self.handover.needed,
            weights=write_weights(self.handover.give(k)),
        )  # fmt: skip
        received = self.wires[k].down(pb.ServerMessage(begin=begin)).begin
        take_over(self.config, self.clients[k], read_weights(received.weights))
        if begun is None:
            batches = train_batches(
                self.sites[self._site(k)], self.shards[k], recipe.batch_size, seed=recipe.seed, client=k, epoch=epoch
            )
            begun = ClientEpoch(self.config, self.clients[k], batches, epoch, first, total)
        return begun

    def _end(self, k: int, epoch: int) -> dict[str, Any]:
        """A client's epoch, or a round of it, is over: the weights that it gives back, where any are handed over."""
        weights = write_weights(handed_over(self.config, self.clients[k])) if self.handover.needed else []
        end = pb.ClientMessage(epoch_end=pb.EpochEnd(epoch=epoch, weights=weights))
        return read_weights(self.wires[k].up(end).epoch_end.weights)

    def test(self, epoch: int) -> tuple[Score, dict[int, Values]]:
        """(the test's score, the auxiliary head's by client), by the same way as training, codec included."""
        own_data = self.config.clients.partition == "own"
        trained = chosen(self.config.clients, self.config.train.seed, epoch)
        clients = testers(self.config.clients.topology, len(self.clients), trained, own_data=own_data)
        score, auxiliary = Score(self.task, clients), dict[int, Values]()
        self.above.begin_test(epoch)
        self.server.half.eval()
        for k in clients:
            if weights := self.handover.give(k):
                taken = self.wires[k].down(pb.ServerMessage(take=pb.Take(weights=write_weights(weights)))).take
                take_over(self.config, self.clients[k], read_weights(taken.weights))
            self.wires[k].down(pb.ServerMessage(test=pb.Test(epoch=epoch)))
            site = self._site(k)
            batches = test_batches(self.sites[site], self.test_samples[site], self.config.train.at_once)
            test_of_head: Test | None = None
            for batch, test_of_head in test_epoch(self.clients[k], batches, epoch, self.task):  # noqa: B007
                received, upload = self.wires[k].batch(write_batch(batch, self.config.wire.codec, test=True))
                self.lessons.test(received, upload, score)
                self.wires[k].ack(test=True)
            if test_of_head is not None:
                auxiliary[k] = test_of_head.values()
        self.server.half.train()
        self.above.end_test(epoch, score)
        return score, auxiliary

    def _site(self, client: int) -> int:
        return client if len(self.sites) > 1 else 0

    def state(self) -> dict[str, Any]:
        """All that the coming epochs depend on; what they draw at random depends on seed, epoch and step alone."""
        return {
            "clients": [training_state(client.optimizer, client.half, client.head) for client in self.clients],
            "server": training_state(self.server.optimizer, self.server.half),
            "handover": self.handover.state(), "meters": [wire.meter.state() for wire in self.wires],
            "spent_bytes": [uplink.spent_bytes for uplink in self.uplinks],
            "lessons": self.lessons.state(), "above": self.above.state(),
        }  # fmt: skip

    def ready(self, folder: RunFolder) -> None:
        """Nothing: before its first epoch there is nothing that it would not begin with."""

    def keep(self, folder: RunFolder, epochs: int) -> None:
        try:
            folder.save_checkpoint(self.config, epochs, self.state())
        except RunError as error:
            not_kept(error)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for client, values in zip(self.clients, state["clients"], strict=True):
            load_training_state(values, client.optimizer, client.half, client.head)
        load_training_state(state["server"], self.server.optimizer, self.server.half)
        self.handover.load_state(state["handover"])
        for wire, uplink, meter, spent in zip(
            self.wires, self.uplinks, state["meters"], state["spent_bytes"], strict=True
        ):
            wire.meter.load_state(meter)
            uplink.spent_bytes = spent
        self.lessons.load_state(state["lessons"])
        self.above.load_state(state["above"])
        self.has_trained = True

    def meters(self) -> dict[int, Meter]:
        return {k: wire.meter for k, wire in enumerate(self.wires)}

    def sockets(self) -> dict[int, None]:
        return dict.fromkeys(range(len(self.wires)))

    def finish(self) -> None:
        """Every client takes the final client half, where it is shared."""
        for k, client in enumerate(self.clients):
            finish = pb.Finish(weights=write_weights(self.handover.give(k)))
            received = self.wires[k].down(pb.ServerMessage(finish=finish)).finish
            take_over(self.config, client, read_weights(received.weights))


def train_local(
    config: Config, folder: RunFolder, sites: Sequence[Dataset], shards: list[Samples], network: Network
) -> dict[str, Any]:
    """Trains by a split method in this process and writes the run folder; returns what `result.json` holds. Where the
    folder has kept the state of such a run, goes on with that."""
    if config.model.edge_cut is None:
        with setup.open_store(config, network, old=folder.has_checkpoint) as store:
            return _train_link(config, folder, LocalRun(config, sites, shards, network, store), network)
    edge, top = dataclasses.replace(config, out=str(folder.path / "edge")), above_edge(config)
    old, edge_folder = folder.has_checkpoint, folder.part("edge", edge)
    plans = {"cut": network.plans.get("edge_cut")}
    first = sites if isinstance(sites, Dataset) else sites[0]
    upper = network_of(top, first, network.task, plans)
    with setup.open_store(edge, network, old=old) as store, setup.open_store(top, upper, old=old) as upper_store:
        link = partial(LocalLink, config, network=upper, folder=folder, store=upper_store)
        run = LocalRun(edge, sites, shards, network, store, link)
        assert isinstance(run.above, LocalLink)
        with folder.tracked(config):
            try:
                _train_link(edge, edge_folder, run, network)
            finally:
                if run.has_trained:
                    run.above.save()
            return run.above.result()


def _train_link(config: Config, folder: RunFolder, run: LocalRun, network: Network) -> dict[str, Any]:
    """The clients, and the server or edge that is next to them."""
    with folder.tracked(config):
        try:
            rows = run_epochs(config, run, folder)
            run.finish()
        finally:  # what was trained is kept, whatever happened
            if run.has_trained:
                _save(config, folder, run, network)
        wires = Wires(list(run.meters().values()), None)
        return folder.finish(result(config, network.task, network.cut, rows, wires, folder.environment))


def _save(config: Config, folder: RunFolder, run: LocalRun, network: Network) -> None:
    """All halves, by one name, so that those of another run are not taken for theirs."""
    name = secrets.token_hex(8)
    signatures = [write_signature(signature_of(config, network, name, site)) for site in run.sites]
    for client in run.clients:
        folder.save_client(client, config, signatures[min(client.index, len(signatures) - 1)])
    folder.save_server(run.server, config, write_signature(signature_of(config, network, name)))
