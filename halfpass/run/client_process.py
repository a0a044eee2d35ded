"""A client process: joins a server, trains its client half on its own data, and keeps what it learned.

It does what the server's messages say: Begin an epoch or a round of it, Test, Finish. Decoupled, it never waits within
one except for its window.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.algorithm.client import Client
from halfpass.config import Config, as_dict
from halfpass.cut import CutBatch
from halfpass.data.batches import batch_count, test_batches, train_batches
from halfpass.data.datasets import Dataset, Samples
from halfpass.errors import InputError, RunError
from halfpass.files import make_folder, write_json
from halfpass.run import checkpoint, children, metrics, setup
from halfpass.run.children import Left, for_peer, leaving
from halfpass.run.credentials import trust_of
from halfpass.run.epoch import (
    ClientEpoch,
    HandedOver,
    Tally,
    Test,
    Values,
    handed_over,
    take_over,
    tally_of,
    test_epoch,
)
from halfpass.run.logs import Seldom
from halfpass.run.memory import PeakMemory
from halfpass.run.network import Network, network_of, write_plans, written_spec
from halfpass.run.records import CHECKPOINT, JOINED, RunFolder, refuse_changes
from halfpass.run.roles import ToServer
from halfpass.run.rounds import chosen
from halfpass.run.signature import signature_of, write_signature
from halfpass.run.site import watched
from halfpass.run.uplink import Uplink
from halfpass.tasks.task import Task
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Connection
from halfpass.wire.messages import PROTOCOL, read_gradients, write_batch, write_weights
from halfpass.wire.outbox import Outbox
from halfpass.wire.reach import reach
from halfpass.wire.service import Anew, Interrupted, check_address
from halfpass.wire.trust import Trust

LOG = logging.getLogger("halfpass")
LONGEST_WAIT = 7 * 24 * 3600  # seconds for a server that is not there yet
WEIGHTS = "weights"  # among the settings that a client sends: digests of what it has loaded of either half
_LATER = ("run", "received", "first")  # of Join: what is said when a run is gone on with
DATA = "data"  # among the settings that a client sends: what its data must have in common with the others'


class ClientRun:
    """The client's side of a run; the same steps as `local.LocalRun` takes for one of its clients."""

    def __init__(
        self, config: Config, connection: ToServer, client: Client, data: Dataset, shard: Samples, task: Task,
        file: Path | None = None,
    ) -> None:  # fmt: skip
        """`file` keeps what the run can be gone on with."""
        self.config, self.connection, self.client, self.data, self.task = config, connection, client, data, task
        device = client.arithmetic.device
        self.shard, self.test_samples = shard.to(device), data.test.to(device)
        self.has_trained = False
        self.steps = self._steps = batch_count(len(shard), config.train.batch_size)  # per epoch
        self.uplink = Uplink(config, self._steps)
        self.memory = PeakMemory(client.arithmetic.device)
        self._epoch: ClientEpoch | None = None
        self._epochs = 0  # that are done
        self._anew = False  # the run went on without it, and it waits for its next order
        self._order: pb.Begin | None = None  # that is at work, without its weights
        self._file = file
        self._since = 0  # steps since the last checkpoint
        self._kept = 0  # place of the server's last message that is in it
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # training goes on while it writes
        self._writing: Future[None] | None = None
        self._handed_over = HandedOver(config, client)
        self._seldom = Seldom()

    def progress(self) -> tuple[int, int, int, float]:
        """(epoch from 1, its steps done, its samples, its mean loss), from another thread."""
        if (epoch := self._epoch) is None:
            return 0, 0, 0, math.nan
        return epoch.epoch + 1, epoch.tally.steps, epoch.tally.samples, epoch.tally.mean_loss

    def follow(self) -> None:
        """Until the server says Finish."""
        while True:
            try:
                return self._follow()
            except Anew:
                needed = self.config.clients.quorum is None
                self._hold_to(not needed, "a run that waits for this client", "one that went on without it")
                LOG.warning("the run goes on without this client, which takes part from its next turn on")
                self.connection.go_on_anew()
                self._order, self._epoch, self._anew = None, None, True

    def _follow(self) -> None:
        if self._order is not None:  # in which an earlier process was broken off
            self._go_on(self._order)
        while True:
            try:
                message = self.connection.receive("begin", "take", "test", "finish")
            except Interrupted:
                self._leave()
            kind = message.WhichOneof("kind")
            if kind == "begin":
                self._train(message.begin)
            elif kind == "take":
                self._take_over(message.take.weights)
            elif kind == "test":
                self._test(message.test)
            else:
                self._skip_epochs()
                ended = self._epochs == self.config.train.epochs or self._anew
                self._hold_to(ended, "the end", f"after {self._epochs} epochs")
                self._take_over(message.finish.weights)
                self.has_trained = self.has_trained or len(message.finish.weights) > 0  # others have
                return

    def _hold_to(self, holds: bool, what: str, found: str) -> None:
        """A server may ask for what the settings say, which both have agreed on, and for nothing else."""
        if not holds:
            expected = f"{what} as the settings have it: {self.config.train.epochs} epochs of {self._steps} steps"
            raise RunError("the server", expected, found, "do not trust it, or give both sides the same settings")

    def _take_over(self, weights: Sequence[pb.Tensor]) -> None:
        """Weights that the server hands on, where the settings have it hand on any."""
        if weights:
            take_over(
                self.config, self.client, self._handed_over.read("the server", weights, "look at the other clients")
            )  # fmt: skip

    def _train(self, begin: pb.Begin) -> None:
        self._check_begin(begin)
        self._take_over(begin.weights)
        if self._epoch is None or self._epoch.epoch != begin.epoch:  # else it goes on with it, in another round
            done = Tally(self.client.arithmetic.device, steps=begin.since)
            self._epoch, self._anew = self._epoch_of(begin, done), False
        self._order = pb.Begin()
        self._order.CopyFrom(begin)
        del self._order.weights[:]
        self._go_on(self._order)

    def _epoch_of(self, begin: pb.Begin, done: Tally | None = None) -> ClientEpoch:
        """The epoch, behind what has been done of it."""
        recipe, first = self.config.train, 0 if done is None else done.steps
        batches = train_batches(
            self.data, self.shard, recipe.batch_size, seed=recipe.seed, client=self.client.index, epoch=begin.epoch,
            first=first,
        )  # fmt: skip
        return ClientEpoch(
            self.config, self.client, batches, begin.epoch, begin.first_step, begin.total_steps, done
        )  # fmt: skip

    def _go_on(self, begin: pb.Begin) -> None:
        """Trains up to where the server has said, and says so."""
        epoch = self._epoch
        assert epoch is not None
        while (batch := epoch.forward(begin.until)) is not None:
            self.has_trained = True
            upload = partial(self.uplink.messages, batch, epoch.tally)
            if self.config.method == "decoupled":
                self.connection.send_in_turn(upload)
            else:  # with nothing to do beside it, another thread would only cost time
                self.connection.send(*upload())
            if self.config.returns_gradient(batch.step):
                reply = self.connection.receive("gradients").gradients
                epoch.backward(read_gradients(reply, batch))
            last = batch.last
            del batch, upload  # they are large, and the next step needs room
            if last:
                self._keep_if_due()
        self._epochs, self._order = begin.epoch + (begin.until == self._steps), None
        self.connection.send_in_turn(partial(self._epoch_end, begin, epoch.tally))
        if begin.until == self._steps:
            self._say_epoch(epoch)
            self.keep()

    def _say_epoch(self, epoch: ClientEpoch) -> None:
        tally, epochs = epoch.tally, self.config.train.epochs
        known = {
            "event": "epoch", "client": self.client.index, "epoch": epoch.epoch + 1, "epochs": epochs,
            "loss": tally.mean_loss, "samples": tally.samples, "seconds": tally.busy_seconds,
        }  # fmt: skip
        loss = "" if math.isnan(tally.mean_loss) else f": loss {tally.mean_loss:.4f}"
        line = "client %d: epoch %d/%d%s, %.1f s of computing"
        LOG.info(line, self.client.index, epoch.epoch + 1, epochs, loss, tally.busy_seconds, extra=known)

    # -- what is kept

    def _keep_if_due(self) -> None:
        self._since += 1
        if leaving():
            self._leave()
        every = self.config.checkpoint.every
        if every is not None and self._since >= every:
            self.keep()

    def _leave(self) -> NoReturn:
        self.keep()
        self.written()
        raise Left

    def keep(self) -> None:
        """A checkpoint, of what is now, written while the training goes on; where there is no room for it, the one
        before stays."""
        self._since = 0
        if self._file is None:
            return
        self.connection.drain()
        self.written()
        try:
            state = self.state()
            parts = checkpoint.pack(state["connection"]["run"], state)
        except RunError as error:
            checkpoint.not_kept(error)
            return
        epoch, step, *_ = self.progress()
        known = {"event": "checkpoint", "client": self.client.index, "epoch": epoch, "step": step}
        self._writing = self._disk.submit(self._write, parts, state["connection"]["taken"], known)

    def _write(self, parts: Sequence[bytes | memoryview], taken: int, known: dict[str, Any]) -> None:
        """On a thread of its own: first what the checkpoint needs to be there."""
        assert self._file is not None
        try:
            self.connection.outbox.sync()
            checkpoint.put(self._file, parts)
        except RunError as error:
            checkpoint.not_kept(error)
            return
        LOG.log(
            self._seldom.level(), "checkpoint in epoch %d, behind step %d", known["epoch"], known["step"], extra=known
        )
        self.connection.keep(self._kept)  # what the older of the two has
        self._kept = taken

    def written(self) -> None:
        """Until the last checkpoint is on the disk."""
        if self._writing is not None:
            self._writing.result()

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on, once all uploads are made."""
        epoch, order = self._epoch, self._order
        return {
            "settings": as_dict(self.config), "connection": self.connection.state(),
            "client": training_state(self.client.optimizer, self.client.half, self.client.head),
            "epochs": self._epochs, "anew": self._anew, "order": None if order is None else _fields(order),
            "epoch": None if epoch is None else {
                "begin": {"epoch": epoch.epoch, **epoch.place}, "tally": epoch.tally.state(),
            },
            "spent_bytes": self.uplink.spent_bytes, "has_trained": self.has_trained,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`, but for what the connection was made with."""
        load_training_state(state["client"], self.client.optimizer, self.client.half, self.client.head)
        self._epochs, self._anew, self.uplink.spent_bytes = state["epochs"], state["anew"], state["spent_bytes"]
        self._order = state["order"] and pb.Begin(**state["order"])
        if (epoch := state["epoch"]) is not None:
            done = tally_of(epoch["tally"], self.client.arithmetic.device)
            self._epoch = self._epoch_of(pb.Begin(**epoch["begin"]), done)
        self._kept, self.has_trained = state["connection"]["taken"], state["has_trained"]

    def _check_begin(self, begin: pb.Begin) -> None:
        epochs, done = self.config.train.epochs, 0
        if self._epoch is not None and self._epoch.epoch == begin.epoch == self._epochs:
            done = self._epoch.tally.steps
        if self._anew and self._epochs <= begin.epoch < epochs and begin.since <= self._steps:
            self._epochs, done = begin.epoch, begin.since
        self._skip_epochs()
        topology, needed = self.config.clients.topology, self.config.clients.quorum is None
        place, own = (begin.first_step, begin.total_steps), (self._epochs * self._steps, epochs * self._steps)
        left = begin.total_steps - begin.first_step  # from this epoch on
        if topology == "splitfed" or (topology == "independent" and needed):
            sound = place == own
        elif topology == "relay":  # one client half takes all clients' steps
            sound = left >= own[1] - own[0] and (begin.first_step >= own[0] or not needed)
        else:  # those in which it was absent are not counted
            sound = left == own[1] - own[0] and begin.first_step <= own[0]
        sound = sound and self._epochs == begin.epoch < epochs and done == begin.since <= begin.until <= self._steps
        self._hold_to(sound, "an epoch", f"epoch {begin.epoch} up to step {begin.until}, from {place[0]} of {place[1]}")

    def _skip_epochs(self) -> None:
        """Those that come and for which this client was not drawn."""
        clients, recipe = self.config.clients, self.config.train
        while self._epochs < recipe.epochs and self.client.index not in chosen(clients, recipe.seed, self._epochs):
            self._epochs += 1

    def _epoch_end(self, begin: pb.Begin, tally: Tally) -> list[pb.ClientMessage]:
        """To be made once all batches are: only then it is known how many went up."""
        weights = write_weights(handed_over(self.config, self.client)) if begin.return_weights else []
        end = pb.EpochEnd(
            epoch=begin.epoch, loss=tally.mean_loss, samples=tally.samples, busy_seconds=tally.busy_seconds,
            learning_rate=tally.learning_rate, peak_memory_bytes=self.memory.peak_bytes(), weights=weights,
            uploads=tally.uploads, withheld=tally.withheld,
        )  # fmt: skip
        return [pb.ClientMessage(epoch_end=end)]

    def _test(self, test: pb.Test) -> None:
        """Perhaps anew, where a stream was lost meanwhile; or by weights that were handed over, where this client was
        absent and no other can."""
        sound = (test.epoch + 1 == self._epochs or self._anew) and self.config.train.tests(test.epoch)
        self._hold_to(sound, "a test", f"one after epoch {test.epoch}, {self._epochs} are done")
        batches = test_batches(self.data, self.test_samples, self.config.train.at_once)
        of_head: Test | None = None
        for batch, of_head in test_epoch(self.client, batches, test.epoch, self.task):  # noqa: B007
            self.connection.send_in_turn(partial(encoded, batch, self.config.wire.codec, test=True))
        values = {} if of_head is None else of_head.values()
        end = end_of_test(test.epoch, len(self.test_samples), values, has_head=self.client.head is not None)
        self.connection.send_in_turn(lambda: [pb.ClientMessage(test_end=end)])


