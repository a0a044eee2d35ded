"""What somebody who knows the client half can tell of pictures from their activations.

    python benchmarks/inversion.py --data DIR --out results/inversion.json   CIFAR-10 in that folder; 20 minutes, 1 core
    python benchmarks/inversion.py --quick                                   digits, a few seconds, printed only

A small decoupled run trains on some of the training pictures. The attacker has others of them, pushes them through the
client half and the codec, and trains a decoder that rebuilds a picture from what crosses. Then come activations of
test pictures, which neither has trained on. For each the attacker

- rebuilds the picture: `ssim` is the mean structural similarity (Wang et al. 2004) of rebuilt and real ones;
- says which of the test pictures it is, all of which are at hand: the one nearest to the rebuilt one (`identified`),
  or the one whose own activations, through the half that the attacker has, are nearest (`by activations`). `augmented`
  are pictures cropped and flipped as in training; the rebuilt one is compared with all pictures in all positions.

An attacker who does not know the client half, but the settings, trains one of its own on its own pictures: from the
same seed, or as the control from another one. The last row is of no activations at all: the mean picture, and a guess.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from step import Row, say
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics.functional.image import structural_similarity_index_measure as similarity

from halfpass.algorithm.client import Client, evaluate, set_training
from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig
from halfpass.data.batches import crop_and_flip, draw_crop_and_flip, test_batches
from halfpass.data.datasets import Dataset, Samples, load
from halfpass.errors import HalfpassError
from halfpass.files import write_json
from halfpass.report.tables import plain_cell
from halfpass.run.local import LocalRun
from halfpass.run.network import network_of
from halfpass.run.records import command_line, environment
from halfpass.run.setup import task_of
from halfpass.wire.loopback import Loopback
from halfpass.wire.messages import write_batch

BATCH_SIZE = 128
KNOWN, SETTINGS, ANOTHER_SEED = "the client half", "the settings", "the settings but the seed"
KNOWLEDGE = (KNOWN, SETTINGS, ANOTHER_SEED)


@dataclass(frozen=True)
class Trial:
    """One data set and network, and how much of it is used."""

    config: Config
    cuts: tuple[str, ...]
    codecs: tuple[str, ...]
    guessed_at: tuple[str, ...]  # cuts at which the attacker may also not know the client half
    trained: int  # pictures of the run
    own: int  # other pictures, of the attacker
    tested: int
    augmented: int  # how many of those are also cropped and flipped
    passes: int  # of the decoder over the attacker's pictures
    width: int  # of the decoder at the pictures' own size
    white: float  # the largest value of a pixel
    sigma: float  # of SSIM's window; 1.5 is usual


def cifar(path: str, precision: str) -> Trial:
    train = TrainConfig(epochs=4, batch_size=BATCH_SIZE, precision=precision, threads=1)  # type: ignore[arg-type]
    config = Config(data=DataConfig("cifar10", path), model=ModelConfig("resnet20", head="linear"), train=train)
    cuts, codecs = ("stage_1.2", "stage_2.1", "stage_3.0"), ("none", "int8", "int2")
    return Trial(config, cuts, codecs, ("stage_2.1",), 15_000, 12_000, 2000, 500, 6, 32, 255, 1.5)


def digits() -> Trial:
    train = TrainConfig(epochs=4, batch_size=32, lr=0.1, threads=1)
    config = Config(data=DataConfig("digits"), model=ModelConfig("digits-cnn", head="linear"), train=train)
    return Trial(config, ("block_2",), ("none",), ("block_2",), 700, 700, 200, 0, 8, 32, 16, 0.5)


# --- The run, and what crosses ----------------------------------------------------------------------------------------


def trained_client(config: Config, data: Dataset, samples: Samples) -> tuple[Client, float]:
    """A decoupled run of one client on `samples`; its client in evaluation mode, and the server half's accuracy."""
    data = replace(data, train=samples)
    run = LocalRun(config, data, [samples], network_of(config, data, task_of(config, data)))
    for epoch in range(config.train.epochs):
        run.train(epoch, lambda: None)
    score, _ = run.test(config.train.epochs - 1)
    set_training(run.clients[0], False)
    return run.clients[0], score.values()["accuracy"]


