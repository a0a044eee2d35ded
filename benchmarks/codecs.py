"""What each codec costs and saves: speed, size, error and share of a client's step, measured in one run on one thread.

    python benchmarks/codecs.py --data DIR      activations of ResNet-20, trained briefly on CIFAR-10 in that folder
    python benchmarks/codecs.py                 without data: the positive half of normally distributed values
    python benchmarks/codecs.py --rounds 1 --only int2,int2+zstd       does it run?

--out FILE keeps the rows, e.g. results/codecs.json. All sides take turns, and each gives the median of its rounds; the
first round is not counted. Values are those of bf16, as autocast gives them, so that some codecs lose nothing; speeds
count them as float32. The error of an integer codec stands beside that of as many levels spread evenly over each
channel's range. A client's step is that of ResNet-20 up to stage_2.2 with its head, 128 pictures, bf16.
Exit status: 1 where a bar is missed. Nothing else should run meanwhile.
"""

import argparse
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from step import BATCH_SIZE, CLASSES, MIDDLE, Row, at_least_one, first_batches, random_pictures, say, with_precision
from torch import Tensor

from halfpass.algorithm.client import Client, decoupled_step
from halfpass.data.batches import train_batches
from halfpass.data.cifar import CIFAR
from halfpass.data.datasets import Dataset, Samples, load
from halfpass.files import write_json
from halfpass.run import setup
from halfpass.run.network import build_network
from halfpass.run.records import command_line, environment
from halfpass.wire.codec import CODECS
from halfpass.wire.messages import read_tensor, write_tensor

TRAINING_STEPS = 200  # before the activations are taken
BAR = 0.05  # of a client's step


def pictures(path: str | None) -> Dataset:
    if path is not None:
        return load("cifar10", path, limit=None, download=False, image_size=32)
    layout = CIFAR["cifar10"]
    samples = Samples(*random_pictures(BATCH_SIZE, 0))
    return Dataset("random pictures", samples, samples, CLASSES, layout.mean, layout.std, crop_padding=2)


def build_client(data: Dataset) -> Client:
    config = with_precision(replace(MIDDLE, train=replace(MIDDLE.train, lr=0.1)), "bf16")
    return setup.build_client(config, build_network(config, data.train.sample_shape, CLASSES), 0)


def trained_activations(client: Client, data: Dataset, steps: int) -> Tensor:
    """(B, C, H, W), bf16, of the last of so many training steps."""
    batches = train_batches(data, first_batches(data, steps), BATCH_SIZE, seed=0, client=0, epoch=0)
    for step, (x, labels) in enumerate(batches):
        batch, _ = decoupled_step(client, x, labels, 0, step)
    return batch.tensors[0]


def half_normal(like: Tensor) -> Tensor:
    """ReLU of normally distributed values, in the shape, dtype and memory order of `like`."""
    return torch.empty_like(like).copy_(torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).relu())


