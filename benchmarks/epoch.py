"""Seconds per epoch of halfpass and of a split training loop as one writes it in plain PyTorch, CIFAR-10.

    python benchmarks/epoch.py --data DIR --out results/epoch.json     ResNet-20 and ResNet-110; 20 minutes on two cores
    python benchmarks/epoch.py --data DIR --networks resnet20:stage_1.2 --steps 5 --rounds 1         does it run?

The plain loop is the kind that the paper's scripts have: fp32, eager, contiguous memory, the default optimizer, PIL
pictures that a DataLoader's workers crop, flip and convert one by one, and `loss.item()` after every step; but each
half takes one step per batch, as the method says. halfpass runs the same split with bf16 autocast and `train.compile`,
in one process and in two. All sides take turns, in fresh processes, with all cores: one process has a thread for each,
two share them. An epoch is the first `--steps` batches of 128; seconds are scaled to the 391 of CIFAR-10. Evaluation is
not counted, nor is each process's first epoch.

Exit status: 1 where decoupled in two processes is not 3 times as fast (6 on a GPU) as plain decoupled, or not faster
than conventional; without that runtime nothing is judged. Nothing else should run meanwhile.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from step import BATCH_SIZE, CIFAR_SAMPLES, Row, at_least_one, epoch_seconds_per_step, say, several
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.run import setup
from halfpass.run.records import command_line, environment
from halfpass.run.train import compare

METHODS, RUNTIMES = ("decoupled", "conventional"), ("processes", "local")
STEPS_PER_EPOCH = -(-CIFAR_SAMPLES // BATCH_SIZE)
BARS = {"cpu": 3.0, "cuda": 6.0}  # plain decoupled over halfpass's
FORM = "NETWORK:CUT"
NETWORKS = "resnet20:stage_1.2,resnet110:stage_2.7"  # where the halves take about equally long, and the paper's middle


def configuration(network: str, method: str, options: argparse.Namespace) -> Config:
    model, cut = network.split(":")
    return Config(
        method=method,  # type: ignore[arg-type]
        data=DataConfig("cifar10", path=options.data, limit=options.steps * BATCH_SIZE, crop_padding=4),
        model=ModelConfig(model, cut, "linear"),
        train=TrainConfig(
            epochs=2, batch_size=BATCH_SIZE, lr=0.001, precision="bf16", device=options.device, compile=True,
        ),
    )


# --- The plain loop ---------------------------------------------------------------------------------------------------


class Pictures(TorchDataset[tuple[Tensor, int]]):
    """PIL pictures, each padded by 4 black pixels, cropped, flipped, converted and normalized when it is asked for."""

    def __init__(self, pixels: np.ndarray, labels: list[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.pictures = [Image.fromarray(picture) for picture in pixels]  # from (N, 32, 32, 3) uint8
        self.labels = labels
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        padded = Image.new("RGB", (40, 40))
        padded.paste(self.pictures[index], (4, 4))
        left, top, flipped = (int(torch.randint(0, end, ())) for end in (9, 9, 2))
        picture = padded.crop((left, top, left + 32, top + 32))
        if flipped:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255  # (3, 32, 32)
        return (pixels - self.mean) / self.std, self.labels[index]


class Block(nn.Module):
    """A residual block with the paper's shortcut, as one writes it: He et al. 2015 (arXiv 1512.03385), option A."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(wide)
        self.conv_2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm_2 = nn.BatchNorm2d(wide)
        self.stride, self.more = stride, wide - narrow

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm_2(self.conv_2(relu(self.norm_1(self.conv_1(x)))))
        return relu(out + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))


