"""One epoch of either side, step by step: learning rate, step, tally.

`local.py` advances all clients in one thread, `client_process.py` one of them against a connection, so both runtimes
run these very steps.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfpass.algorithm import client as client_side
from halfpass.algorithm import server as server_side
from halfpass.algorithm.client import Client, Pending
from halfpass.algorithm.handover import (
    client_weights,
    load_client_weights,
    load_relay_state,
    relay_memory,
    relay_state,
)
from halfpass.algorithm.server import Server
from halfpass.arithmetic.optimizers import learning_rate, set_learning_rate
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.data.batches import micro_batches
from halfpass.errors import RunError
from halfpass.tasks.task import Task
from halfpass.tree import map_leaves, sample_count
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import Kinds, check_weights, read_weights

Values = dict[str, float]  # metrics by name; NaN where one is not defined on the test set


class Test:
    """A module's outputs on a test set, measured by the task's metrics."""

    __test__ = False  # pytest would collect it for its name

    def __init__(self, task: Task) -> None:
        self._task, self._collection = task, task.metrics()
        self.samples = 0

    def add(self, outputs: Tensor, targets: Any) -> None:
        """A batch's outputs."""
        self._add(self._task.add, outputs, targets)

    def add_answers(self, answers: Tensor, targets: Any) -> None:
        """A batch's probabilities, where they are no one's outputs."""
        self._add(self._task.add_answers, answers, targets)

    def _add(self, add: Callable[[Any, Tensor, Any], None], answers: Tensor, targets: Any) -> None:
        if self.samples == 0:
            self._collection.to(answers.device)
        add(self._collection, answers, map_leaves(lambda leaf: leaf.to(answers.device), targets))
        self.samples += len(answers)

    def values(self) -> Values:
        """All metrics; raises RunError without a sample."""
        if self.samples == 0:
            raise RunError("test", "a test set", "none", "look at what the clients did")
        return self._task.values(self._collection)


class Score:
    """A test of a server half: alone, and together with the auxiliary heads below it, by the mean of both answers.
    Where several clients test, of each by itself too."""

    def __init__(self, task: Task, clients: Collection[int] = ()) -> None:
        self.task = task
        self.alone, self._together = Test(task), Test(task)
        self.sites = {k: Score(task) for k in clients} if len(clients) > 1 else {}

    def add(self, batch: CutBatch, outputs: Tensor, together: Tensor | None) -> None:
        self.alone.add(outputs, batch.targets)
        if together is not None:
            self._together.add_answers(together, batch.targets)
        if batch.client in self.sites:
            self.sites[batch.client].add(batch, outputs, together)

    @property
    def samples(self) -> int:
        return self.alone.samples

    def values(self) -> Values:
        return self.alone.values()

    def joint_values(self) -> Values | None:
        """None without heads, or where the task has no answers that could be averaged."""
        return self._together.values() if self._together.samples else None


Batches = Iterable[tuple[Any, Any]]


