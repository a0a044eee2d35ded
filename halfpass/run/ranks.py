"""One server on several devices: torchrun starts a process for each, of which rank 0 is the server. The others have no
client; they learn along, each from its part of every batch that rank 0 learns from (`algorithm/ranks.py`)."""

import dataclasses
import io
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from halfpass.algorithm.checkpoint import load_training_state, training_state
from halfpass.algorithm.ranks import Part, learn_together, parts_of
from halfpass.algorithm.server import Server, decoupled_step
from halfpass.arithmetic.optimizers import set_learning_rate
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.errors import InputError
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.children import Left
from halfpass.wire import halfpass_pb2 as pb

LOG = logging.getLogger("halfpass")
BROKEN = ("gloo", "nccl")  # what says that another process is gone names one of these
IDLE = timedelta(days=7)  # without a step; a process that ends is noticed at once


def several() -> bool:
    """Whether torchrun has started others like this process."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


@dataclass(frozen=True)
class _Begin:
    """What rank 0 has before the first step that comes: of the first client what the network is made of, and all that
    is trained."""

    join: bytes
    state: bytes


@dataclass(frozen=True)
class _Lesson:
    part: Part
    use: int
    lr: float


class Ranks:
    """This process among those of torchrun's."""

    def __init__(self, config: Config) -> None:
        """Raises InputError for what one process alone can do."""
        check_several(config)
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = config.train.device
        if torch.device(device).type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        self.config = dataclasses.replace(config, train=dataclasses.replace(config.train, device=device))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=IDLE)
        self._orders = dist.new_group(backend="gloo", timeout=IDLE)
        self._join: bytes | None = None

    # -- rank 0

    def lead(self, server: Server, join: pb.Join) -> None:
        """From its next step on, the server learns together with the other processes. `join`: the first client's."""
        self._join, server.learn = join.SerializeToString(), self._learn

    def _learn(self, server: Server, batch: CutBatch, use: int) -> float:
        with self._all_there():
            if server.together is None:
                state = io.BytesIO()
                torch.save(training_state(server.optimizer, server.half), state)
                assert self._join is not None
                self._tell([_Begin(self._join, state.getvalue())] * self.count)
                learn_together(server)
            lr = server.optimizer.param_groups[0]["lr"]
            lessons = [_Lesson(part, use, lr) for part in parts_of(batch, self.count)]
            self._tell(lessons)
            return _learn_part(server, lessons[0])

    def _tell(self, orders: Sequence[_Begin | _Lesson | None]) -> None:
        dist.scatter_object_list([None], list(orders), src=0, group=self._orders)

    @contextmanager
    def _all_there(self) -> Iterator[None]:
        """Where another process is lost, this one leaves, so that clients wait for the run to be gone on with."""
        try:
            yield
        except RuntimeError as error:
            if not any(word in str(error).lower() for word in BROKEN):
                raise
            LOG.error("lost another process of the server: %s", " ".join(str(error).split())[:200])
            raise Left from error

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets the others go."""
        with suppress(RuntimeError):
            self._tell([None] * self.count)
        dist.destroy_process_group()

    # -- the others

    def follow(self) -> None:
        """Learns along until rank 0 ends. Signals are rank 0's, which keeps a state before that."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        server: Server | None = None
        while (order := self._told()) is not None:
            if isinstance(order, _Begin):
                server = self._begin(order)
            else:
                assert server is not None
                _learn_part(server, order)
        dist.destroy_process_group()

    def _told(self) -> Any:
        order: list[Any] = [None]
        with suppress(RuntimeError):  # rank 0 is gone
            dist.scatter_object_list(order, None, src=0, group=self._orders)
        return order[0]

    def _begin(self, order: _Begin) -> Server:
        setup.settle_process(self.config)
        admission = Admission(self.config)
        admission.admit(pb.Join.FromString(order.join))
        assert admission.network is not None
        server = setup.build_server(self.config, admission.network)
        state = torch.load(io.BytesIO(order.state), map_location=server.arithmetic.device)
        load_training_state(state, server.optimizer, server.half)
        learn_together(server)
        return server


def _learn_part(server: Server, lesson: _Lesson) -> float:
    """Returns the loss of the whole batch."""
    set_learning_rate(server.optimizer, lesson.lr)
    return decoupled_step(server, lesson.part.batch, lesson.use, lesson.part)


def check_several(config: Config) -> None:
    """Raises InputError for settings that a server of several processes cannot have."""
    place, remedy = "torchrun with several processes", "change that, or start one process"
    if config.method != "decoupled" or config.train.feedback_every is not None:
        found = config.method if config.method != "decoupled" else "train.feedback_every"
        raise InputError(place, "a server that returns no gradient (method decoupled)", found, remedy)
    if config.model.edge_cut is not None:
        raise InputError(place, "one server", "model.edge_cut", remedy)
    if config.train.compile:
        raise InputError(place, "train.compile false", "true", remedy)