def end_of_test(epoch: int, samples: int, values: Values, *, has_head: bool) -> pb.TestEnd:
    """What a client, or an edge, says at the end of a test: its head's scores."""
    scores = [pb.Score(metric=metric, value=value) for metric, value in values.items()]
    return pb.TestEnd(epoch=epoch, samples=samples, has_head=has_head, scores=scores)


def encoded(batch: CutBatch, codec: str, *, test: bool) -> list[pb.ClientMessage]:
    """As `Connection.send_in_turn` has it made."""
    return [write_batch(batch, codec, test=test)]


def _fields(order: pb.Begin) -> dict[str, Any]:
    return {
        "epoch": order.epoch, "first_step": order.first_step, "total_steps": order.total_steps, "until": order.until,
        "return_weights": order.return_weights,
    }  # fmt: skip


def client_folder(run: Path, index: int) -> Path:
    """Where a client keeps what it can go on with."""
    return run / f"client-{index}"


def join(
    config: Config, address: str, index: int, *, insecure: bool = False, again: bool = False, wait: float = 0.0,
    register: metrics.Register = metrics.to_nobody,
) -> Path:  # fmt: skip
    """Takes part in one run as client `index`; returns the run folder that holds `client-INDEX.safetensors`. `insecure`
    lets it join a server on another machine without TLS. `again`: goes on where an earlier process was broken off, if
    there is a state of one. `wait`: seconds for which a server is waited for that is not there yet. `register` takes
    figures for Prometheus."""
    setup.check_index(config, index)
    if not 0 <= wait <= LONGEST_WAIT:
        raise InputError("--wait", f"0 to {LONGEST_WAIT} seconds", f"{wait:g}", "correct it")
    own, keeps = client_folder(config.folder, index), config.checkpoint.every != 0
    file, state = own / CHECKPOINT, None
    if again and not own.exists() and (config.folder / f"client-{index}.safetensors").is_file():
        LOG.warning("client %d of the run in %s has finished", index, config.folder)
        return config.folder
    if again and checkpoint.there(file):
        state = checkpoint.read(file)
        refuse_changes(file, config, state["settings"])
    folder = RunFolder(config.folder) if again else RunFolder.for_client(config.folder, index)
    setup.settle_process(config)
    setup.check_between_processes(config)
    trust = trust_of(config.tls, f"client-{index}")
    data, shard, network = _own_part(config, index)
    client = setup.build_client(config, network, index)
    if wait > 0:
        _wait_for_server(address, trust, wait, insecure)
    connection = connect(
        config, join_of_client(config, data, shard, network, index), address, f"client {index}", trust, insecure,
        folder=own / "spool" if keeps else None, state=None if state is None else state["connection"],
    )  # fmt: skip
    try:
        run = ClientRun(config, connection, client, data, shard, network.task, file if keeps else None)
        if state is not None:
            run.load_state(state)
        register(metrics.ClientFigures(connection, run))
        LOG.info("joined %s as client %d", address, index, extra={"event": "joined", "client": index})
        if keeps:
            make_folder("out", own)
        if keeps and not children.IS_CHILD:  # else its parent knows
            RunFolder(own).write_config(config)
            write_json(own / JOINED, {"address": address, "insecure": insecure})
        try:
            with watched(run, connection, config, index):
                run.follow()
        finally:  # what was trained is kept, whatever happened
            run.written()
            if run.has_trained:
                folder.save_client(client, config, write_signature(signature_of(config, network, connection.run, data)))
        connection.finish()
    except (Left, Interrupted):
        connection.leave()
        raise Left((own / JOINED).is_file()) from None
    except BaseException as error:
        connection.fail(*for_peer(f"client {index}", error))
        raise
    connection.outbox.clear()
    shutil.rmtree(own, ignore_errors=True)  # nothing is left to go on with
    return folder.path


