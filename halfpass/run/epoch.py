"""One epoch of either side, step by step: learning rate, step, check, tally.

`local.py` advances all clients in one thread, `client_process.py` one of them against a connection, so both runtimes
run these very steps.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpass.algorithm import client as client_side
from halfpass.algorithm import server as server_side
from halfpass.algorithm.client import Client, Pending
from halfpass.algorithm.handover import client_weights, load_client_weights, load_relay_state, relay_state
from halfpass.algorithm.server import Server
from halfpass.arithmetic.optimizers import learning_rate, set_learning_rate
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.data.batches import micro_batches
from halfpass.errors import RunError


@dataclass
class Score:
    """A test of a server half, alone and together with the auxiliary heads below it."""

    samples: int = 0
    right: int = 0
    right_together: int | None = None  # by the mean of both class probabilities; None without heads

    def add(self, samples: int, right: int, right_together: int | None) -> None:
        self.samples += samples
        self.right += right
        if right_together is not None:
            self.right_together = (self.right_together or 0) + right_together

    @property
    def accuracy(self) -> float:
        return self.right / self.samples

    @property
    def joint_accuracy(self) -> float | None:
        return None if self.right_together is None else self.right_together / self.samples


Batches = Iterable[tuple[Tensor, Tensor]]


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


class ClientEpoch:
    """A client's pass over its shard, batch by batch, or micro-batch by micro-batch: `forward` gives what goes up,
    `backward` takes what comes down.

    `first_step` and `total_steps` place it in the learning-rate schedule.
    """

    def __init__(
        self, config: Config, client: Client, batches: Batches, epoch: int, first_step: int, total_steps: int
    ) -> None:
        self.tally = Tally(client.arithmetic.device)
        self.epoch, self._config, self._client = epoch, config, client
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
            x, labels, before, after = part
            step = self.tally.steps
            recipe = self._config.train
            lr = learning_rate(recipe.schedule, recipe.lr, self._first_step + step, self._total_steps)
            lr *= self._config.clients.lr_scale
            set_learning_rate(self._client.optimizer, lr)
            if self._config.returns_gradient(step):
                self._pending = client_side.conventional_forward(self._client, x, labels, self.epoch, step)
                batch, loss = self._pending.batch, self._pending.local_loss
            else:
                batch, loss = client_side.decoupled_step(
                    self._client, x, labels, self.epoch, step, before, after
                )
            if self._client.head is not None:
                check_finite(loss, f"client {self._client.index}, auxiliary loss", self.epoch, step)
            self.tally.add(loss, len(batch), lr, last=batch.last)
            return batch

    def backward(self, gradients: tuple[Tensor, ...]) -> None:
        """Learns from the gradients of the last batch, where the server returns them."""
        assert self._pending is not None
        with self.tally.busy():
            client_side.conventional_backward(self._client, self._pending, gradients)
            self._pending = None


def _micro_batches(batches: Batches, size: int | None) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """(x, labels, samples of the batch before these, samples after them)"""
    for x, labels in batches:
        for part in micro_batches(len(labels), size):
            yield x[part], labels[part], part.start, len(labels) - part.stop


def test_epoch(client: Client, batches: Batches, epoch: int) -> Iterator[tuple[CutBatch, int]]:
    """The cut batches of the test set, each with the number of samples that the auxiliary head gets right."""
    client_side.set_training(client, False)
    for step, (x, labels) in enumerate(batches):
        yield client_side.evaluate(client, x, labels, epoch, step)
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
            loss = server_side.decoupled_step(server, batch, use)
        check_finite(loss, f"server, batch of client {batch.client}", batch.epoch, batch.step)
        tally.add(loss, len(batch), lr, last=batch.last)
    return gradients


def check_finite(loss: float, side: str, epoch: int, step: int) -> None:
    """Raises RunError that names side, epoch and step (both counted from 1, as the progress shows them)."""
    if not math.isfinite(loss):
        raise RunError(f"{side}, epoch {epoch + 1}, step {step + 1}", "a finite loss", f"{loss}", "lower train.lr")


def handed_over(config: Config, client: Client) -> dict[str, Tensor]:
    """What a client gives back after its turn."""
    return relay_state(client) if config.clients.topology == "relay" else client_weights(client)


def take_over(config: Config, client: Client, state: dict[str, Tensor]) -> None:
    """Loads what `Handover.give` gave, if anything."""
    if state:
        load: Callable[[Client, dict[str, Tensor]], None] = load_client_weights
        if config.clients.topology == "relay":
            load = load_relay_state
        load(client, state)
