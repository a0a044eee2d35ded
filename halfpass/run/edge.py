"""An edge's link to the server above it, in either runtime (`algorithm/edge.py` says what an edge is).

An edge's clients see a server like any other. The link above it is a run of its own, with the edge as its only client:
its run folder is the whole run's, and the edge's is `edge/` in it.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.algorithm.edge import EdgeHalf
from halfpass.algorithm.server import Server
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.errors import RunError
from halfpass.run import setup
from halfpass.run.above import Above
from halfpass.run.client_process import connect, encoded, end_of_test, join_of
from halfpass.run.epoch import Score, Tally, Values
from halfpass.run.memory import PeakMemory
from halfpass.run.network import Network, above_edge, build_network, read_plans, read_spec
from halfpass.run.records import Row, RunFolder, Wires, epoch_rows, peak_so_far, result
from halfpass.run.replay import Lessons
from halfpass.run.rounds import place_in_epoch, schedule_position
from halfpass.run.signature import signature_of, write_signature
from halfpass.tasks.task import Task
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.loopback import Loopback
from halfpass.wire.messages import write_batch
from halfpass.wire.store import UploadStore
from halfpass.wire.trust import Trust


class _Link(Above):
    """Numbers what goes up: by its place in the edge's epoch, or one by one where its clients' batches do not come in
    the order of their places: as they arrive, each within a budget of its own, or every so many of each in rounds."""

    def __init__(self, config: Config, edge: Server, steps: Sequence[int]) -> None:
        """`config` is the edge's own; `steps` are its clients' per epoch."""
        assert isinstance(edge.half, EdgeHalf)
        self.config, self._half, self._below, self._steps = above_edge(config), edge.half, config, steps
        in_order = config.wire.order == "round-robin" and config.wire.budget is None
        self._in_places = in_order and (config.wire.every == 1 or config.clients.rounds == 1)
        self._step, self._uploads = -1, 0

    def learn(self, batch: CutBatch) -> None:
        if batch.before == 0:
            clients = self._below.clients
            place = place_in_epoch(clients.topology, self._steps, clients.rounds, batch.client, batch.step)
            self._step = place if self._in_places else self._step + 1
            self._uploads += 1
        self._send(self._crossing(batch), test=False)

    def test(self, batch: CutBatch) -> None:
        self._step += 1
        self._send(replace(self._crossing(batch), answers=self._half.answers), test=True)

    def begin(self, epoch: int) -> None:
        self._step, self._uploads = -1, 0

    def begin_test(self, epoch: int) -> None:
        self._step = -1

    def _crossing(self, batch: CutBatch) -> CutBatch:
        crossing, between = self._half.crossing, self._half.between
        samples = len(crossing) - getattr(between, "whole", 0)
        return CutBatch(
            0, batch.epoch, self._step, crossing[:samples], batch.targets, batch.before, batch.after,
            whole=crossing[samples:], exact=getattr(between, "exact", frozenset()),
        )  # fmt: skip

    def _send(self, batch: CutBatch, *, test: bool) -> None:
        raise NotImplementedError


class LocalLink(_Link):
    """The server above, in the edge's own process."""

    def __init__(
        self, config: Config, edge: Server, steps: Sequence[int], network: Network, folder: RunFolder,
        store: UploadStore | None,
    ) -> None:  # fmt: skip
        super().__init__(config, edge, steps)
        self.server = setup.build_server(self.config, network)
        self.task = network.task
        self._cut, self._folder, self._wire = network.cut, folder, Loopback(self.config.wire.codec)
        self._network, self._name = network, secrets.token_hex(8)
        self._lessons = Lessons(self.config, self.server, store, Above())
        self._memory = PeakMemory(self.server.arithmetic.device)
        self._rows: list[Row] = []

    def state(self) -> dict[str, Any]:
        return {
            "server": training_state(self.server.optimizer, self.server.half), "meter": self._wire.meter.state(),
            "lessons": self._lessons.state(), "epochs": self._rows[-1]["epoch"],
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        load_training_state(state["server"], self.server.optimizer, self.server.half)
        self._wire.meter.load_state(state["meter"])
        self._lessons.load_state(state["lessons"])
        self._rows = self._folder.rows(state["epochs"])

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        steps, left = sum(self._steps), self.config.train.epochs - epoch - 1
        self._lessons.course.begin({0: range(steps)}, left * steps, steps)
        first, total = schedule_position(self.config.clients.topology, [steps], 0, epoch, self.config.train.epochs)
        begin = pb.Begin(epoch=epoch, first_step=first, total_steps=total, until=steps)
        self._wire.down(pb.ServerMessage(begin=begin))
        self._served, self._began = Tally(self.server.arithmetic.device), time.perf_counter()

    def end(self, epoch: int, tally: Tally) -> None:
        self._lessons.course.end()
        self._lessons.end_epoch(epoch, self._served)
        self._wire.up(pb.ClientMessage(epoch_end=pb.EpochEnd(epoch=epoch)))
        self._served.peak_memory_bytes = max(self._memory.peak_bytes(), peak_so_far(self._rows, "server"))
        self._edge, self._seconds = replace(tally, uploads=self._uploads), time.perf_counter() - self._began

    def begin_test(self, epoch: int) -> None:
        super().begin_test(epoch)
        self._wire.down(pb.ServerMessage(test=pb.Test(epoch=epoch)))
        self._score = Score(self.task)
        self.server.half.eval()

    def end_test(self, epoch: int, score: Score) -> bool:
        self.server.half.train()
        self._add_rows(epoch, self._score, {0: score.values()})
        return True

    def skip_test(self, epoch: int) -> None:
        self._add_rows(epoch, None, {})

    def _add_rows(self, epoch: int, score: Score | None, auxiliary: dict[int, Values]) -> None:
        self._rows += self._folder.add_rows(epoch_rows(
            epoch, self._seconds, self.task, self._served, {0: self._edge}, score, auxiliary,
            {0: self._wire.meter}, {0: None}, before=self._rows,
        ))  # fmt: skip

    def _send(self, batch: CutBatch, *, test: bool) -> None:
        received, upload = self._wire.batch(write_batch(batch, self.config.wire.codec, test=test))
        if test:
            self._lessons.test(received, upload, self._score)
        else:
            self._lessons.learn(received, upload, self._served)
        self._wire.ack(test=test)

    def save(self) -> None:
        signature = write_signature(signature_of(self.config, self._network, self._name))
        self._folder.save_server(self.server, self.config, signature)

    def result(self) -> dict[str, Any]:
        """What `result.json` of the run holds."""
        self._wire.down(pb.ServerMessage(finish=pb.Finish()))
        wires = Wires([self._wire.meter], None)
        outcome = result(self.config, self.task, self._cut, self._rows, wires, self._folder.environment)
        return self._folder.finish(outcome)


class RemoteLink(_Link):
    """The server above, at the other end of a connection: a client's side of `wire/service.py`."""

    def __init__(
        self, config: Config, edge: Server, joins: Sequence[pb.Join], task: Task, address: str,
        trust: Trust | None = None, insecure: bool = False, folder: Path | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`folder` is for the spool; `state` of an earlier process."""
        super().__init__(config, edge, [join.steps for join in joins])
        self._memory = PeakMemory(edge.arithmetic.device)
        upper = {"cut": read_plans(joins[0].plan).get("edge_cut")}
        inputs = read_spec(json.loads(joins[0].inputs))
        network = build_network(self.config, inputs, task, plans=upper)
        samples = sum(join.samples for join in joins)
        if state is not None:
            self._step, self._uploads = state["step"], state["uploads"]
        self.connection = connect(
            self.config, join_of(self.config, network, 0, samples, sum(self._steps), {}), address, "edge", trust,
            insecure, folder=folder, state=None if state is None else state["connection"],
        )  # fmt: skip
        self._taken_before = self.connection.taken

    def state(self) -> dict[str, Any]:
        self.connection.drain()
        self.connection.keep(self._taken_before)  # what the checkpoint before has: it may have to do
        self._taken_before = self.connection.taken
        state = {"step": self._step, "uploads": self._uploads, "connection": self.connection.state()}
        self.connection.outbox.sync()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: it was made with it."""

    def begin(self, epoch: int) -> None:
        super().begin(epoch)
        while (message := self.connection.receive("begin", "test")).WhichOneof("kind") == "test":
            self.test_again(message.test.epoch)  # the server above has lost it
        self._expect(epoch, message.begin.epoch)

    def end(self, epoch: int, tally: Tally) -> None:
        end = pb.EpochEnd(
            epoch=epoch, loss=tally.mean_loss, samples=tally.samples, busy_seconds=tally.busy_seconds,
            learning_rate=tally.learning_rate or 0.0, peak_memory_bytes=self._memory.peak_bytes(),
            uploads=self._uploads,
        )  # fmt: skip
        self.connection.send_in_turn(lambda: [pb.ClientMessage(epoch_end=end)])

    def begin_test(self, epoch: int) -> None:
        super().begin_test(epoch)
        if not self.connection.test_holds:  # else one begins anew that is asked for already
            self._expect(epoch, self.connection.receive("test").test.epoch)

    def end_test(self, epoch: int, score: Score) -> bool:
        end = end_of_test(epoch, score.samples, score.values(), has_head=True)
        self.connection.send_in_turn(lambda: [pb.ClientMessage(test_end=end)])
        self.connection.drain()
        return self.connection.end_test()

    def finish(self) -> None:
        while (message := self.connection.receive("finish", "test")).WhichOneof("kind") == "test":
            self.test_again(message.test.epoch)
        self.connection.finish()

    def leave(self) -> None:
        self.connection.leave()

    def fail(self, reason: str, exit_status: int) -> None:
        self.connection.fail(reason, exit_status)

    def _expect(self, epoch: int, found: int) -> None:
        if found != epoch:
            remedy = "both sides must run the same halfpass"
            raise RunError("the server above", f"epoch {epoch}", f"epoch {found}", remedy)

    def _send(self, batch: CutBatch, *, test: bool) -> None:
        self.connection.send_in_turn(partial(encoded, batch, self.config.wire.codec, test=test))
