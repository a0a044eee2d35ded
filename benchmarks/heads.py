"""What each auxiliary head costs a client: FLOPs, parameters and memory, at three cuts of ResNet-20.

    python benchmarks/heads.py --out results/heads.json     all heads; two minutes on two cores, nothing else running
    python benchmarks/heads.py --cuts stage_2.1 --heads linear tail-3     these, printed only

FLOPs are of one sample's forward pass, as `halfpass cuts` counts them. Memory is a client process's own peak above what
it held before its first batch, as in memory.py: batches of 128 random pictures of CIFAR-10's size, bf16, against a
server that trains nothing; whole batches, and in micro-batches of 32. Beside it stands a conventional client, which has
no head, and keeps its graph until the gradient is back. A resident set varies from one time to the next by up to a
tenth.
"""

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from memory import EPOCHS, Measurement
from step import BATCH_SIZE, CLASSES, RECIPE, ROOT, Row, at_least_one

from halfpass.config import Config, DataConfig, ModelConfig
from halfpass.files import write_json
from halfpass.networks.cut_table import CutRow, cut_table
from halfpass.networks.heads import HEADS
from halfpass.run.records import command_line, environment

MODEL, SHAPE, CUTS = "resnet20", (3, 32, 32), ["stage_1.2", "stage_2.1", "stage_3.0"]
MICRO_BATCH = 32


def head_row(cut: str, head: str, costs: CutRow, whole: int, micro: int, conventional: int) -> Row:
    """A head at a cut; bytes of a decoupled client in whole batches and micro-batches, and of a conventional one."""
    assert costs.head_flops is not None
    return {
        "cut": cut, "head": head, "client_half_MFLOP": costs.client_flops / 1e6, "head_MFLOP": costs.head_flops / 1e6,
        "head_over_client_half": costs.head_flops / costs.client_flops, "head_parameters": costs.head_parameters,
        "client_memory_MB": whole / 1e6, "over_conventional": whole / conventional,
        "in_micro_batches_MB": micro / 1e6, "micro_batches_over_conventional": micro / conventional,
        "conventional_memory_MB": conventional / 1e6,
    }  # fmt: skip


def config(cut: str, head: str | None, micro_batch: int | None, steps: int, out: Path) -> Config:
    """A client's; without a head it is a conventional one."""
    return Config(
        method="decoupled" if head else "conventional",
        data=DataConfig(name="benchmarks.step:plain_data", limit=steps * BATCH_SIZE),
        model=ModelConfig(MODEL, cut, head or "linear"),
        train=replace(RECIPE, epochs=EPOCHS, precision="bf16", threads=1, micro_batch=micro_batch),
        out=str(out),
    )


def rows(cuts: Sequence[str], heads: Sequence[str], steps: int, jobs: int, folder: Path) -> Iterator[Row]:
    """In order, as they are measured."""
    numbers = itertools.count()

    def peak(cut: str, head: str | None = None, micro_batch: int | None = None) -> int:
        measured = config(cut, head, micro_batch, steps, folder / str(next(numbers)))
        return Measurement("client", measured.method, measured).peak_bytes()

    tables = {head: cut_table(MODEL, SHAPE, CLASSES, head) for head in heads}
    costs = {(name, head): row for head in heads for row in tables[head] for name in (row.layer, *row.also)}
    with ThreadPoolExecutor(jobs) as pool:
        conventional = {cut: pool.submit(peak, cut) for cut in cuts}
        waiting = [
            (cut, head, pool.submit(peak, cut, head), pool.submit(peak, cut, head, MICRO_BATCH))
            for cut in cuts
            for head in heads
        ]
        try:
            for cut, head, whole, micro in waiting:
                yield head_row(cut, head, costs[cut, head], whole.result(), micro.result(), conventional[cut].result())
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="What each auxiliary head costs a client.")
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=CUTS, help="default: all")
    parser.add_argument("--heads", nargs="+", choices=[*HEADS], default=[*HEADS], help="default: all")
    parser.add_argument("--steps", type=at_least_one, default=2, help="of an epoch")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="processes that measure side by side")
    parser.add_argument("--out", type=Path, help="file to write, such as results/heads.json")
    options = parser.parse_args(arguments)
    out = options.out and options.out.absolute()
    made = {"environment": environment(), "command": command_line("python benchmarks/heads.py", arguments)}
    found: list[Row] = []
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # `data.name` is found from there
        for one in rows(options.cuts, options.heads, options.steps, options.jobs, Path(folder)):
            found.append(one)
            print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in one.items()), flush=True)  # fmt: skip
            if out is not None:  # what there is so far: a long measurement may be stopped
                write_json(out, {**made, "rows": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
