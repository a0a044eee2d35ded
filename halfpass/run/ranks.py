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
from torch import Tensor

from halfpass.algorithm.ranks import Part, learn_together, load_sharded_state, parts_of, shard, sharded_state
from halfpass.algorithm.server import Server, decoupled_step
from halfpass.arithmetic.optimizers import set_learning_rate
from halfpass.config import Config
from halfpass.cut import CutBatch
from halfpass.errors import InputError, RunError
from halfpass.run import setup
from halfpass.run.admission import Admission
from halfpass.run.children import Left
from halfpass.run.network import Network
from halfpass.wire import halfpass_pb2 as pb

LOG = logging.getLogger("halfpass")
BROKEN = ("gloo", "nccl")  # what says that another process is gone names one of these
IDLE = timedelta(days=7)  # without an order; a process that ends is noticed at once
STEP = timedelta(minutes=10)  # for all to begin, or to make a step


def several() -> bool:
    """Whether torchrun has started others like this process."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def _is_of_a_lost_one(error: RuntimeError) -> bool:
    """Whether it says that another process is gone."""
    return any(word in str(error).lower() for word in BROKEN)


# What rank 0 has the others do.


@dataclass(frozen=True)
class _Begin:
    join: bytes  # of the first client: what the network is made of


@dataclass(frozen=True)
class _Load:
    state: bytes


@dataclass(frozen=True)
class _Learn:
    part: Part
    use: int
    lr: float


@dataclass(frozen=True)
class _Evaluate:
    batch: CutBatch


@dataclass(frozen=True)
class _Give:
    """What they have learned."""


_Order = _Begin | _Load | _Learn | _Evaluate | _Give


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
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=STEP)
        self._group = dist.new_group(backend="gloo", timeout=IDLE)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        """Rank 0 lets the others go."""
        with suppress(RuntimeError):
            self._tell([None] * self.count)
        dist.destroy_process_group()

    def lead(self, network: Network, join: pb.Join) -> Server:
        """Rank 0's server, and all others'. `join`: the first client's."""
        with self.all_there():
            self.tell(_Begin(join.SerializeToString()))
            server = self._build(network)
        kind = _ShardedLeader if self.config.server.shard else _Leader
        return kind(**vars(server), ranks=self)

    def tell(self, *orders: _Order) -> None:
        """One to each process, or one to all; to be called where all are there."""
        self._tell(orders if len(orders) == self.count else orders * self.count)

    def _tell(self, orders: Sequence[_Order | None]) -> None:
        dist.scatter_object_list([None], list(orders), src=0, group=self._group)

    @contextmanager
    def all_there(self) -> Iterator[None]:
        """Where another process is lost, this one leaves, so that clients wait for the run to be gone on with."""
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_lost_one(error):
                raise
            LOG.error("lost another process of the server: %s", " ".join(str(error).split())[:200])
            raise Left(why="another process of the server is lost") from error

    def _build(self, network: Network) -> Server:
        sharded = self.config.server.shard
        server = setup.build_server(self.config, network, shard if sharded else None)
        if not sharded:
            learn_together(server)
        return server

    def follow(self) -> None:
        """What the others do until rank 0 ends. Signals are rank 0's, which keeps a state before that."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        setup.settle_process(self.config)
        server: Server | None = None
        try:
            while (order := self._told()) is not None:
                if isinstance(order, _Begin):
                    admission = Admission(self.config)
                    admission.admit(pb.Join.FromString(order.join))
                    assert admission.network is not None
                    server = self._build(admission.network)
                else:
                    assert server is not None
                    with suppress(RunError):  # what is not finite is so for all, and rank 0 says it
                        self._do(server, order)
        except RuntimeError as error:
            if not _is_of_a_lost_one(error):
                raise
            place = f"process {self.rank} of the server"
            raise RunError(place, "the first process", "it is gone", "see what that said") from error
        dist.destroy_process_group()

    def _told(self) -> _Order | None:
        order: list[Any] = [None]
        dist.scatter_object_list(order, None, src=0, group=self._group)
        return order[0]

    def _do(self, server: Server, order: _Load | _Learn | _Evaluate | _Give) -> None:
        if isinstance(order, _Learn):
            learn_part(server, order)
        elif isinstance(order, _Load):
            state = torch.load(io.BytesIO(order.state), map_location="cpu")
            load_sharded_state(server, state) if self.config.server.shard else server.load_state(state)
        elif isinstance(order, _Give):
            sharded_state(server)
        else:
            server.half.eval()
            server.evaluate(order.batch)
            server.half.train()


def learn_part(server: Server, order: _Learn) -> float:
    """Returns the loss of the whole batch."""
    set_learning_rate(server.optimizer, order.lr)
    return decoupled_step(server, order.part.batch, order.use, order.part)


@dataclass
class _Leader(Server):
    """Rank 0's server: it has the others do their part of what it does."""

    ranks: Ranks = dataclasses.field(kw_only=True)
    out_of_step: bool = dataclasses.field(default=False, kw_only=True)

    @contextmanager
    def _with_all(self, *orders: _Order) -> Iterator[None]:
        """What this process does while the others do that. They are in step behind it, and where all raise RunError."""
        self.out_of_step = True
        with self.ranks.all_there():
            self.ranks.tell(*orders)
            try:
                yield
            except RunError:
                self.out_of_step = False
                raise
        self.out_of_step = False

    def learn(self, batch: CutBatch, use: int = 0) -> float:
        lr = self.optimizer.param_groups[0]["lr"]
        orders = [_Learn(part, use, lr) for part in parts_of(batch, self.ranks.count)]
        with self._with_all(*orders):
            return learn_part(self, orders[0])

    def load_state(self, state: dict[str, Any]) -> None:
        with self._with_all(_load(state)):
            super().load_state(state)


@dataclass
class _ShardedLeader(_Leader):
    """One that has a part of the weights alone."""

    def evaluate(self, batch: CutBatch) -> tuple[Tensor, Tensor | None]:
        with self._with_all(_Evaluate(batch)):
            return super().evaluate(batch)

    def state(self) -> dict[str, Any]:
        with self._with_all(_Give()):
            return sharded_state(self)

    def load_state(self, state: dict[str, Any]) -> None:
        with self._with_all(_load(state)):
            load_sharded_state(self, state)

    def weights(self) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self.state()["modules"][0]
        return weights

    def whole(self) -> bool:
        return not self.out_of_step


def _load(state: dict[str, Any]) -> _Load:
    file = io.BytesIO()
    torch.save(state, file)
    return _Load(file.getvalue())


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