def _wait_for_server(address: str, trust: Trust | None, seconds: float, insecure: bool) -> None:
    """Until one answers there; raises InputError where none does, and Left where the process was told to leave."""
    check_address(address, "server address", encrypted=trust is not None, insecure=insecure)
    LOG.info("waiting for a server at %s, for up to %g s", address, seconds, extra={"event": "waiting"})
    try:
        reach(address, trust, seconds, leaving=leaving)
    except Interrupted:
        raise Left(kept=False) from None


def agreement(config: Config, index: int) -> dict[str, Any]:
    """What client `index` says at joining, by the names of `Join`: for a client in another language, which cannot make
    it. Raises InputError as `join` does."""
    setup.check_index(config, index)
    setup.check_between_processes(config)
    data, shard, network = _own_part(config, index)
    said = join_of_client(config, data, shard, network, index)
    return {field.name: getattr(said, field.name) for field in said.DESCRIPTOR.fields if field.name not in _LATER}


def _own_part(config: Config, index: int) -> tuple[Dataset, Samples, Network]:
    """The client's data, of them its training samples, and the network on both sides."""
    data = setup.load_data(config.data, index)
    shard = setup.make_shards(config, data)[index]
    return data, shard, network_of(config, data, setup.task_of(config, data))


def join_of_client(config: Config, data: Dataset, shard: Samples, network: Network, index: int) -> pb.Join:
    """What client `index` says at joining."""
    steps = batch_count(len(shard), config.train.batch_size)
    return join_of(config, network, index, len(shard), steps, setup.agreement(config, data))


