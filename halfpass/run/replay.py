"""The server's learning from uploads: from each as it comes, and from the store as often as `server.replay` says.

The same for either runtime. A step is on `server.merge` uploads. Those of one epoch are trained on again between those
of the next, in a new order, and those of the last epoch once no more come: in epochs of the server's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from halfpass.algorithm.server import Server
from halfpass.config import Config
from halfpass.cut import CutBatch, merge
from halfpass.errors import InputError
from halfpass.run.above import Above
from halfpass.run.epoch import Score, Tally, server_step
from halfpass.run.rounds import Course
from halfpass.seed import derive_seed
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import read_batch
from halfpass.wire.store import Key, UploadStore

T = TypeVar("T")


class Lessons:
    """A server's training steps, in order, each at its place in the learning-rate schedule.

    The schedule has a slot for each batch of each epoch, uploaded or not (`course`, whose turns begin and end as the
    run's do), and for each step of the server's own epochs at the end. A replay takes the slot of the upload that it
    follows.
    """

    def __init__(self, config: Config, server: Server, store: UploadStore | None, above: Above) -> None:
        self._above, self.course = above, Course()
        self._config, self._server, self._store = config, server, store
        self.after_step: Callable[[], None] = lambda: None  # for the progress of the epoch that goes on
        self._held: list[CutBatch] = []  # until a step's uploads are together
        self._batches: list[pb.Batch] = []  # of the upload that is coming in: its micro-batches
        self._new: list[Key] = []  # this epoch's uploads
        self._again: list[tuple[int, list[Key]]] = []  # (how often used before, a step's uploads), the last step first

    @property
    def holds(self) -> bool:
        """Whether batches are held until their step's others have come."""
        return bool(self._held)

    def state(self) -> dict[str, Any]:
        """What is left to do of an epoch that is over, or of one between two steps, where nothing is held."""
        if self._store is not None:
            self._store.flush()
        return {
            "again": [(use, [tuple(key) for key in keys]) for use, keys in self._again],
            "new": [tuple(key) for key in self._new],
            "uploads": 0 if self._store is None else self._store.added, "course": self.course.state(),
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Uploads that have come since are forgotten: they come again. Raises InputError where the store has lost
        some."""
        if self._store is not None:
            if self._store.added < state["uploads"]:
                expected, found = f"the run's {state['uploads']} uploads", f"{self._store.added}"
                remedy = "go on in the directory in which it was begun, or restore the store"
                raise InputError(f"store {self._store.folder}", expected, found, remedy)
            self._store.forget(state["uploads"])
        self._again = [(use, [Key(*key) for key in keys]) for use, keys in state["again"]]
        self._new = [Key(*key) for key in state["new"]]
        self.course.load_state(state["course"])

    def learn(self, batch: CutBatch, upload: pb.Batch | None, tally: Tally) -> tuple[Tensor, ...] | None:
        """From a batch or micro-batch, decoded and, for the store, as it came; returns gradients when conventional."""
        slot = self.course.slot(batch.client, batch.step)
        self._held.append(batch)
        gradients, stepped = None, len(self._held) == self._config.server.merge
        if stepped:
            gradients = self._learn_held(slot, tally)
        self._above.learn(batch)
        if batch.last:
            self.after_step()
        if self._store is None or upload is None:
            return gradients
        self._batches.append(upload)
        if batch.last:
            self._new.append(self._store.add(self._batches))
            self._batches = []
            for _ in range(min(self._config.server.replay - 1, len(self._again)) if stepped else 0):
                self._replay(*self._again.pop(), slot, tally)
        return gradients

    def begin_test(self) -> None:
        """A test begins, perhaps anew: what was kept of one goes."""
        if self._store is not None:
            self._store.forget(self._store.added)

    def test(self, batch: CutBatch, upload: pb.Batch | None, score: Score) -> None:
        """Adds how well the server half does on an evaluation's upload; the last evaluation is kept too, where there is
        room for it, so that a server half can be trained anew, and tested, with no client present."""
        if self._store is not None and upload is not None and batch.epoch + 1 == self._config.train.epochs:
            self._store.add_test(upload)
        score.add(batch, *self._server.evaluate(batch))
        self._above.test(batch)

    def drop_parts(self) -> None:
        """The batch whose micro-batches were coming in is not coming to its end."""
        self._batches = []

    def learn_held(self, tally: Tally) -> None:
        """Waits no longer for the others of a step's uploads."""
        if self._held:
            self._learn_held(self.course.slot(self._held[-1].client, self._held[-1].step), tally)

    def end_epoch(self, epoch: int, tally: Tally) -> None:
        """What is left to learn from and to replay, and after the last epoch the server's own epochs."""
        course = self.course
        if self._held:
            self._learn_held(course.done - 1, tally)
        while self._again:
            self._replay(*self._again.pop(), course.done - 1, tally)
        seed, replay = self._server.seed, self._config.server.replay
        passes = [(use, in_steps(self._config, shuffled(self._new, seed, epoch, use))) for use in range(1, replay)]
        if epoch + 1 == self._config.train.epochs:
            for use, steps in passes:
                done = 0
                for keys in steps:
                    done += len(keys)
                    slot = course.done + (use - 1) * course.epoch + (done - 1) * course.epoch // len(self._new)
                    self._replay(use, keys, slot, tally)
        else:
            self._again = [(use, keys) for use, steps in passes for keys in steps][::-1]
        self._new = []
        if self._store is not None:
            self._store.flush()
        self._above.end(epoch, tally)

    @property
    def _total_slots(self) -> int:
        return self.course.done + self.course.left + (self._config.server.replay - 1) * self.course.epoch

    def _learn_held(self, slot: int, tally: Tally) -> tuple[Tensor, ...] | None:
        with tally.busy():
            batch = merge(self._held)
        self._held = []
        return server_step(self._config, self._server, batch, slot, self._total_slots, tally, 0)

    def _replay(self, use: int, keys: list[Key], slot: int, tally: Tally) -> None:
        """A step on uploads that have been used `use` times. Those that had to make room in the store are passed by."""
        assert self._store is not None
        for batch in read_step(self._store, keys, tally):
            server_step(self._config, self._server, batch, slot, self._total_slots, tally, use)
        for _ in keys:
            self.after_step()


def in_steps(config: Config, keys: Sequence[Key]) -> list[list[Key]]:
    """The uploads of each step, which are `server.merge` in their order, and what is left over in the last one."""
    size = config.server.merge
    return [list(keys[i : i + size]) for i in range(0, len(keys), size)]


def read_step(store: UploadStore, keys: Sequence[Key], tally: Tally) -> Iterator[CutBatch]:
    """A step's batch, or the micro-batches that it came in; none where all of it had to make room in the store."""
    with tally.busy():
        uploads = [upload for key in keys for upload in store.read(key)]
    for parts in [uploads] if len(keys) > 1 and uploads else [[upload] for upload in uploads]:
        with tally.busy():
            batch = merge([read_batch(part) for part in parts])
        yield batch


def shuffled(keys: Sequence[T], seed: int, epoch: int, use: int) -> list[T]:
    """The uploads of one epoch in the order of their `use`-th replay."""
    draws = torch.Generator().manual_seed(derive_seed(seed, "replay", epoch, use))
    return [keys[int(i)] for i in torch.randperm(len(keys), generator=draws)]
