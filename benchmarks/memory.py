"""The memory that training needs at every cut of ResNet-110: decoupled in micro-batches over conventional.

    python benchmarks/memory.py --out results/memory.json     all 56 cuts, and some times; 25 minutes on two cores
    python benchmarks/memory.py --cuts stem,stage_2.7 --times ''        these cuts, without times, printed only

Each figure is a process's own peak above what it held before its first batch, as halfpass reports it, and each comes
from a fresh process that trains two short epochs, with an evaluation between them, on batches of 128 random pictures of
CIFAR-10's size:

  client      a client process, as `halfpass join` runs it, against a server that trains nothing: it acknowledges every
              batch at once or, conventional, returns gradients of zeros
  co-located  both halves in one process, as `halfpass train --runtime local` runs it

A conventional client must keep the graph of its whole batch until the gradient is back. A decoupled one waits for
nothing, so both halves can work the batch off in micro-batches, each one's graph freed and its activations sent before
the next is computed. The sum of their gradients is the batch's, with one exception: BatchNorm normalizes by the
micro-batch's own means and variances, so at 32 samples these are noisier, as in training with batches of 32; and its
running statistics move once per micro-batch, so they average over fewer batches. A network without BatchNorm learns the
same, to rounding.

Beside it stands gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) on the conventional run, with the number of
segments that keeps least: it works on the whole batch, and computes every segment but a half's last one twice.

Times are seconds per step in one process, all three taking turns, nothing else running. Exit status: 1 where a bar is
missed. On the CPU the resident set holds what malloc keeps, too.
"""

import argparse
import contextlib
import io
import itertools
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nullserver import NullServer
from step import BATCH_SIZE, CLASSES, RECIPE, ROOT, Row, at_least_one
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from halfpass.config import Config, DataConfig, ModelConfig
from halfpass.errors import RunError
from halfpass.files import write_json
from halfpass.networks.models import CifarResNet, build_model
from halfpass.networks.split import Halves
from halfpass.run import setup
from halfpass.run.client_process import join
from halfpass.run.local import LocalRun
from halfpass.run.network import Network, build_network
from halfpass.run.records import command_line, environment
from halfpass.run.train import train

MEMORY_BAR, TIME_BAR = 0.42, 1.05  # decoupled over conventional
MODEL, BLOCKS = "resnet110", 18  # per stage
CUTS = ["stem", *(f"stage_{stage}.{block}" for stage in (1, 2, 3) for block in range(BLOCKS)), "pool"]
TIME_CUTS = ["stage_1.8", "stage_2.7", "stage_3.8"]
SIDES = ("client", "colocated")
COMPARED = ("decoupled", "checkpointed")  # with conventional
METHODS = ("conventional", *COMPARED)
EPOCHS = 2  # an evaluation between them
START_SECONDS = 120.0
FRESH = multiprocessing.get_context("forkserver")  # each process starts as PyTorch's import has left it
FRESH.set_forkserver_preload(["halfpass.run.train"])


@dataclass(frozen=True)
class Measurement:
    """What one process does: a half or both, by one of METHODS."""

    side: str
    method: str
    config: Config

    def peak_bytes(self) -> int:
        """In a fresh process."""
        with ProcessPoolExecutor(1, mp_context=FRESH) as pool:
            if self.side == "colocated":
                return pool.submit(train_colocated, self.config, self.method).result()
            server = NullServer(self.config)
            client = pool.submit(train_client, self.config, self.method, f"127.0.0.1:{server.hub.port}")
            try:
                _, end = server.run(EPOCHS, test=True)
                client.result()
            finally:
                server.hub.stop()
            return end.peak_memory_bytes


# --- What the fresh processes run -------------------------------------------------------------------------------------


def train_colocated(config: Config, method: str) -> int:
    with networks_of(method), contextlib.redirect_stderr(io.StringIO()):
        return int(train(config)["peak_memory_bytes"]["colocated"])


def train_client(config: Config, method: str, address: str) -> None:
    with networks_of(method):
        join(config, address, 0)


