"""The server process: takes cut batches from its clients in order, trains the server half, and writes the run folder.

It needs no data: sample shape and number of classes come with the first client that joins.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.files import alone_in, write_json
from halfpass.run import children, metrics, setup, tracking
from halfpass.run.above import Above
from halfpass.run.admission import Admission
from halfpass.run.attendance import Attendance
from halfpass.run.children import Left, for_peer, leaving
from halfpass.run.credentials import EDGE, SERVER, trust_of
from halfpass.run.edge import RemoteLink
from halfpass.run.epoch import HandedOver, Score, Tally, Values, tally_of
from halfpass.run.epochs import run_epochs
from halfpass.run.keeping import Keeper, as_bytes, as_tensor, peer_of, peer_state
from halfpass.run.network import above_edge
from halfpass.run.overview import Overview, Pace, Position
from halfpass.run.ranks import Ranks
from halfpass.run.records import SERVED, RunFolder, Wires, read_result, refuse_run, result
from halfpass.run.replay import Lessons
from halfpass.run.roles import Clients
from halfpass.run.rounds import Handover, Turn, testers
from halfpass.run.signature import signature_of, write_signature
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.hub import ClientLost, Hub, Misbehaved, Received, StreamLost
from halfpass.wire.messages import (
    write_gradients,
    write_weights,
)
from halfpass.wire.meter import Meter
from halfpass.wire.outbox import Outbox
from halfpass.wire.service import Interrupted
from halfpass.wire.store import UploadStore

LOG = logging.getLogger("halfpass")
JOIN_SECONDS = 600.0  # for all clients to be started, perhaps by hand
LONGEST_EPOCH = 1e9  # seconds that a client may say it was busy


@dataclass
class _Place:
    """Where in an epoch the server is, between two messages."""

    epoch: int
    tally: Tally
    clients: dict[int, Tally] = field(default_factory=dict)  # what they have said of it so far
    turn: int = 0  # whose messages are taken
    begun: int = 0  # turns that clients have been told to begin
    active: list[int] | None = None  # clients of the turn that have not ended it; None before its first message
    last: int | None = None  # the client whose message was taken last
    there: dict[int, set[int]] = field(default_factory=dict)  # by turn, clients that take part in it

    def state(self) -> dict[str, Any]:
        tallies = {k: tally.state() for k, tally in self.clients.items()}
        there = {turn: sorted(clients) for turn, clients in self.there.items()}
        return {**vars(self), "tally": self.tally.state(), "clients": tallies, "there": there}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> "_Place":
        """The inverse of `state`."""
        return cls(**{
            **state, "tally": tally_of(state["tally"], device),
            "clients": {k: tally_of(values, device) for k, values in state["clients"].items()},
            "there": {turn: set(clients) for turn, clients in state["there"].items()},
        })  # fmt: skip

    def next(self, turn: Collection[int]) -> int:
        """The client whose turn it is, round and round."""
        assert self.active
        order = list(turn)
        behind = 0 if self.last is None else order.index(self.last) + 1
        return next(k for k in [*order[behind:], *order[:behind]] if k in self.active)


class ServerRun:
    """The server's side of a run; the same steps as `local.LocalRun`, with the clients at the end of a wire."""

    def __init__(
        self, config: Config, hub: Clients, admission: Admission, store: UploadStore | None,
        link: Callable[..., RemoteLink] | None, folder: RunFolder | None = None, run: str = "",
        state: Mapping[str, Any] | None = None, ready: Callable[[], None] | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """`link` makes the one to the server above an edge. `folder` keeps what the run, which `run` names, can be gone
        on with; `state` was kept by an earlier process. `ready` is called once that is taken up."""
        assert admission.network is not None
        self.config, self.hub, self.network, self.task = config, hub, admission.network, admission.network.task
        first = next(iter(admission.joins.values()))
        self.server = setup.build_server(config, self.network) if ranks is None else ranks.lead(self.network, first)
        self._joins, self._of_edge = admission.joins, admission.of_edge
        above, joins = None if state is None else state["above"], [join for _, join in sorted(self._joins.items())]
        self.above = Above() if link is None else link(config, self.server, joins, self.task, state=above)
        self.above.test_again = self.test
        self.attendance = Attendance(config, hub, self._joins)
        self.steps = self.attendance.steps  # per epoch, by client; it becomes known when they join
        setup.check_rounds(config, self.steps)
        self.handover = Handover(config.clients.topology, config.clients.count)
        self.has_trained = False
        self.seconds_before = 0.0
        self.lessons = Lessons(config, self.server, store, self.above)
        self._folder, self.name, self._ready = folder, run, ready
        self._keeper = Keeper(config, hub, folder, run)
        self._at: _Place | None = None  # in the epoch that goes on
        self._ahead = hub.ahead and config.clients.quorum is None  # who may be lost is asked for one thing at a time
        self._next: _Place | None = None  # in the epoch behind it, where clients have been told to begin that
        self._asked: list[int] | None = None  # clients that have been told to test
        self._ending: set[int] | None = None  # and those to finish
        self._began = 0.0  # it, or its part in this process
        self.finished = False
        self.pace = Pace(range(len(self.steps)))
        self.watch: Callable[[], pb.StatusReply] | None = None  # how far it is, for who sits before it
        self._phase, self._epoch, self._tally = "training", 0, Tally(self.server.arithmetic.device)
        self._taken: list[tuple[int, CutBatch]] = []  # by client, since the last step
        template = setup.build_client(config, self.network, 0) if self.handover.needed else None
        self._handed_over = HandedOver(config, template)
        # (epoch, step, samples of its batch so far, samples missing) after each client's last message
        self._last = dict.fromkeys(range(len(self.steps)), (-1, -1, 0, 0))
        self._evaluation_sockets = [(0, 0)] * len(self.steps)  # (up, down) so far, to be left out
        self._before_test: dict[int, tuple[int, int] | None] = {}  # (up, down) at the sockets of those that test

    def train(self, epoch: int, after_step: Callable[[], None]) -> tuple[dict[int, Tally], Tally]:
        self.lessons.after_step, self._began = after_step, time.perf_counter()
        if self._at is None:
            self.above.begin(epoch)
            self._at, self._next = self._next or self._begin_epoch(epoch, {}), None
        at = self._at
        self._phase, self._epoch, self._tally = "training", epoch, at.tally
        self.has_trained = True  # a client has, at the least
        try:
            self._train(at)
        except Interrupted:
            self._leave()
        self.lessons.end_epoch(epoch, at.tally)
        return at.clients, at.tally

    def _train(self, at: _Place) -> None:
        """To the end of the epoch's last turn."""
        while at.turn < self.attendance.schedule.count:
            self._advance(at)  # where a turn has no client that is there
            for k, received in self._until_ended(at):
                if self._ahead:
                    self._advance(at)  # what a client is to do next goes out before it is learned from what it did
                if received.batch is not None:
                    self._step(k, at, received)
                else:
                    self.hub.done(k, received)
                self._advance(at)
                if received.batch is None or received.batch.last:
                    self._keep_if_due()
            self._advance(at)
            self.lessons.course.end()
            at.turn, at.active, at.last = at.turn + 1, None, None

    def _advance(self, at: _Place) -> None:
        """The clients' next turn waits for no batch that the server has to learn from."""
        while at.begun <= self.attendance.schedule.count:
            told = self.attendance.schedule.of(at.epoch)[at.begun - 1].keys() & at.there[at.begun - 1]
            if (ends := self.hub.take_ends(told)) is None:
                return
            try:
                at.clients |= self._hand_over(at, ends)
            except Misbehaved as fault:
                self.hub.untake_ends(ends)
                self._misbehaved(fault, at)
                continue  # where it is waited for, its end has not come
            self._begin(at)
            if self._ahead and at.begun > self.attendance.schedule.count:
                self._begin_ahead(at.epoch)

    def _begin_ahead(self, epoch: int) -> None:
        """What clients do behind an epoch waits for no batch that the server has to learn from."""
        tests = dict[int, pb.ServerMessage]()
        if self.config.train.tests(epoch):
            self._asked = self._testers(epoch)
            tests = {k: pb.ServerMessage(test=pb.Test(epoch=epoch)) for k in self._asked}
        if epoch + 1 < self.config.train.epochs:
            self._next = self._begin_epoch(epoch + 1, tests)
        for k, test in tests.items():
            self.hub.send(k, test)
        if self._next is None:
            self._end()

    def _begin_epoch(self, epoch: int, tests: dict[int, pb.ServerMessage]) -> _Place:
        """`tests` are sent to those that are told to begin, before that."""
        at = _Place(epoch, Tally(self.server.arithmetic.device))
        self._begin(at, tests)
        return at

    def _until_ended(self, at: _Place) -> Iterator[tuple[int, Received]]:
        """Batches of all clients of the turn, round and round or as they arrive, until each has ended its epoch
        or round. The micro-batches of one batch come one behind the other."""
        turn, there = self.attendance.schedule.of(at.epoch)[at.turn], at.there[at.turn]
        if at.active is None:
            at.active = [k for k in turn if k in there]
            self._begin_course(at, {k: turn[k] for k in at.active})
        while at.active:
            candidates = [at.next(turn)] if self.config.wire.order == "round-robin" else at.active
            try:
                k, received = self._take(at, candidates, "batch", "epoch_end")
                while received.batch is not None and not received.batch.last:
                    yield k, received
                    if k not in there:
                        raise ClientLost(k, "it was given up")
                    _, received = self._take(at, [k], "batch")
            except ClientLost as lost:
                if lost.client in there:
                    self._give_up(lost, at)
                self._save()  # before anybody is told what comes of it
                continue
            if received.batch is None:
                at.active.remove(k)
            at.last = k
            yield k, received

    def _begin_course(self, at: _Place, turn: Turn) -> None:
        there, epoch = at.there[at.turn], at.epoch
        last = self.config.train.epochs - 1
        self.lessons.course.begin(
            turn, self.attendance.left(there, epoch, at.turn + 1), self.attendance.left(there, last, 0)
        )  # fmt: skip

    def _take(self, at: _Place, candidates: Collection[int], *kinds: str) -> tuple[int, Received]:
        """The next message of one of them that is as it should be."""
        while True:
            k, received = self.hub.take(candidates, *kinds)
            try:
                if received.batch is not None:
                    self._check_order(k, received.batch, received.test, at.epoch)
                elif received.message is not None and self.hub.has_looked_at(k):  # else it has been looked at
                    self._read_end(k, at.epoch, received.message.epoch_end)
            except Misbehaved as fault:
                self.hub.drop(k, fault)
                if self.hub.enough_without(k):
                    raise ClientLost(k, str(fault)) from None
                continue
            return k, received

    # -- clients that are lost, where there is a quorum

    def _give_up(self, lost: ClientLost, at: _Place | None = None) -> None:
        """Goes on without a client, which takes no part in the turns that it was to."""
        k, why = lost.client, lost.why
        LOG.warning("going on without client %d: %s", k, why, extra={"event": "given up", "client": k})
        self.attendance.lose(k, why, self._epoch, self.attendance.schedule.count if at is None else at.turn)
        self.handover.drop(k)
        epoch, step, _, missing = self._last[k]
        self._last[k] = (epoch, step - (missing > 0), 0, 0)
        self.lessons.drop_parts()
        if at is None:
            return
        for turn in range(at.turn, at.begun):
            at.there[turn].discard(k)
        if at.active is None:
            return
        self.lessons.learn_held(at.tally)
        course = self.lessons.course
        reached = {j: self._reached(at, j, part) for j, part in course.turn.items()}
        if k in at.active and self.config.clients.topology == "independent" and k not in at.clients:
            self.attendance.trained[k] += reached[k] - course.turn[k].start
        rest = {j: range(reached[j], part.stop) for j, part in course.turn.items() if j in at.there[at.turn]}
        course.end(reached)
        self._begin_course(at, rest)
        at.active = [j for j in at.active if j != k]

    def _misbehaved(self, fault: Misbehaved, at: _Place | None = None) -> bool:
        """Ends its stream. Whether the run goes on without it; else it is waited for as one that is lost."""
        self.hub.drop(fault.client, fault)
        if not self.hub.enough_without(fault.client):
            return False
        self._give_up(ClientLost(fault.client, str(fault)), at)
        return True

    def _reached(self, at: _Place, k: int, part: range) -> int:
        """The client's step, of those of the turn, up to which the server has learned from it."""
        epoch, step, *_ = self._last[k]
        if at.active is None or k not in at.active:
            return part.stop
        return min(max(part.start, step + 1), part.stop) if epoch == at.epoch else part.start

    def _leave(self) -> NoReturn:
        """Keeps the state where that can be: not amid the micro-batches of a batch, or the uploads of a step."""
        if self._at is not None and not self.lessons.holds and not any(missing for *_, missing in self._last.values()):
            self._save()
        raise Left

    def _step(self, k: int, at: _Place, received: Received) -> None:
        batch, served = received.batch, at.tally
        assert batch is not None
        began = time.perf_counter()
        gradients = self.lessons.learn(batch, received.upload, served)
        self.pace.add(k, len(batch), time.perf_counter() - began, last=batch.last)
        self.hub.done(k, received)
        if gradients is None:
            self.hub.acknowledge(k)
        else:
            self.hub.send(k, write_gradients(batch, gradients, self.config.wire.codec))
        self._note(batch)
        self._taken.append((k, batch))
        if not self.lessons.holds:
            for owner, done in self._taken:
                self.hub.give_back(owner, done)
            self._taken = []

    def _begin(self, at: _Place, tests: dict[int, pb.ServerMessage] | None = None) -> None:
        """The clients of the next turn may go on, where there is one more."""
        number, attendance = at.begun, self.attendance
        there = at.there[number] = attendance.call(at.epoch, number)
        schedule = attendance.schedule
        turn = schedule.of(at.epoch)[number] if number < schedule.count else {}
        at.begun += 1
        for k, part in turn.items():
            if k not in there:
                continue
            first, total = attendance.place(k, there, at.epoch, number)
            begin = pb.Begin(
                epoch=at.epoch, first_step=first, total_steps=total, until=part.stop, since=part.start,
                return_weights=self.handover.needed, weights=write_weights(self.handover.give(k)),
            )  # fmt: skip
            before = [tests.pop(k)] if tests and k in tests else []
            self.hub.send(k, *before, pb.ServerMessage(begin=begin))

    def _check_order(self, k: int, batch: CutBatch, test: bool, epoch: int) -> None:
        """Batches come in their order; which of them come is the client's choice, but each comes whole."""
        *last, done, missing = self._last[k]
        place = [batch.epoch, batch.step]
        follows = place > last and batch.before == 0
        if missing:
            follows = place == last and (batch.before, len(batch) + batch.after) == (done, missing)
        if test or batch.epoch != epoch or batch.step >= self.steps[k] or not follows:
            raise Misbehaved(
                k, f"a batch of epoch {epoch} after step {last[1]}, of {self.steps[k]} steps"
                + (f", or {missing} more samples of that one" if missing else ""),
                f"epoch {batch.epoch}, step {batch.step} from sample {batch.before}, test {test}",
                "both sides must run the same halfpass",
            )  # fmt: skip
        self._last[k] = (batch.epoch, batch.step, batch.before + len(batch), batch.after)

    def _hand_over(self, at: _Place, ends: dict[int, pb.EpochEnd]) -> dict[int, Tally]:
        """Takes what the clients of a turn gave back at its end; returns what they say of their epochs so far. Raises
        Misbehaved where one of them gave something else."""
        turn = self.attendance.schedule.of(at.epoch)[at.begun - 1]
        self.handover.take({k: self._read_end(k, at.epoch, end) for k, end in ends.items()})
        for k in ends:
            self.attendance.trained[k] += len(turn[k])
        return {k: self._client_tally(end, at.clients.get(k), turn[k]) for k, end in ends.items()}

    def _read_end(self, k: int, epoch: int, end: pb.EpochEnd) -> dict[str, Tensor]:
        """The weights that came with it. Raises Misbehaved where it is none that could be."""
        # An edge learns from its uploads as often as its own replay says.
        most = 2**48 if self._of_edge else self._joins[k].samples
        sound = (
            end.epoch == epoch and 0 <= end.busy_seconds < LONGEST_EPOCH and math.isfinite(end.learning_rate)
            and end.samples <= most and end.uploads + end.withheld <= self.steps[k]
        )  # fmt: skip
        if not sound:
            raise Misbehaved(k, f"a sound end of epoch {epoch}", f"one of epoch {end.epoch}", "see there")
        try:
            return self._handed_over.read(f"client {k}", end.weights, "lower train.lr")
        except RunError as error:
            raise Misbehaved(k, error.expected, error.found, error.remedy, place=error.place) from None

    def _client_tally(self, end: pb.EpochEnd, before: Tally | None, part: range) -> Tally:
        """What a client says of its epoch."""
        steps = len(part) + (0 if before is None else before.steps)
        return Tally(
            self.server.arithmetic.device, loss_sum=end.loss * end.samples, samples=end.samples, steps=steps,
            busy_seconds=end.busy_seconds, learning_rate=end.learning_rate, peak_memory_bytes=end.peak_memory_bytes,
            uploads=end.uploads, withheld=end.withheld,
        )  # fmt: skip

    def test(self, epoch: int) -> tuple[Score, dict[int, Values]]:
        """(the test's score, the auxiliary head's by client), by the same way as training, codec included. Begun anew
        where a client's stream, or an edge's to the server above, is lost meanwhile: weights stay as they are."""
        self._phase, clients = "testing", self._testers(epoch) if self._asked is None else self._asked
        while True:
            try:
                score, auxiliary = self._test_all(epoch, clients)
                if self.above.end_test(epoch, score):
                    return score, auxiliary
            except StreamLost:
                pass
            except Misbehaved as fault:
                if self._misbehaved(fault):
                    return self.test(epoch)
            except ClientLost as lost:
                self._give_up(lost)
                return self.test(epoch)
            line, known = "the test after epoch %d begins anew: its stream was lost", {"event": "test"}
            LOG.warning(line, epoch + 1, extra=known | {"epoch": epoch + 1})

    def _testers(self, epoch: int) -> list[int]:
        """Who tests behind an epoch, with the newest half."""
        own_data, trained = self.config.clients.partition == "own", [*self.attendance.schedule.of(epoch)[0]]
        clients = testers(self.config.clients.topology, len(self.steps), trained, own_data=own_data)
        if self.config.clients.quorum is not None:
            clients = self._testers_there(clients)
        for k in clients:
            self._before_test[k] = before = self.hub.socket_traffic(k)
            if weights := self.handover.give(k):
                take = pb.ServerMessage(take=pb.Take(weights=write_weights(weights)))
                self.hub.send(k, take)
                if before is not None:  # they are training's, and leave the socket sooner or later
                    self._before_test[k] = before[0], before[1] + take.ByteSize()
        return clients

    def _testers_there(self, clients: list[int]) -> list[int]:
        """Of the clients that are to test those that have trained to the epoch's end, or the first that has."""
        there = [k for k in range(len(self.steps)) if self.hub.present(k)]
        if (at := self._at) is not None:
            last = {k: number for number, turn in enumerate(self.attendance.schedule.of(at.epoch)) for k in turn}
            there = [k for k in there if k in at.there[last[k]]] or there
        return [k for k in clients if k in there] or there[:1]

    def _test_all(self, epoch: int, clients: Sequence[int]) -> tuple[Score, dict[int, Values]]:
        score, auxiliary = Score(self.task, clients), dict[int, Values]()
        self.above.begin_test(epoch)
        self.lessons.begin_test()
        self.server.half.eval()
        try:
            for k in clients:
                stream = self.hub.streams(k)
                if self._asked is None:
                    self.hub.send(k, pb.ServerMessage(test=pb.Test(epoch=epoch)))
                count, end = self._test_client(k, epoch, score, stream)
                if (end.samples, end.epoch) != (count, epoch):
                    expected = f"the end of a test of {count} samples"
                    raise Misbehaved(k, expected, str(end.samples), "see there")
                if end.has_head:
                    auxiliary[k] = self._auxiliary(k, end, score)
                self._leave_out(k)
        finally:
            self.server.half.train()
            self._asked = None
        return score, auxiliary

    def _auxiliary(self, k: int, end: pb.TestEnd, score: Score) -> Values:
        """What the client says of its head: the metrics that the server half has, and no infinity."""
        values = {said.metric: said.value for said in end.scores}
        expected = score.values().keys()
        if values.keys() != expected or len(end.scores) != len(values) or any(map(math.isinf, values.values())):
            found = ", ".join(sorted(values))[:200] or "none"
            raise Misbehaved(k, f"scores of its head ({', '.join(expected)})", found, "see there")
        return values

    def _test_client(self, k: int, epoch: int, score: Score, stream: int) -> tuple[int, pb.TestEnd]:
        """Adds the client's test to the score; (its samples, what it says at the end)."""
        samples, step = 0, 0
        while True:
            _, received = self.hub.take([k], "batch", "test_end", of=stream)
            if received.message is not None:
                if samples == 0:
                    raise Misbehaved(k, "a test set", "none", "see there")
                return samples, received.message.test_end
            assert received.batch is not None
            batch = received.batch
            if (batch.step, received.test) == (0, True) and step > 0:  # of an edge, whose clients begin theirs anew
                raise StreamLost(received)
            _in_sequence(k, (epoch, step, True), (batch.epoch, batch.step, received.test))
            self.lessons.test(batch, received.upload, score)
            self.hub.acknowledge(k, test=True)
            self.hub.give_back(k, batch)
            samples, step = samples + len(batch), step + 1

    def _leave_out(self, k: int) -> None:
        """Evaluation's bytes at the socket are not training's."""
        before, after = self._before_test[k], self.hub.socket_traffic(k)
        self._before_test[k] = after
        if before is not None and after is not None:
            up, down = self._evaluation_sockets[k]
            self._evaluation_sockets[k] = (up + after[0] - before[0], down + after[1] - before[1])

    # -- what is kept

    def _note(self, batch: CutBatch) -> None:
        """A line of the ledger: this batch was learned from."""
        if self._folder is not None and batch.last:
            self._folder.note(batch.client, batch.epoch, batch.step, batch.before + len(batch))

    def _keep_if_due(self) -> None:
        """A checkpoint, every so many steps; not while uploads are held for a step."""
        due = self._keeper.count()
        if leaving():
            self._leave()
        if due and not self.lessons.holds:
            self._save()

    def ready(self, folder: RunFolder) -> None:
        """With a first checkpoint, so that a server that is killed before the next knows its clients, and they it."""
        if not folder.has_checkpoint:
            self._keeper.write(0, self.state, (1, 0))
        if self._ready is not None:
            self._ready()

    def keep(self, folder: RunFolder, epochs: int) -> None:
        """Keeps the state behind so many epochs. Twice, as no client will repeat the test that was before it, and the
        checkpoint before the newest must do."""
        self._at, self.seconds_before = None, 0.0
        self._keep_behind(epochs)

    def _keep_behind(self, epochs: int) -> None:
        for _ in range(2):
            self._keeper.save(epochs, self.state, (epochs, sum(self.steps)))

    def _save(self) -> None:
        """A checkpoint amid an epoch."""
        assert self._at is not None
        steps = sum(self._steps_done(self._at.epoch).values())
        self._keeper.save(self._at.epoch, self.state, (self._at.epoch + 1, steps))

    # -- for who watches, from another thread

    def position(self) -> Position:
        training = self._phase == "training"
        steps = self._steps_done(self._epoch) if training else dict(enumerate(self.steps))
        return Position(self._phase, self._epoch + 1, steps, self._tally.mean_loss, self._keeper.newest)

    def _steps_done(self, epoch: int) -> dict[int, int]:
        """By client, of its steps in that epoch; those that it has not uploaded and passed by are done too."""
        return {k: step + (not missing) if of == epoch else 0 for k, (of, step, _, missing) in self._last.items()}

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on."""
        seconds = 0.0 if self._at is None else self.seconds_before + time.perf_counter() - self._began
        return {
            "server": self.server.state(), "handover": self.handover.state(),
            "lessons": self.lessons.state(), "above": self.above.state(), "at": self._at and self._at.state(),
            "seconds": seconds, "last": self._last, "evaluation_sockets": self._evaluation_sockets,
            "attendance": self.attendance.state(), "run": self.name, "finished": self.finished,
            "ledger": self._folder and self._folder.ledger_bytes(),
            "joins": [as_tensor(join.SerializeToString()) for join in list(self._joins.values())],
            "peers": {k: peer_state(self.hub.peer(k)) for k in range(len(self.steps))},
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`, but for what the hub and the link above were made with."""
        self.server.load_state(state["server"])
        self.handover.load_state(state["handover"])
        self.lessons.load_state(state["lessons"])
        self._at = state["at"] and _Place.of(state["at"], self.server.arithmetic.device)
        self.seconds_before, self.finished = state["seconds"], state["finished"]
        self.attendance.load_state(state["attendance"])
        self._last = {k: tuple(last) for k, last in state["last"].items()}
        self._evaluation_sockets = [tuple(pair) for pair in state["evaluation_sockets"]]
        self._keeper.load(state["peers"])
        self.has_trained = True
        if self._folder is not None:
            self._folder.cut_ledger(state["ledger"])

    def meters(self) -> dict[int, Meter]:
        return {k: self.hub.meter(k) for k in range(len(self.steps))}

    def sockets(self) -> dict[int, tuple[int, int] | None]:
        """(up, down) bytes at each client's socket so far, evaluation left out; None where the system does not say."""
        return {k: self._socket(k) for k in range(len(self.steps))}

    def _socket(self, k: int) -> tuple[int, int] | None:
        traffic, (up, down) = self.hub.socket_traffic(k), self._evaluation_sockets[k]
        return None if traffic is None else (traffic[0] - up, traffic[1] - down)

    def _end(self) -> set[int]:
        """Tells every client that is there to finish; returns who that is."""
        self._ending = self.attendance.call(self.config.train.epochs - 1, self.attendance.schedule.count)
        for k in self._ending:
            finish = pb.Finish(weights=write_weights(self.handover.give(k)))
            self.hub.send(k, pb.ServerMessage(finish=finish))
        return self._ending

    def finish(self) -> Wires:
        """Gives every client the final client half, where it is shared, and lets it go; returns all bytes."""
        self._phase, clients = "finishing", range(len(self.steps))
        self.hub.end_without()
        if not self.finished:
            for k in self._end() if self._ending is None else self._ending:
                try:
                    self.hub.done(k, self.hub.take([k], "finished")[1])
                except ClientLost as lost:
                    self._give_up(lost)
            self.above.finish()
        meters = list(self.meters().values())
        known = [traffic for traffic in self.sockets().values() if traffic is not None]
        self.finished = True
        self._keep_behind(self.config.train.epochs)  # so that a client that has said Finished may go
        for k in clients:
            self.hub.release(k)
        if len(known) < len(self.steps):
            return Wires(meters, None)
        return Wires(meters, (sum(up for up, _ in known), sum(down for _, down in known)))


def _in_sequence(client: int, expected: tuple[int, int, bool], found: tuple[int, int, bool]) -> None:
    if expected != found:
        raise Misbehaved(
            client, "epoch {}, step {}, test {}".format(*expected),
            "epoch {}, step {}, test {}".format(*found), "both sides must run the same halfpass",
        )  # fmt: skip


def serve(
    config: Config, bind: str, announce: Callable[[int], None], above: str | None = None, *, insecure: bool = False,
    again: bool = False, register: metrics.Register = metrics.to_nobody, engine: str | None = None,
    trouble: Callable[[], HalfpassError | None] = lambda: None, ranks: Ranks | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Serves one run from joining to the written run folder; returns what `result.json` holds. `insecure` has it listen
    to other machines without TLS. `again`: goes on with the run in its folder, where it has kept a state.

    `announce(port)` is called once clients can join. Where the run has an edge, the server with an address `above` it
    is that edge, and the one without is the server at the top. `register` takes figures for Prometheus.
    `engine`: what starts the clients, where that is another's; `trouble`: why one of them does not come, once that
    is known. `ranks`: other processes learn along (`ranks.py`).
    """
    out = config.folder
    if above is not None and config.model.edge_cut is None:
        raise InputError("--above", "a run with model.edge_cut", "none", "give both, or neither")
    given, of_edge = config, above is None and config.model.edge_cut is not None
    if of_edge:
        config = above_edge(config)
    folder = RunFolder(out)
    if again and (out / "result.json").is_file():
        LOG.warning("the run in %s is finished", out)
        return read_result(out)
    kept = folder.read_checkpoint(config) if again else None
    if kept is None:
        refuse_run(out)
    setup.check_between_processes(config)
    tracking.check(config)
    if ranks is None:
        setup.check_unsharded(config)
    trust = trust_of(config.tls, SERVER if above is None else EDGE)
    setup.settle_process(config)
    admission = Admission(config, of_edge=of_edge)
    state = None if kept is None else kept[1]
    keeps = config.checkpoint.every != 0
    run_name = (secrets.token_hex(8) if keeps else "") if state is None else str(state["run"])

    def outbox(client: int) -> Outbox:
        box = Outbox(
            out / f"outbox-{client}" if keeps else None, run=run_name, memory_bytes=config.wire.window // 4,
            disk_bytes=config.checkpoint.spool,
        )  # fmt: skip
        if state is None:
            box.clear()
        return box

    peers = []
    if state is not None:
        for join in state["joins"]:
            admission.admit(pb.Join.FromString(as_bytes(join)))
        peers = [peer_of(k, outbox(k), values) for k, values in state["peers"].items()]
    overview = Overview(config)
    hub = Hub(
        bind, clients=config.clients.count, window_bytes=config.wire.window, timeout=config.wire.timeout,
        admit=admission.admit, check=admission.check,
        check_values=admission.check_values, keep_uploads=setup.keeps_uploads(config), trust=trust, insecure=insecure,
        of_edge=of_edge, reconnect=config.wire.reconnect, quorum=config.clients.quorum, run=run_name, outbox=outbox,
        peers=peers, leaving=leaving, trouble=trouble, status=overview.status, watched=children.IS_CHILD, opened=False,
    )  # fmt: skip

    def ready() -> None:
        hub.open()
        announce(hub.port)

    overview.hub, overview.name = hub, run_name
    register(metrics.ServerFigures(overview))
    try:
        if state is None:
            ready()
        hub.wait_for_clients(JOIN_SECONDS, config.clients.quorum if above is None else None)
        assert admission.network is not None
        with setup.open_store(config, admission.network, old=kept is not None) as store:
            link = None
            if above is not None:
                spool = out / "above" if keeps else None
                link = partial(RemoteLink, address=above, trust=trust, insecure=insecure, folder=spool)
            with nullcontext() if children.IS_CHILD else alone_in(out):  # else its parent is
                if state is None:
                    folder = RunFolder.create(out, given)
                if not children.IS_CHILD:
                    where = {"bind": f"{bind.rpartition(':')[0]}:{hub.port}", "above": above, "insecure": insecure}
                    write_json(out / SERVED, where)
                kept_in = folder if keeps else None
                later = None if state is None else ready
                run = ServerRun(config, hub, admission, store, link, kept_in, run_name, state, later, ranks)
                overview.run, run.watch = run, overview.status
                outcome = run_to_end(config, folder, run, engine)
                for k in range(len(run.steps)):
                    hub.peer(k).outbox.clear()
                (out / SERVED).unlink(missing_ok=True)
                return outcome
    except (Left, Interrupted) as left:
        raise Left(keeps and (out / SERVED).is_file(), getattr(left, "why", "")) from None  # clients wait for it
    except BaseException as error:
        hub.fail(*for_peer("server", error))
        raise
    finally:
        hub.stop()


def run_to_end(config: Config, folder: RunFolder, run: ServerRun, engine: str | None = None) -> dict[str, Any]:
    """All epochs and the end; returns what `result.json` holds. `engine`: what carries it, where that is another's."""
    LOG.info("training into %s", folder.path, extra={"event": "training", "folder": str(folder.path)})
    with folder.tracked(config):
        return _run_to_end(config, folder, run, engine)


def _run_to_end(config: Config, folder: RunFolder, run: ServerRun, engine: str | None) -> dict[str, Any]:
    try:
        rows = run_epochs(config, run, folder)
        wires = run.finish()
    except (Left, Interrupted) as left:
        run.above.leave()
        raise Left(why=getattr(left, "why", "")) from None
    except BaseException as error:
        run.above.fail(*for_peer("edge", error))
        raise
    finally:  # what was trained is kept, whatever happened
        if run.has_trained and run.server.whole():
            signature = write_signature(signature_of(config, run.network, run.name))
            folder.save_server(run.server, config, signature)
    outcome = result(config, run.task, run.network.cut, rows, wires, folder.environment)
    if config.clients.partition == "own" and not children.IS_CHILD:
        outcome["dataset"] = None  # the clients' own, which they need not name
    outcome |= {} if config.clients.quorum is None else {"absent": run.attendance.absent}
    return folder.finish(outcome | ({} if engine is None else {"engine": engine}))
