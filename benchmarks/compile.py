"""What `train.compile` gains: seconds of a training step in one process without it over with it, bf16.

    python benchmarks/compile.py --out results/compile.json          on the CPU; two minutes on two cores
    python benchmarks/compile.py --device cuda --out results/compile-gpu.json
    python benchmarks/compile.py --networks resnet20:stage_1.2:linear --steps 2 --rounds 1         does it run?

Both sides take turns and each gives the median of its steps; the first turn of each, in which kernels are compiled or
steps recorded, is not counted. The pictures are random, of CIFAR-10's size, so no file is needed. A step is the whole
one: drawing the batch, both halves, and the wire within the process. Nothing else should run meanwhile.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from step import RECIPE, Row, at_least_one, augmented_data, first_batches, local_run, say, several, step_seconds

from halfpass.config import Config, ModelConfig
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.run.records import command_line, environment

METHODS = ("decoupled", "conventional")
FORM = "NETWORK:CUT:HEAD"
NETWORKS = "resnet20:stage_1.2:linear,resnet110:stage_2.7:linear"


def measure(network: str, method: str, options: argparse.Namespace) -> Row:
    model, cut, head = network.split(":")
    data = augmented_data()
    shard = first_batches(data, options.steps)
    runs = []
    for compiled in (False, True):
        recipe = replace(RECIPE, precision="bf16", device=options.device, compile=compiled)
        config = Config(method=method, model=ModelConfig(model, cut, head), train=recipe)  # type: ignore[arg-type]
        runs.append(local_run(config, data, shard))
    turns = [[step_seconds(run.train, turn) for run in runs] for turn in range(options.rounds + 1)]
    without, with_it = (
        statistics.median(itertools.chain(*(turn[side] for turn in turns[1:]))) for side in (False, True)
    )
    return {
        "network": model, "cut": cut, "head": head if method == "decoupled" else None, "method": method,
        "device": options.device, "times_faster": without / with_it, "seconds_per_step": with_it,
        "plain_seconds_per_step": without, "steps": options.steps, "rounds": options.rounds,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=several(FORM), default=NETWORKS, help=f"{FORM}, by commas")
    parser.add_argument("--device", default="cpu", help="train.device of both sides")
    parser.add_argument("--steps", type=at_least_one, default=6, help="of a turn")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="counted turns of each side")
    parser.add_argument("--out", type=Path, help="file to write, such as results/compile.json")
    options = parser.parse_args(arguments)
    made = {"environment": environment(), "command": command_line("python benchmarks/compile.py", arguments)}
    rows: list[Row] = []
    try:
        for network, method in itertools.product(options.networks, METHODS):
            say(f"{network}, {method}")
            rows.append(measure(network, method, options))
            print(
                f"{network} {method}: {1e3 * rows[-1]['seconds_per_step']:.2f} ms a step, without "
                f"{1e3 * rows[-1]['plain_seconds_per_step']:.2f}: {rows[-1]['times_faster']:.2f} times",
                flush=True,
            )  # fmt: skip
            if options.out is not None:
                write_json(options.out, {**made, "rows": rows})
    except HalfpassError as error:  # no such network or device, or no compiler
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