def networks_of(method: str) -> contextlib.AbstractContextManager[object]:
    """In it, halfpass builds networks that keep checkpoints, where the method says so."""
    if method != "checkpointed":
        return contextlib.nullcontext()
    build = build_network

    def build_checkpointed(config: Config, sample_shape: tuple[int, ...], *others: Any, **named: Any) -> Network:
        halves = checkpointed_halves(str(config.model.cut), sample_shape, config.train.seed)
        return replace(build(config, sample_shape, *others, **named), halves=halves)

    return mock.patch.object(setup, "build_network", build_checkpointed)


def checkpointed_halves(cut: str, sample_shape: tuple[int, ...], seed: int) -> Halves:
    """The halves that `split` gives, with the same weights."""
    model = build_model(MODEL, sample_shape, CLASSES, seed)
    assert isinstance(model, CifarResNet)
    blocks = [model.stem, *model.stage_1, *model.stage_2, *model.stage_3, model.pool, model.classifier]
    own = CUTS.index(cut) + 1
    return Halves(CheckpointedClient(blocks[:own]), Checkpointed(blocks[own:]))


class Checkpointed(nn.Module):
    """Blocks in segments. What goes from one to the next is kept; the rest is computed again for the backward pass.

    A block keeps four tensors of the size of the one that leaves it, so of n blocks in k segments there are
    k + 4 n / k at once: the least with k = 2 √n.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.segments = min(len(blocks), round(2 * math.sqrt(len(blocks))))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor]:
        kept: Tensor = checkpoint_sequential(self.blocks, self.segments, x, use_reentrant=False)
        return kept


class CheckpointedClient(Checkpointed):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (super().forward(x),)  # type: ignore[return-value]


# --- Rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """How everything is trained, and where the run folders go."""

    train: dict[str, object]  # settings of TrainConfig
    micro_batch: int
    folder: Path
    counter: Iterator[int]

    def config(self, cut: str, method: str, steps: int) -> Config:
        recipe = replace(RECIPE, epochs=EPOCHS, **self.train)  # type: ignore[arg-type]
        decoupled = method == "decoupled"
        return Config(
            method="decoupled" if decoupled else "conventional",
            data=DataConfig(name="benchmarks.step:plain_data", limit=steps * BATCH_SIZE),
            model=ModelConfig(MODEL, cut, "linear"),
            train=replace(recipe, micro_batch=self.micro_batch if decoupled else None),
            out=str(self.folder / str(next(self.counter))),
        )

    def memory(self, cuts: Sequence[str], steps: int, jobs: int) -> Iterator[Row]:
        """A row per cut, in order."""
        with ThreadPoolExecutor(jobs) as pool:
            waiting: dict[str, dict[str, Future[int]]] = {
                cut: {
                    f"{side}_{method}": pool.submit(
                        Measurement(side, method, self.config(cut, method, steps)).peak_bytes
                    )
                    for side in SIDES
                    for method in METHODS
                }
                for cut in cuts
            }
            try:
                for cut, measured in waiting.items():
                    yield memory_row(cut, {name: found.result() / 2**20 for name, found in measured.items()})
            finally:
                pool.shutdown(cancel_futures=True)

    def times(self, cut: str, steps: int, rounds: int) -> Row:
        """Seconds per step of the methods in turn, each a run in this process, and their ratios."""
        runs = {method: self.local_run(cut, method, steps) for method in METHODS}
        check_same(runs["conventional"], runs["checkpointed"])
        measured: dict[str, list[float]] = {method: [] for method in METHODS}
        for epoch, (method, run) in itertools.product(range(rounds + 1), runs.items()):
            began = time.perf_counter()
            run.train(epoch, lambda: None)
            if epoch:
                measured[method].append((time.perf_counter() - began) / steps)
        if self.train["device"] == "cpu":  # cuDNN's gradients differ from one time to the next
            check_same(runs["conventional"], runs["checkpointed"])
        seconds = {method: statistics.median(found) for method, found in measured.items()}
        row: Row = {"cut": cut}
        for method in COMPARED:
            row[f"{method}_over_conventional_time"] = seconds[method] / seconds["conventional"]
        return row | {f"{method}_seconds_per_step": seconds[method] for method in METHODS}

    def local_run(self, cut: str, method: str, steps: int) -> LocalRun:
        config = self.config(cut, method, steps)
        with networks_of(method):
            prepared = setup.prepare(config)
        assert prepared.network is not None
        return LocalRun(config, prepared.data, prepared.shards, prepared.network)


def memory_row(cut: str, mib: dict[str, float]) -> Row:
    """What `results/memory.json` says of one cut."""
    row: Row = {"cut": cut}
    for side, method in itertools.product(SIDES, COMPARED):
        row[f"{side}_{method}_over_conventional"] = mib[f"{side}_{method}"] / mib[f"{side}_conventional"]
    return row | {f"{name}_mib": size for name, size in mib.items()}


def check_same(plain: LocalRun, checkpointed: LocalRun) -> None:
    """Raises RunError unless checkpoints change no weight: then they are a fair measure."""
    ours, theirs = ([*run.clients[0].half.parameters(), *run.server.half.parameters()] for run in (plain, checkpointed))
    if not all(map(torch.equal, ours, theirs)):
        raise RunError("checkpointed", "conventional's weights bit for bit", "others", "make both do the same")


def met(row: Row) -> bool:
    memory = (row.get(f"{side}_decoupled_over_conventional", 0.0) for side in SIDES)
    return max(memory) <= MEMORY_BAR and row.get("decoupled_over_conventional_time", 0.0) <= TIME_BAR


def print_memory(row: Row) -> None:
    print(f"{row['cut']:<12}", end="")
    for side in SIDES:
        peaks = " / ".join(f"{row[f'{side}_{method}_mib']:.0f}" for method in METHODS)
        ratios = (f"{method} {row[f'{side}_{method}_over_conventional']:.3f}" for method in COMPARED)
        print(f"{side} {peaks} MiB, {', '.join(ratios)}", end="; " if side == SIDES[0] else "\n", flush=True)


def print_times(row: Row) -> None:
    ratios = (f"{method} {row[f'{method}_over_conventional_time']:.3f}" for method in COMPARED)
    print(f"{row['cut']:<12}time over conventional: {', '.join(ratios)}", flush=True)


# --- The command ------------------------------------------------------------------------------------------------------


def chosen_cuts(text: str) -> list[str]:
    """`stem,stage_2.7` → cuts, in the order of CUTS; empty for none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CUTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected cuts from stem, stage_1.0 … to pool, found {unknown[0]!r}")
    return [cut for cut in CUTS if cut in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Peak memory at every cut, decoupled over conventional.")
    parser.add_argument("--cuts", type=chosen_cuts, default=CUTS, help="where to measure memory; default: everywhere")
    parser.add_argument("--times", type=chosen_cuts, default=TIME_CUTS, help="where to measure time; '' for nowhere")
    parser.add_argument("--micro-batch", type=at_least_one, default=32, help="train.micro_batch of decoupled")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"], help="train.precision")
    parser.add_argument("--threads", type=at_least_one, default=1, help="train.threads")
    parser.add_argument("--device", default="cpu", help="train.device; a GPU's memory is what PyTorch took from it")
    parser.add_argument("--steps", type=at_least_one, default=2, help="of an epoch, or of one side's turn")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="turns of each side, for the time")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="processes that measure memory side by side")
    parser.add_argument("--out", type=Path, help="file to write, such as results/memory.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when every bar is met."""
    options = parse(arguments)
    command = command_line("python benchmarks/memory.py", arguments)
    out = options.out and options.out.absolute()
    measured_on = environment()
    rows: dict[str, Row] = {}  # by cut

    def keep(row: Row) -> None:  # also what there is so far: a long measurement may be stopped
        rows[row["cut"]] = rows.get(row["cut"], {}) | row
        if out is not None:
            write_json(out, {"environment": measured_on, "command": command, "rows": list(rows.values())})

    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # `data.name` is found from there
        recipe = {"precision": options.precision, "threads": options.threads, "device": options.device}
        bench = Bench(recipe, options.micro_batch, Path(folder), itertools.count())
        print(f"peaks: {' / '.join(METHODS)}")
        for row in bench.memory(options.cuts, options.steps, options.jobs):
            keep(row)
            print_memory(row)
        torch.set_num_threads(options.threads)
        for cut in options.times:
            row = bench.times(cut, options.steps, options.rounds)
            keep(row)
            print_times(row)
    return 0 if all(map(met, rows.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