@dataclass
class Tally:
    """What one side did in one epoch. On a GPU a clock is read only once the work is done."""

    device: torch.device
    loss_sum: float = 0.0  # over samples
    samples: int = 0
    steps: int = 0
    busy_seconds: float = 0.0  # computing; what is encoded, decoded and sent beside it is not
    learning_rate: float | None = None  # of the last step
    peak_memory_bytes: int | None = None  # so far in the run, of the side's own process
    uploads: int = 0  # of a client: batches that went up
    withheld: int = 0  # of a client: batches that its budget kept from going up

    def add(self, loss: float, samples: int, learning_rate: float | None = None, *, last: bool = True) -> None:
        """A batch, or a micro-batch: a step is done with its `last` one."""
        self.learning_rate = learning_rate
        self.loss_sum += loss * samples
        self.samples += samples
        self.steps += last

    def state(self) -> dict[str, Any]:
        """All but the device."""
        return {name: value for name, value in vars(self).items() if name != "device"}

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.samples if self.samples else math.nan

    @contextmanager
    def busy(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.busy_seconds += time.perf_counter() - began


def tally_of(state: Mapping[str, Any], device: torch.device) -> Tally:
    """The inverse of `Tally.state`."""
    return Tally(device, **state)


class ClientEpoch:
    """A client's pass over its shard, batch by batch, or micro-batch by micro-batch: `forward` gives what goes up,
    `backward` takes what comes down.

    `first_step` and `total_steps` place it in the learning-rate schedule.
    """

    def __init__(
        self, config: Config, client: Client, batches: Batches, epoch: int, first_step: int, total_steps: int,
        done: Tally | None = None,
    ) -> None:  # fmt: skip
        """`done`: what has been done of it, where `batches` are those behind that."""
        self.tally = Tally(client.arithmetic.device) if done is None else done
        self.epoch, self._config, self._client = epoch, config, client
        self.place = {"first_step": first_step, "total_steps": total_steps}  # in the learning-rate schedule
        self._first_step, self._total_steps = first_step, total_steps
        self._parts = _micro_batches(batches, config.train.micro_batch)
        self._pending: Pending | None = None

    def forward(self, until: int) -> CutBatch | None:
        """The next batch or micro-batch at the cut, or None at step `until`, where the epoch or a round of it ends. A
        decoupled client has learned from it by then: has added its gradients to those of its batch, whose last one
        makes the step."""
        if self.tally.steps == until:
            return None
        with self.tally.busy():  # drawing the batch is the client's work too
            part = next(self._parts, None)
            if part is None:
                return None
            x, targets, before, after = part
            step = self.tally.steps
            recipe = self._config.train
            lr = learning_rate(recipe.schedule, recipe.lr, self._first_step + step, self._total_steps)
            lr *= self._config.clients.lr_scale
            set_learning_rate(self._client.optimizer, lr)
            if self._config.returns_gradient(step):
                self._pending = client_side.conventional_forward(self._client, x, targets, self.epoch, step)
                batch, loss = self._pending.batch, self._pending.local_loss
            else:
                batch, loss = client_side.decoupled_step(
                    self._client, x, targets, self.epoch, step, before, after
                )
            self.tally.add(loss, len(batch), lr, last=batch.last)
            return batch

    def backward(self, gradients: tuple[Tensor, ...]) -> None:
        """Learns from the gradients of the last batch, where the server returns them."""
        assert self._pending is not None
        with self.tally.busy():
            client_side.conventional_backward(self._client, self._pending, gradients)
            self._pending = None


def _micro_batches(batches: Batches, size: int | None) -> Iterator[tuple[Any, Any, int, int]]:
    """(x, targets, samples of the batch before these, samples after them)"""
    for x, targets in batches:
        samples = sample_count(targets)
        for part in micro_batches(samples, size):
            whole = part.stop - part.start == samples
            parts = (x, targets) if whole else (_part(x, part), _part(targets, part))
            yield *parts, part.start, samples - part.stop


def _part(tree: Any, part: slice) -> Any:
    return map_leaves(lambda leaf: leaf[part], tree)


def test_epoch(client: Client, batches: Batches, epoch: int, task: Task) -> Iterator[tuple[CutBatch, Test | None]]:
    """The cut batches of the test set, each with what the auxiliary head answered so far (None without a head)."""
    client_side.set_training(client, False)
    test = None if client.head is None else Test(task)
    for step, (x, targets) in enumerate(batches):
        batch, outputs = client_side.evaluate(client, x, targets, epoch, step)
        if test is not None and outputs is not None:
            test.add(outputs, targets)
        yield batch, test
    client_side.set_training(client, True)


def server_step(
    config: Config, server: Server, batch: CutBatch, number: int, total_steps: int, tally: Tally, use: int = 0
) -> tuple[Tensor, ...] | None:
    """Trains the server half on one batch or micro-batch, used `use` times before, as step `number` of `total_steps` of
    the schedule; returns what goes back: gradients, or nothing."""
    with tally.busy():
        lr = learning_rate(config.train.schedule, config.train.lr, number, total_steps)
        set_learning_rate(server.optimizer, lr)
        gradients: tuple[Tensor, ...] | None = None
        if use == 0 and config.returns_gradient(batch.step):
            gradients, loss = server_side.conventional_step(server, batch)
        else:
            loss = server.learn(batch, use)
        tally.add(loss, len(batch), lr, last=batch.last)
    return gradients


def handed_over(config: Config, client: Client) -> dict[str, Tensor]:
    """What a client gives back after its turn."""
    return relay_state(client) if config.clients.topology == "relay" else client_weights(client)


class HandedOver:
    """Reads client halves that are handed over: of this network's names and shapes, which is looked at before anything
    is decoded, and finite, but for infinities that were there at the start, such as a mask's among the buffers."""

    def __init__(self, config: Config, client: Client | None) -> None:
        """`client`: one that has not trained yet; None where nothing is handed over."""
        template = {} if client is None else client_weights(client)
        hands = client is not None and config.clients.topology != "independent" and config.clients.count > 1
        self.weights: Kinds = {n: (tuple(v.shape), v.dtype) for n, v in template.items()} if hands else {}
        self.memory: Kinds = relay_memory(client) if client and hands and config.clients.topology == "relay" else {}
        """What the optimizer may remember beside them."""
        self._infinite = {n: v for n, v in template.items() if v.is_floating_point() and not v.isfinite().all()}

    def read(self, place: str, messages: Sequence[pb.Tensor], remedy: str) -> dict[str, Tensor]:
        """What `place` has sent; raises RunError where it is something else, `remedy` for NaN."""
        check_weights(place, messages, self.weights, self.memory)
        weights = read_weights(messages)
        for name, value in weights.items():
            known = self._infinite.get(name)
            sound = value.isfinite() if known is None else value.isfinite() | (value == known)
            if value.is_floating_point() and not sound.all():
                raise RunError(f"{place}, {name}", "finite weights", "NaN or infinity", remedy)
        return weights


def take_over(config: Config, client: Client, state: dict[str, Tensor]) -> None:
    """Loads what `Handover.give` gave, if anything."""
    if state:
        load: Callable[[Client, dict[str, Tensor]], None] = load_client_weights
        if config.clients.topology == "relay":
            load = load_relay_state
        load(client, state)