def medians(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, (name, side) in itertools.product(range(rounds + 1), sides.items()):
        began = time.perf_counter()
        side()
        if number:
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def relative_error(found: Tensor, values: Tensor) -> float:
    """Root of the mean squared error over that of the mean square."""
    return float((found - values).square().mean().sqrt() / values.square().mean().sqrt())


def evenly(values: Tensor, name: str) -> Tensor | None:
    """`values` (B, C, H, W) at the nearest of as many levels as codec `name` has, spread over each channel's range."""
    bits = re.match(r"int(\d+)", name)
    if bits is None:
        return None
    lo, hi = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    step = (hi - lo).clamp_min(1e-30) / (2 ** int(bits[1]) - 1)
    return lo + ((values - lo) / step).round() * step


def measure(names: Sequence[str], values: Tensor, said: str, step: Callable[[], object], rounds: int) -> list[Row]:
    """A row per codec of `values` (B, C, H, W) bf16, `said` in words."""
    full = values.float()
    sides: dict[str, Callable[[], object]] = {"step": step}
    messages = {name: write_tensor(full, name) for name in names}
    buffer = torch.empty_like(full)
    for name, message in messages.items():
        sides[f"{name} encode"] = partial(write_tensor, full, name)
        sides[f"{name} decode"] = partial(read_tensor, message, "benchmark", buffer)
        sides[f"{name} encode bf16"] = partial(write_tensor, values, name)
    seconds = medians(sides, rounds)
    gigabytes = full.nbytes / 1e9
    rows = []
    for name, message in messages.items():
        plain = evenly(full, name)
        share = seconds[f"{name} encode bf16"] / seconds["step"]
        rows.append({
            "codec": name, "values": said,
            "encode_gigabytes_of_float32_per_second": gigabytes / seconds[f"{name} encode"],
            "decode_gigabytes_of_float32_per_second": gigabytes / seconds[f"{name} decode"],
            "encode_gigabytes_of_float32_per_second_from_bf16": gigabytes / seconds[f"{name} encode bf16"],
            "encoded_over_float32": len(message.data) / full.nbytes,
            "encoded_from_bf16_over_float32": len(write_tensor(values, name).data) / full.nbytes,
            "relative_root_mean_square_error": relative_error(read_tensor(message, "benchmark"), full),
            "relative_root_mean_square_error_of_even_levels": None if plain is None else relative_error(plain, full),
            "encode_from_bf16_over_client_step": share, "bar": f"≤ {BAR:g}", "met": share <= BAR,
            "client_seconds_per_step": seconds["step"], "rounds": rounds,
        })  # fmt: skip
    return rows


def some_codecs(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CODECS]:
        raise argparse.ArgumentTypeError(f"expected codecs of {', '.join(CODECS)}, found {unknown[0]!r}")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed, size and error of every codec, measured in one run.")
    parser.add_argument("--data", metavar="DIR", help="folder with CIFAR-10; default: half-normal values")
    parser.add_argument("--rounds", type=at_least_one, default=25, help="measurements of each side")
    parser.add_argument("--only", type=some_codecs, default=list(CODECS), help="codecs to measure, with commas between")
    parser.add_argument("--out", type=Path, help="file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when every bar is met."""
    options = parse(arguments)
    command = command_line("python benchmarks/codecs.py", arguments)
    torch.set_num_threads(1)
    data = pictures(options.data)
    client = build_client(data)
    steps = TRAINING_STEPS if options.data else 1
    say(f"{steps} training steps")
    values = trained_activations(client, data, steps)
    said = f"activations at {MIDDLE.model.cut} of ResNet-20 after {steps} steps on CIFAR-10"
    if not options.data:
        values, said = half_normal(values), "half-normal"
    x, labels = next(train_batches(data, first_batches(data, 1), BATCH_SIZE, seed=0, client=0, epoch=0))
    rows = measure(options.only, values, said, lambda: decoupled_step(client, x, labels, 0, 0), options.rounds)
    print(f"{said}; a client's step takes {rows[0]['client_seconds_per_step']:.4f} s")
    print("codec      GB/s encode, from bf16, decode    of float32, from bf16    relative error    of a step")
    for row in rows:
        print(
            f"{row['codec']:9s} {row['encode_gigabytes_of_float32_per_second']:10.2f} "
            f"{row['encode_gigabytes_of_float32_per_second_from_bf16']:10.2f} "
            f"{row['decode_gigabytes_of_float32_per_second']:8.2f} "
            f"{row['encoded_over_float32']:13.4f} {row['encoded_from_bf16_over_float32']:10.4f} "
            f"{row['relative_root_mean_square_error']:17.5f} {row['encode_from_bf16_over_client_step']:12.4f}"
            f" ({'met' if row['met'] else 'missed'})"
        )  # fmt: skip
    if options.out is not None:
        write_json(options.out, {"environment": environment(), "command": command, "rows": rows})
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