def received(client: Client, data: Dataset, pictures: Tensor, codec: str) -> Tensor:
    """(N, ...): what a server decodes of the pictures (N, C, H, W) uint8, which are not augmented."""
    wire, parts = Loopback(codec), []
    samples = Samples(pictures, torch.zeros(len(pictures), dtype=torch.int64))
    for step, (x, labels) in enumerate(test_batches(data, samples, BATCH_SIZE)):
        batch, _ = evaluate(client, x, labels, 0, step)
        (tensor,) = wire.batch(write_batch(batch, codec, test=True))[0].tensors
        parts.append(tensor.clone())
    return torch.cat(parts)


# --- Pictures again ---------------------------------------------------------------------------------------------------


def decoder(crossing: Sequence[int], picture: Sequence[int], width: int) -> nn.Sequential:
    """Activations (B, C, h, w) → pictures (B, C, H, W) in 0..1: convolutions, twice as large each time."""
    (channels, size, _), (colours, full, _) = crossing, picture
    layers: list[nn.Module] = []

    def add(inner: int, outer: int) -> None:
        layers.extend((nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()))

    wide = width * full // size
    add(channels, wide)
    while size < full:
        add(wide, 2 * wide)
        layers.append(nn.PixelShuffle(2))
        size, wide = 2 * size, wide // 2
    add(wide, width)
    return nn.Sequential(*layers, nn.Conv2d(width, colours, 3, padding=1), nn.Sigmoid())