def join_of(
    config: Config, network: Network, index: int, samples: int, steps: int, agreement: dict[str, Any]
) -> pb.Join:
    """What is said at joining as client `index`, of so many training samples and steps per epoch; `agreement` is what
    its data must have in common with other clients'."""
    own = {DATA: agreement, WEIGHTS: network.digests}
    return pb.Join(
        protocol=PROTOCOL, client=index, settings=json.dumps(setup.agreed_settings(config) | own),
        inputs=json.dumps(written_spec(network.inputs)),
        outputs=network.task.outputs, samples=samples, steps=steps,
        parameters=network.parameters, fingerprint=network.fingerprint,
        targets=json.dumps({"spec": written_spec(network.task.spec), "names": network.task.names}),
        plan=write_plans(network.plans),
    )  # fmt: skip


def connect(
    config: Config, join: pb.Join, address: str, name: str, trust: Trust | None = None, insecure: bool = False, *,
    folder: Path | None = None, state: Mapping[str, Any] | None = None,
) -> Connection:  # fmt: skip
    """A connection to a server that has taken this side, which errors call `name`. `folder` is for the spool; `state`
    is that of an earlier process's connection."""
    outbox = Outbox(folder, memory_bytes=config.wire.window // 4, disk_bytes=config.checkpoint.spool)
    if state is not None:
        outbox.run = state["run"]
        outbox.load(state["last"], state["durable"])
    else:
        outbox.clear()
    connection = Connection(
        address, window_bytes=config.wire.window, timeout=config.wire.timeout, trust=trust, insecure=insecure,
        reconnect=config.wire.reconnect, outbox=outbox, run="" if state is None else state["run"],
        received=0 if state is None else state["taken"], leaving=leaving,
    )  # fmt: skip
    try:
        connection.send(pb.ClientMessage(join=join))
        connection.receive("joined")
    except BaseException as error:
        connection.fail(*for_peer(name, error))
        raise
    return connection
