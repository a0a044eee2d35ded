"""The epochs of a split run: train, test, write the rows. The same for either runtime."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from halfpass.algorithm.server import Server
from halfpass.config import Config
from halfpass.run.above import Above
from halfpass.run.epoch import Score, Tally, Values
from halfpass.run.live import LiveTable
from halfpass.run.memory import PeakMemory
from halfpass.run.progress import EpochProgress
from halfpass.run.records import Row, RunFolder, epoch_rows, peak_so_far
from halfpass.tasks.task import Task
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.meter import Meter


class SplitRun(Protocol):
    """`local.LocalRun` or `server_process.ServerRun`."""

    server: Server
    task: Task
    steps: list[int]  # per epoch, by client
    above: Above

    def train(self, epoch: int, after_step: Callable[[], None]) -> tuple[dict[int, Tally], Tally]:
        """Trains one epoch of every client; returns the clients' tallies and the server's."""

    def test(self, epoch: int) -> tuple[Score, dict[int, Values]]:
        """(the test's score, the auxiliary head's by client), by the same way as training, codec included."""

    @property
    def watch(self) -> Callable[[], pb.StatusReply] | None:
        """Says how far each process is, where there are several."""

    seconds_before: float  # of the epoch that comes, spent on it in an earlier process

    def ready(self, folder: RunFolder) -> None:
        """Before the first epoch that comes: what was kept is taken up, where the folder has that."""

    def keep(self, folder: RunFolder, epochs: int) -> None:
        """Keeps all that the coming epochs depend on, behind so many of them."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what was kept."""

    def meters(self) -> dict[int, Meter]:
        """By client."""

    def sockets(self) -> Mapping[int, tuple[int, int] | None]:
        """(up, down) bytes at each client's socket so far, evaluation left out; None where there is no telling."""


def run_epochs(config: Config, run: SplitRun, folder: RunFolder) -> list[Row]:
    """All epochs, or those that are left where the folder has kept the state behind one; returns the rows of all, which
    are in the folder by then."""
    memory = PeakMemory(run.server.arithmetic.device)
    rows = folder.load_checkpoint(config, run.load_state)
    done = rows[-1]["epoch"] if rows else 0
    run.ready(folder)
    uploads = sum(-(-steps // config.wire.every) for steps in run.steps)
    title = config.method if config.model.edge_cut is None else f"{config.method}, edge"
    view = None if run.watch is None else LiveTable(run.watch)
    with EpochProgress(title, config.train.epochs, uploads * config.server.replay, view) as progress:
        progress.skip(done * uploads * config.server.replay)
        for epoch in range(done, config.train.epochs):
            began = time.perf_counter()
            clients, server = run.train(epoch, progress.step)
            seconds = run.seconds_before + time.perf_counter() - began
            server.peak_memory_bytes = max(memory.peak_bytes(), peak_so_far(rows, "server"))
            score: Score | None = None
            auxiliary: dict[int, Values] = {}
            if config.train.tests(epoch):
                score, auxiliary = run.test(epoch)
            else:
                run.above.skip_test(epoch)
            new = epoch_rows(
                epoch, seconds, run.task, server, clients, score, auxiliary, run.meters(), run.sockets(), before=rows
            )
            rows += folder.add_rows(new)
            run.keep(folder, epoch + 1)
            progress.epoch(new[-1])
            for k, tally in clients.items():
                if tally.withheld:
                    kept = f"{tally.withheld} of {tally.uploads + tally.withheld} batches not uploaded"
                    progress.say(f"client {k}, epoch {epoch + 1}: {kept}, to stay within wire.budget")
    return rows