def plain_halves(network: str, cut: str, classes: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Client half, server half and linear head of a CIFAR ResNet, cut behind stage_S.B."""
    per_stage = (int(network.removeprefix("resnet")) - 2) // 6
    widths = [16, *(width for width in (16, 32, 64) for _ in range(per_stage))]
    blocks = [Block(narrow, wide, 1 if narrow == wide else 2) for narrow, wide in itertools.pairwise(widths)]
    stage, _, block = cut.removeprefix("stage_").partition(".")
    own = (int(stage) - 1) * per_stage + int(block) + 1
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    client = nn.Sequential(*stem, *blocks[:own])
    server = nn.Sequential(*blocks[own:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
    side = 32 // 2 ** (int(stage) - 1)
    return client, server, nn.Sequential(nn.Flatten(), nn.Linear(widths[own] * side * side, classes))


def plain_seconds(config: Config, workers: int) -> float:
    """Seconds per step of the second epoch."""
    data = setup.load_data(config.data)
    inputs = data.train.inputs
    assert isinstance(inputs, torch.Tensor)
    pictures = Pictures(inputs.permute(0, 2, 3, 1).numpy(), data.train.labels.tolist(), data.mean, data.std)
    device = torch.device(config.train.device)
    loader = DataLoader(
        pictures, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    halves = plain_halves(config.model.name, str(config.model.cut), data.classes)
    client, server, head = (half.to(device) for half in halves)
    decoupled = config.method == "decoupled"
    below = [*client.parameters(), *(head.parameters() if decoupled else [])]
    client_optimizer, server_optimizer = (
        torch.optim.SGD(parameters, lr=config.train.lr, momentum=0.9, weight_decay=1e-4)
        for parameters in (below, server.parameters())
    )
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        for x, y in loader:  # (B, 3, 32, 32), (B,)
            inputs, labels = x.to(device), y.to(device)
            client_optimizer.zero_grad()
            server_optimizer.zero_grad()
            activations = client(inputs)
            if decoupled:
                auxiliary = cross_entropy(head(activations), labels)
                auxiliary.backward()
                client_optimizer.step()
                auxiliary.item()
            received = activations.detach().requires_grad_(not decoupled)
            loss = cross_entropy(server(received), labels)
            loss.backward()
            server_optimizer.step()
            if not decoupled:
                activations.backward(received.grad)
                client_optimizer.step()
            loss.item()  # it waits for the GPU, too
    return (time.perf_counter() - began) / len(loader)


# --- All sides --------------------------------------------------------------------------------------------------------


def measure(network: str, options: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Seconds per step by method and by runtime, or `plain`: medians over the rounds."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds):
        say(f"{network}: round {number + 1} of {options.rounds}")
        for method in METHODS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                plain = fresh.submit(plain_seconds, configuration(network, method, options), options.workers).result()
            seconds.setdefault((method, "plain"), []).append(plain)
        for runtime in options.runtimes:
            with tempfile.TemporaryDirectory() as folder:
                config = configuration(network, "decoupled", options)
                config = replace(config, runtime=runtime, out=f"{folder}/runs")  # type: ignore[arg-type]
                for method, run in zip(METHODS, compare(config, METHODS, [0]), strict=True):
                    seconds.setdefault((method, runtime), []).append(epoch_seconds_per_step(run))
    return {side: statistics.median(measured) for side, measured in seconds.items()}


def rows_of(network: str, seconds: Mapping[tuple[str, str], float], options: argparse.Namespace) -> list[Row]:
    """A row per method and runtime; the bars are those of the decoupled one in two processes."""
    rows = []
    for method in METHODS:
        for runtime in options.runtimes:
            faster = seconds[method, "plain"] / seconds[method, runtime]
            over_conventional = seconds[method, runtime] / seconds["conventional", runtime]
            barred = (method, runtime) == ("decoupled", "processes")
            rows.append({
                "network": network, "method": method, "runtime": runtime, "device": options.device,
                "seconds_per_epoch": STEPS_PER_EPOCH * seconds[method, runtime],
                "plain_seconds_per_epoch": STEPS_PER_EPOCH * seconds[method, "plain"],
                "times_faster_than_plain": faster, "over_conventional": over_conventional,
                "met": faster >= BARS[options.device] and over_conventional < 1 if barred else None,
                "steps": options.steps, "rounds": options.rounds, "loader_workers": options.workers,
            })  # fmt: skip
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10, official layout")
    parser.add_argument("--networks", type=several(FORM), default=NETWORKS, help=f"{FORM}, by commas")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES, help="of halfpass")
    parser.add_argument("--steps", type=at_least_one, default=30, help="batches of an epoch that are trained")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="turns of each side")
    parser.add_argument("--workers", type=int, default=2, help="of the plain loop's DataLoader")
    parser.add_argument("--device", default="cpu", choices=list(BARS), help="train.device of all sides")
    parser.add_argument("--out", type=Path, help="file to write, such as results/epoch.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when the bars are met."""
    options = parse(arguments)
    made = {"environment": environment(), "command": command_line("python benchmarks/epoch.py", arguments)}
    rows: list[Row] = []
    try:
        for network in options.networks:
            rows += rows_of(network, measure(network, options), options)
            for row in [row for row in rows if row["network"] == network]:
                ours, plain = row["seconds_per_epoch"], row["plain_seconds_per_epoch"]
                print(
                    f"{network:<20} {row['method']:<12} {row['runtime']:<9} {ours:6.1f} s an epoch, "
                    f"plain {plain:6.1f} s, {plain / ours:.2f} times; over conventional {row['over_conventional']:.3f}",
                    flush=True,
                )  # fmt: skip
            if options.out is not None:
                write_json(options.out, {**made, "rows": rows})
    except HalfpassError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 1 if any(row["met"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
