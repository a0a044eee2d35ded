"""What TLS, acknowledged durability and checkpoints cost a decoupled training between two processes, over loopback and
over links of two bandwidths.

    python benchmarks/trust.py --out results/trust.json      an hour on two cores, quiet
    python benchmarks/trust.py --quick                       few steps, printed only: does it run?

ResNet-20 where its halves take equally long, so that both cores have work; made-up pictures. A training has two epochs,
of which the second counts. A training with mutual TLS and a checkpoint every 100 steps, which is the default, and one
with neither take turns, `--rounds` of each; what counts is the median of the rounds' ratios.
Exit status: 1 where one is above its bar.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from overlap import EPOCHS, LEAST_STEPS, Link, joining, serving, wait_for
from overlap import training as over_link
from step import BATCH_SIZE, PLAIN_SAMPLES, RECIPE, ROOT, Row, epoch_seconds_per_step, say

from halfpass.commands.certs import make_certificates
from halfpass.config import CheckpointConfig, Config, DataConfig, ModelConfig, TlsConfig
from halfpass.files import write_json
from halfpass.run.records import command_line, environment

WAYS: dict[str, tuple[Link | None, float]] = {  # link, and the bar
    "loopback": (None, 1.03), "1 Gbit/s": (Link(1e9, 0.0), 1.08), "100 Mbit/s": (Link(100e6, 0.0), 1.03),
}  # fmt: skip


def seconds_per_step(config: Config, way: Link | None) -> float:
    if way is not None:
        return over_link(config, way)
    with serving(config) as (children, port):
        children.append(joining(config, f"127.0.0.1:{port}"))
        wait_for(children)
    return epoch_seconds_per_step(config.folder)


def measure(config: Config, name: str, rounds: int, folder: Path) -> Row:
    """Both in turn, the other one first in every second round."""
    way, bar = WAYS[name]
    found: dict[str, list[float]] = {"plain": [], "trusted": []}
    for number in range(rounds):
        for kind in ("plain", "trusted") if number % 2 == 0 else ("trusted", "plain"):
            tls = TlsConfig(folder=str(folder / "keys")) if kind == "trusted" else TlsConfig()
            kept = CheckpointConfig(every=100 if kind == "trusted" else 0)
            out = folder / f"{name.replace('/', ' per ')}-{kind}-{number}"
            found[kind].append(seconds_per_step(replace(config, tls=tls, checkpoint=kept, out=str(out)), way))
            say(f"{name}, {kind}: {1000 * found[kind][-1]:.1f} ms per step")
    ratios = sorted(trusted / plain for trusted, plain in zip(found["trusted"], found["plain"], strict=True))
    return {
        "link": name, "rounds": rounds, "plain_seconds_per_step": statistics.median(found["plain"]),
        "trusted_seconds_per_step": statistics.median(found["trusted"]),
        "trusted_over_plain": statistics.median(ratios),
        "lowest": ratios[0], "highest": ratios[-1], "bar": bar,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What TLS and checkpoints cost a decoupled training.")
    parser.add_argument("--rounds", type=int, default=7, help="of each side, in turn")
    parser.add_argument("--steps", type=int, default=PLAIN_SAMPLES // BATCH_SIZE, help="per epoch")
    parser.add_argument("--out", type=Path, help="file to write, such as results/trust.json")
    parser.add_argument("--quick", action="store_true", help="one round of few steps, to see that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.steps = 1, LEAST_STEPS
    torch.set_num_threads(1)
    config = Config(
        runtime="processes", data=DataConfig(name="benchmarks.step:plain_data", limit=options.steps * BATCH_SIZE),
        model=ModelConfig("resnet20", "stage_1.2", "linear"),
        train=replace(RECIPE, epochs=EPOCHS, precision="bf16", threads=1),
    )  # fmt: skip
    made = {"environment": environment(), "command": command_line("python benchmarks/trust.py", arguments)}
    out, rows = options.out and options.out.absolute(), list[Row]()
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:
        make_certificates(Path(folder) / "keys", clients=1)
        for name in WAYS:
            rows.append(measure(config, name, options.rounds, Path(folder)))
            if out is not None:
                write_json(out, {**made, "rows": rows})
    for row in rows:
        print(f"{row['link']:<12}{row['trusted_over_plain']:>8.3f}  ({row['lowest']:.3f} to {row['highest']:.3f})")
    return 0 if options.quick or all(row["trusted_over_plain"] <= row["bar"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