def trained_decoder(activations: Tensor, pictures: Tensor, trial: Trial) -> nn.Module:
    """Learns to make `pictures` (N, C, H, W) uint8 of `activations`, from a fixed seed."""
    torch.manual_seed(0)
    model = decoder(activations.shape[1:], pictures.shape[1:], trial.width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = trial.passes * -(-len(pictures) // BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(trial.passes):
        for chosen in torch.randperm(len(pictures)).split(BATCH_SIZE):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", enabled=trial.config.train.precision == "bf16"):
                rebuilt = model(activations[chosen])
            mse_loss(rebuilt.float(), pictures[chosen] / trial.white).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def rebuilt(model: nn.Module, activations: Tensor) -> Tensor:
    """(N, C, H, W) in 0..1."""
    return torch.cat([model(part.float()) for part in activations.split(BATCH_SIZE)])


def mean_similarity(found: Tensor, pictures: Tensor, sigma: float) -> float:
    """SSIM of pictures in 0..1, their mean."""
    pairs = zip(found.split(500), pictures.split(500), strict=True)
    parts = [similarity(a, b, sigma=sigma, data_range=1.0, reduction="none") for a, b in pairs]
    return float(torch.cat([torch.as_tensor(part) for part in parts]).mean())


# --- Which one is it? -------------------------------------------------------------------------------------------------


def squared_distances(found: Tensor, known: Tensor) -> Tensor:
    """(M, N): (M, ...) from (N, ...), less what is the same in a row."""
    found, known = found.flatten(1).float(), known.flatten(1).float()
    return known.square().sum(1) - 2 * found @ known.T


def percent_found(distances: Tensor, right: Tensor) -> float:
    """In percent."""
    return 100 * int((distances.argmin(1) == right).sum()) / len(right)


def positions(padding: int) -> Iterator[tuple[int, int, bool]]:
    """All that `draw_crop_and_flip` may draw."""
    return itertools.product(range(-padding, padding + 1), range(-padding, padding + 1), (False, True))


def moved(pictures: Tensor, top: int, left: int, flip: bool) -> Tensor:
    """(N, C, H, W) uint8, all in the same way."""
    count = len(pictures)
    tops, lefts, flips = torch.full((count,), top), torch.full((count,), left), torch.full((count,), flip)
    return crop_and_flip(pictures.permute(0, 2, 3, 1), tops, lefts, flips).permute(0, 3, 1, 2)


def distances_in_any_position(found: Tensor, pictures: Tensor, padding: int, white: float) -> Tensor:
    """(M, N): each rebuilt picture's from each picture, where that is nearest."""
    nearest = torch.full((len(found), len(pictures)), torch.inf)
    for position in positions(padding):
        nearest = torch.minimum(nearest, squared_distances(found, moved(pictures, *position) / white))
    return nearest


# --- The attack -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """uint8, (N, C, H, W)."""

    own: Tensor  # the attacker's
    tested: Tensor
    augmented: Tensor  # the first of those, cropped and flipped
    data: Dataset


def deal(data: Dataset, trial: Trial) -> tuple[Samples, Samples, Pictures]:
    """The run's training samples, others that are the attacker's, and what is attacked."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    run, own = (data.train.take(part) for part in (order[: trial.trained], order[-trial.own :]))
    tested = data.test.take(torch.arange(trial.tested)).inputs
    assert isinstance(tested, Tensor)
    assert isinstance(own.inputs, Tensor)
    some = tested[: trial.augmented]
    if trial.augmented:
        moves = draw_crop_and_flip(len(some), data.crop_padding or 0, torch.Generator().manual_seed(0))
        some = crop_and_flip(some.permute(0, 2, 3, 1), *moves).permute(0, 3, 1, 2)
    return run, own, Pictures(own.inputs, tested, some, data)


def attack(victim: Client, half: Client, codec: str, pictures: Pictures, trial: Trial) -> dict[str, float | None]:
    """What is found by one who takes `half` for the victim's."""
    data, numbers = pictures.data, torch.arange(trial.tested)
    model = trained_decoder(received(half, data, pictures.own, codec), pictures.own, trial)
    crossing, real = received(victim, data, pictures.tested, codec), pictures.tested / trial.white
    found = rebuilt(model, crossing)
    of_augmented = None
    if trial.augmented:
        again = rebuilt(model, received(victim, data, pictures.augmented, codec))
        distances = distances_in_any_position(again, pictures.tested, data.crop_padding or 0, trial.white)
        of_augmented = percent_found(distances, numbers[: trial.augmented])
    by_activations = squared_distances(crossing, received(half, data, pictures.tested, "none"))
    return {
        "ssim": mean_similarity(found, real, trial.sigma),
        "identified_%": percent_found(squared_distances(found, real), numbers),
        "identified_augmented_%": of_augmented, "identified_by_activations_%": percent_found(by_activations, numbers),
    }  # fmt: skip


def rows(trial: Trial) -> Iterator[Row]:
    """In order, as they are found."""
    said = trial.config.data
    data = load(said.name, said.path)
    run, own, pictures = deal(data, trial)
    for cut in trial.cuts:
        config = replace(trial.config, model=replace(trial.config.model, cut=cut))
        victim, accuracy = trained_client(config, data, run)
        values = int(received(victim, data, pictures.tested[:1], "none").numel())
        attacks = [(KNOWN, codec) for codec in trial.codecs]
        attacks += [(knows, "none") for knows in KNOWLEDGE[1:] if cut in trial.guessed_at]
        for knows, codec in attacks:
            half = victim if knows == KNOWN else guessed(config, data, own, same_seed=knows == SETTINGS)
            yield {
                "cut": cut, "values_per_picture": values, "run_accuracy_%": 100 * accuracy, "attacker_knows": knows,
                "codec": codec, **attack(victim, half, codec, pictures, trial), "pictures": trial.tested,
            }  # fmt: skip
    yield without_activations(pictures, trial)


def guessed(config: Config, data: Dataset, own: Samples, *, same_seed: bool) -> Client:
    """The client half that the attacker trains by the same settings on its own pictures."""
    seed = config.train.seed + (0 if same_seed else 1)
    return trained_client(replace(config, train=replace(config.train, seed=seed)), data, own)[0]


def without_activations(pictures: Pictures, trial: Trial) -> Row:
    real, chance = pictures.tested / trial.white, 100 / trial.tested
    mean = (pictures.own / trial.white).mean(0).expand_as(real)
    return {
        "cut": None, "values_per_picture": 0, "attacker_knows": "no activations",
        "ssim": mean_similarity(mean, real, trial.sigma), "identified_%": chance,
        "identified_augmented_%": chance if trial.augmented else None, "identified_by_activations_%": None,
        "pictures": trial.tested,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Attacks, prints and writes."""
    parser = argparse.ArgumentParser(description="What activations say of pictures, where the client half is known.")
    parser.add_argument("--data", help="folder of CIFAR-10, official layout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of run and decoders")
    parser.add_argument("--quick", action="store_true", help="little of the digits instead, to see that it works")
    parser.add_argument("--out", type=Path, help="file to write, such as results/inversion.json")
    options = parser.parse_args(arguments)
    if not options.quick and options.data is None:
        parser.error("expected --data DIR or --quick")
    torch.set_num_threads(1)
    made = {"environment": environment(), "command": command_line("python benchmarks/inversion.py", arguments)}
    found: list[Row] = []
    began = time.perf_counter()
    try:
        for row in rows(digits() if options.quick else cifar(options.data, options.precision)):
            found.append(row)
            print(", ".join(f"{key} {plain_cell(value)}" for key, value in row.items()), flush=True)
            say(f"{time.perf_counter() - began:.0f} s")
            if options.out is not None:  # what there is so far
                write_json(options.out, {**made, "rows": found})
    except HalfpassError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
