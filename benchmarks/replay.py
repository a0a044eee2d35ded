"""What using every upload several times costs a training between two processes, beside conventional training.

    python benchmarks/replay.py --data DIR --out results/replay.json     quarter of an hour on two cores
    python benchmarks/replay.py --data DIR --steps 4 --rounds 1          does it run?

ResNet-20 on CIFAR-10, bf16, `train.compile`, a server and a client process with one thread each, cut and head as in
examples/paper/accuracy.yaml. Conventional training, decoupled with each upload used once and decoupled with each used
`--uses` times take turns. An epoch is the first `--steps` batches of 128. Seconds are those of the second of three
epochs: in the first there is nothing to use again, and behind the last come the server's own epochs. Nothing else
should run meanwhile.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from step import BATCH_SIZE, Row, at_least_one, say

from halfpass.config import Config, DataConfig, ModelConfig, ServerConfig, TrainConfig
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.run.records import command_line, environment
from halfpass.run.train import train

CUTS = {"stage_1.2": "tail-2", "stage_2.1": "tail-3", "stage_3.0": "tail-2"}  # and their heads


def seconds_per_step(config: Config) -> tuple[float, float, float]:
    """Of the second epoch, per batch of the client's: wall clock, client busy, server busy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        train(replace(config, out=str(out)))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    client, server = ([r for r in rows if r["process"] == name][1] for name in ("client-0", "server"))
    wall = server["busy_seconds"] + server["waiting_seconds"]
    return tuple(s / client["steps"] for s in (wall, client["busy_seconds"], server["busy_seconds"]))


def measure(cut: str, options: argparse.Namespace) -> list[Row]:
    """A row for each side at one cut, of medians over the rounds."""
    recipe = TrainConfig(
        epochs=3, batch_size=BATCH_SIZE, lr=0.01, precision="bf16", compile=True, threads=1, test_every=3
    )
    once = Config(
        runtime="processes", data=DataConfig("cifar10", path=options.data, limit=options.steps * BATCH_SIZE),
        model=ModelConfig("resnet20", cut, CUTS[cut]), train=recipe,
    )  # fmt: skip
    often = replace(once, server=ServerConfig(replay=options.uses))
    sides = {"conventional": replace(once, method="conventional"), "once": once, "often": often}
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for number in range(options.rounds):
        for name, config in sides.items():
            seconds[name].append(seconds_per_step(config))
            say(f"{cut}, round {number + 1}, {name}: {seconds[name][-1][0]:.4f} s per step")
    medians = {name: [statistics.median(part) for part in zip(*all_, strict=True)] for name, all_ in seconds.items()}
    return [
        {
            "cut": cut, "head": sides[name].model.head if name != "conventional" else None,
            "method": sides[name].method, "replay": sides[name].server.replay,
            "seconds_per_step": wall, "client_busy_seconds_per_step": client, "server_busy_seconds_per_step": server,
            "over_conventional": wall / medians["conventional"][0],
            "over_each_used_once": wall / medians["once"][0] if name == "often" else None,
            "steps": options.steps, "rounds": options.rounds,
        }
        for name, (wall, client, server) in medians.items()
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10, official layout")
    parser.add_argument("--uses", type=at_least_one, default=3, help="server.replay")
    parser.add_argument("--steps", type=at_least_one, default=60, help="batches of an epoch that are trained")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="turns of each side")
    parser.add_argument("--out", type=Path, help="file to write, such as results/replay.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    options = parse(arguments)
    made = {"environment": environment(), "command": command_line("python benchmarks/replay.py", arguments)}
    rows: list[Row] = []
    try:
        for cut in CUTS:
            rows += measure(cut, options)
            if options.out is not None:
                write_json(options.out, {**made, "rows": rows})
    except HalfpassError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    for row in rows:
        print(
            f"{row['cut']:<10} {row['method']:<12} used {row['replay']} times: {row['seconds_per_step']:.4f} s a step "
            f"(client {row['client_busy_seconds_per_step']:.4f}, server {row['server_busy_seconds_per_step']:.4f}), "
            f"{row['over_conventional']:.3f} of conventional"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
