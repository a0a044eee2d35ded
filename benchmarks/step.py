"""What halfpass costs beside a bare loop, and what two processes gain over one: ratios, measured in one run.

    python benchmarks/step.py                   all rows into results/step.json, then: python benchmarks/tables.py
    python benchmarks/step.py --only a,c        these rows, printed only; --out FILE keeps them
    python benchmarks/step.py --steps 3 --rounds 1          does it run?

Both sides of a ratio take turns, A B A B …, and each gives the median of its steps; the first turn of each is not
counted. The pictures are random, of CIFAR-10's size, so no file is needed. Exit status: 1 where a bar is missed.
What the rows mean: benchmarks/README.md. Nothing else should run meanwhile.
"""

import argparse
import contextlib
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from halfpass.config import Config, DataConfig, ModelConfig, TrainConfig
from halfpass.data.batches import train_batches
from halfpass.data.cifar import CIFAR
from halfpass.data.datasets import Dataset, Samples
from halfpass.errors import RunError
from halfpass.files import write_json
from halfpass.networks.models import CifarResNet, build_model
from halfpass.networks.split import join_state
from halfpass.run import setup
from halfpass.run.local import LocalRun
from halfpass.run.network import build_network
from halfpass.run.records import command_line, environment
from halfpass.run.train import compare

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE, CLASSES = 128, 10
CIFAR_SAMPLES = 50_000  # batches are drawn from memory as large as CIFAR-10's
PLAIN_SAMPLES = 200 * BATCH_SIZE  # a smaller set for the processes, each of which makes its own
CUTS = ("stage_1.0", "stage_1.1", "stage_1.2", "stage_2.0")
PROCESS_STEPS, PROCESS_ROUNDS = 3, 3  # starting processes takes seconds: turns of 3 × the steps, a third of the rounds

Row = dict[str, Any]
Train = Callable[[int, Callable[[], None]], object]  # trains an epoch of that number, calls the other after each step
RECIPE = TrainConfig(batch_size=BATCH_SIZE, lr=0.01, schedule="constant")  # a low rate: random labels must not diverge
MIDDLE = Config(model=ModelConfig("resnet20", "stage_2.2", "linear"), train=RECIPE)


@dataclass(frozen=True)
class Turns:
    """How long and how often each side of a ratio runs."""

    steps: int
    rounds: int  # counted ones; one more goes before


def row(benchmark: str, ratio: float, relation: str, bound: float, turns: Turns, **measured: float) -> Row:
    """What `results/step.json` says of one ratio; `relation` is ≤ or ≥."""
    met = ratio <= bound if relation == "≤" else ratio >= bound
    told = {"benchmark": benchmark, "ratio": ratio, "bar": f"{relation} {bound:g}", "met": met}
    return told | measured | {"rounds": turns.rounds, "steps_per_round": turns.steps}


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def random_pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, 3, 32, 32) uint8 in channels-last memory, as CIFAR is read, and labels (N,)."""
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=draws)
    return pixels.permute(0, 3, 1, 2), torch.randint(0, CLASSES, (count,), generator=draws)


def augmented_data() -> Dataset:
    """As large as CIFAR-10, cropped and flipped like it."""
    layout = CIFAR["cifar10"]
    train, test = (Samples(*random_pictures(n, seed)) for seed, n in enumerate((CIFAR_SAMPLES, BATCH_SIZE)))
    return Dataset("random pictures", train, test, CLASSES, layout.mean, layout.std, crop_padding=2)


def plain_data() -> tuple[TensorDataset, TensorDataset]:
    """For `data.name` in (b): no augmentation, and a test set that takes no time."""
    return TensorDataset(*random_pictures(PLAIN_SAMPLES, 0)), TensorDataset(*random_pictures(BATCH_SIZE, 1))


# --- The two sides ----------------------------------------------------------------------------------------------------


class BareLoop:
    """ResNet-20 trained with `detach()` behind stage_2.2, as one writes it by hand in PyTorch.

    One optimizer over everything and one backward pass of the sum of both losses, which leaves the least code. It draws
    the batches that halfpass draws, so that the two do the same arithmetic; (c) measures the drawing.
    """

    def __init__(self, config: Config, data: Dataset, shard: Samples, *, plain: bool = False) -> None:
        self.config, self.data, self.shard, self.plain = config, data, shard, plain
        model = build_model("resnet20", data.train.sample_shape, CLASSES, config.train.seed)
        network = build_network(config, data.train.sample_shape, CLASSES)
        assert isinstance(model, CifarResNet)
        assert network.head is not None
        order = torch.contiguous_format if plain else torch.channels_last
        self.model = model.to(memory_format=order)  # type: ignore[call-overload]
        self.head = copy.deepcopy(network.head)
        self.client = nn.Sequential(model.stem, model.stage_1, model.stage_2)
        self.server = nn.Sequential(model.stage_3, model.pool, model.classifier)
        self.optimizer = torch.optim.SGD(
            [*self.model.parameters(), *self.head.parameters()], lr=config.train.lr, momentum=config.train.momentum,
            nesterov=config.train.nesterov, weight_decay=config.train.weight_decay, fused=True,
        )  # fmt: skip

    def train(self, epoch: int, after_step: Callable[[], None]) -> None:
        batches = train_batches(self.data, self.shard, BATCH_SIZE, seed=self.config.train.seed, client=0, epoch=epoch)
        for x, labels in batches:  # (B, 3, 32, 32), (B,)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.config.train.precision == "bf16"):
                z = self.client(x.contiguous() if self.plain else x)  # (B, 32, 16, 16)
                guess, logits = self.head(z), self.server(z.detach())  # (B, classes) each
            loss = cross_entropy(guess.float(), labels) + cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            after_step()


def local_run(config: Config, data: Dataset, shard: Samples, *, plain: bool = False) -> LocalRun:
    """halfpass in one process. `plain` takes its channels-last memory away from it: weights and inputs contiguous."""
    run = LocalRun(config, data, [shard], build_network(config, data.train.sample_shape, CLASSES))
    for half in (run.clients[0].half, run.server.half) if plain else ():
        half.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        half.register_forward_pre_hook(lambda _, inputs: tuple(tensor.contiguous() for tensor in inputs))
    return run


def check_same(run: LocalRun, bare: BareLoop) -> None:
    """Raises RunError unless both have trained to the same weights: then they have done the same arithmetic."""
    client = run.clients[0]
    assert client.head is not None
    ours = join_state(client.half.state_dict(), run.server.half.state_dict()) | named_head(client.head)
    theirs = bare.model.state_dict() | named_head(bare.head)
    other = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    if other or ours.keys() != theirs.keys():
        found = f"others in {', '.join(other[:3]) or 'name'}"
        raise RunError("the bare loop", "halfpass's weights bit for bit", found, "make both do the same arithmetic")


def named_head(head: nn.Module) -> dict[str, Tensor]:
    return {f"head.{name}": value for name, value in head.state_dict().items()}


# --- Clocks -----------------------------------------------------------------------------------------------------------


def step_seconds(train: Train, epoch: int) -> list[float]:
    """Seconds of each step of one epoch, the drawing of its batch included."""
    clock = [time.perf_counter()]
    train(epoch, lambda: clock.append(time.perf_counter()))
    return between(clock)


def step_and_draw_seconds(train: Train, epoch: int, batches: Iterator[object]) -> tuple[list[float], list[float]]:
    """Seconds of each step of one epoch, and of drawing one more of `batches` after each of them."""
    clock = [time.perf_counter()]

    def draw() -> None:
        clock.append(time.perf_counter())
        next(batches)
        clock.append(time.perf_counter())

    train(epoch, draw)
    seconds = between(clock)  # step, draw, step, draw …
    return seconds[::2], seconds[1::2]


def between(clock: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(clock)]


def in_turn(sides: Sequence[Train], rounds: int) -> list[float]:
    """Median seconds per step of each side; A B A B …, `rounds` times after a turn each that is not counted."""
    seconds: list[list[float]] = [[] for _ in sides]
    for epoch in range(rounds + 1):
        for side, measured in zip(sides, seconds, strict=True):
            new = step_seconds(side, epoch)
            measured += new if epoch else []
    return [statistics.median(measured) for measured in seconds]


# --- The rows ---------------------------------------------------------------------------------------------------------


def with_precision(config: Config, precision: str) -> Config:
    return replace(config, train=replace(config.train, precision=precision))  # type: ignore[arg-type]


def first_batches(data: Dataset, steps: int) -> Samples:
    """The shard that gives so many full batches."""
    return data.train.take(torch.arange(steps * BATCH_SIZE))


def over_bare_loop(turns: Turns) -> Iterator[Row]:
    """(a) One process, decoupled, over a bare loop that ends with the same weights."""
    data = augmented_data()
    shard = first_batches(data, turns.steps)
    for precision in ("fp32", "bf16"):
        say(f"(a) local and bare loop, {precision}")
        config = with_precision(MIDDLE, precision)
        run, bare = local_run(config, data, shard), BareLoop(config, data, shard)
        ours, theirs = in_turn([run.train, bare.train], turns.rounds)
        check_same(run, bare)
        yield row(
            f"(a) local decoupled over a bare loop, {precision}", ours / theirs, "≤", 1.05, turns,
            this_seconds_per_step=ours, other_seconds_per_step=theirs,
        )  # fmt: skip


def data_share(turns: Turns) -> Iterator[Row]:
    """(c) Drawing a batch over a whole step in bf16, the faster one.

    The batch is one more, drawn after every step from as many pictures as CIFAR-10 has, so that the caches are as cold
    for it as in a training.
    """
    say("(c) drawing batches")
    data = augmented_data()
    run = local_run(with_precision(MIDDLE, "bf16"), data, first_batches(data, turns.steps))
    endless = itertools.chain.from_iterable(
        train_batches(data, data.train, BATCH_SIZE, seed=1, client=0, epoch=epoch) for epoch in itertools.count()
    )
    _, *counted = [step_and_draw_seconds(run.train, epoch, endless) for epoch in range(turns.rounds + 1)]
    step, drawing = (statistics.median(itertools.chain(*seconds)) for seconds in zip(*counted, strict=True))
    yield row(
        "(c) drawing and augmenting a batch over a whole local decoupled step, bf16", drawing / step, "≤", 0.03, turns,
        this_seconds_per_step=drawing, other_seconds_per_step=step,
    )  # fmt: skip


def speed_up(turns: Turns) -> Iterator[Row]:
    """(d) What bf16 with channels-last gains over fp32 in contiguous memory: halfpass's gain over the bare loop's."""
    say("(d) bf16 with channels-last, and plain fp32")
    data = augmented_data()
    shard = first_batches(data, turns.steps)
    fast, slow = with_precision(MIDDLE, "bf16"), with_precision(MIDDLE, "fp32")
    run, plain_run = local_run(fast, data, shard), local_run(slow, data, shard, plain=True)
    bare, plain_bare = BareLoop(fast, data, shard), BareLoop(slow, data, shard, plain=True)
    sides = [run.train, bare.train, plain_run.train, plain_bare.train]
    ours, theirs, our_plain, their_plain = in_turn(sides, turns.rounds)
    check_same(run, bare)
    check_same(plain_run, plain_bare)
    gain, bare_gain = our_plain / ours, their_plain / theirs
    yield row(
        "(d) speed-up by bf16 with channels-last over plain fp32: local decoupled over a bare loop", gain / bare_gain,
        "≥", 0.95, turns, this_speed_up=gain, other_speed_up=bare_gain,
    )  # fmt: skip


# (b) starts processes, which import this file as `benchmarks.step` and know nothing of what happens here.


def over_local(turns: Turns) -> Iterator[Row]:
    """(b) A server and a client process over one process, one thread in each of them."""
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # `data.name` is found from there
        cut, share = balanced_cut(Turns(turns.steps, PROCESS_ROUNDS))
        turns = Turns(PROCESS_STEPS * turns.steps, max(1, turns.rounds // PROCESS_ROUNDS))
        measured: dict[tuple[str, str], list[float]] = {}
        for number, runtime in itertools.product(range(turns.rounds), ("processes", "local")):
            say(f"(b) cut {cut}, {runtime}, round {number + 1} of {turns.rounds}")
            config = replace(
                one_thread(cut, turns.steps), runtime=runtime, out=f"{folder}/{runtime}-{number}"  # type: ignore[arg-type]
            )
            for run in compare(config, ["decoupled", "conventional"], [0]):
                measured.setdefault((run.name.partition("-")[0], runtime), []).append(epoch_seconds_per_step(run))
        for method, bound in (("decoupled", 0.65), ("conventional", 1.25)):
            ours, theirs = (statistics.median(measured[method, runtime]) for runtime in ("processes", "local"))
            best = {"slower_half_share": share} if method == "decoupled" else {}
            yield row(
                f"(b) processes over local, {method}, one client, one thread each, cut {cut}, fp32", ours / theirs,
                "≤", bound, turns, this_seconds_per_step=ours, other_seconds_per_step=theirs, **best,
            )  # fmt: skip


def one_thread(cut: str, steps: int) -> Config:
    """Two epochs, of which the first is not counted."""
    return Config(
        data=DataConfig(name="benchmarks.step:plain_data", limit=steps * BATCH_SIZE),
        model=replace(MIDDLE.model, cut=cut), train=replace(RECIPE, epochs=2, threads=1),
    )  # fmt: skip


def balanced_cut(turns: Turns) -> tuple[str, float]:
    """The cut of CUTS whose slower half takes the least share of both halves' seconds in one process, and that share.

    Where the halves overlap, a step still takes as long as the slower one: the share is the best that (b) can show.
    """
    say(f"(b) which of the cuts {', '.join(CUTS)} balances the halves")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {cut: prepared_run(one_thread(cut, turns.steps)) for cut in CUTS}
    shares: dict[str, list[float]] = {cut: [] for cut in CUTS}
    for epoch, cut in itertools.product(range(turns.rounds + 1), CUTS):
        clients, server = runs[cut].train(epoch, lambda: None)
        client = clients[0].busy_seconds / (clients[0].busy_seconds + server.busy_seconds)
        if epoch:
            shares[cut].append(client)
    torch.set_num_threads(threads)
    client_share = {cut: statistics.median(measured) for cut, measured in shares.items()}
    say(f"(b) the client's share: {', '.join(f'{cut} {share:.3f}' for cut, share in client_share.items())}")
    slower = {cut: max(share, 1 - share) for cut, share in client_share.items()}
    return min(slower.items(), key=lambda item: item[1])


def prepared_run(config: Config) -> LocalRun:
    prepared = setup.prepare(config)
    assert prepared.network is not None
    return LocalRun(config, prepared.data, prepared.shards, prepared.network)


def epoch_seconds_per_step(folder: Path) -> float:
    """Of all epochs but the first, whose processes are still warming up; evaluation is not in them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = [r for r in rows if r["process"] == "server" and r["epoch"] > 1]
    return float(sum(r["busy_seconds"] + r["waiting_seconds"] for r in counted) / sum(r["steps"] for r in counted))


# --- The command ------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, Callable[[Turns], Iterator[Row]]] = {
    "a": over_bare_loop, "b": over_local, "c": data_share, "d": speed_up,
}  # fmt: skip


def chosen(text: str) -> list[str]:
    """`a,c` → its letters, in the order of BENCHMARKS."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected letters of {','.join(BENCHMARKS)}, found {unknown[0]!r}")
    return [name for name in BENCHMARKS if name in names]


def at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, found {text!r}")
    return int(text)


def several(form: str) -> Callable[[str], list[str]]:
    """An argparse type: names by commas, each of as many parts as `form`, such as NETWORK:CUT, has."""

    def split(text: str) -> list[str]:
        for name in text.split(","):
            if name.count(":") != form.count(":") or not all(name.split(":")):
                raise argparse.ArgumentTypeError(f"expected {form}, several by commas, found {name!r}")
        return text.split(",")

    return split


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratios that say what halfpass costs and gains, measured in one run.")
    parser.add_argument("--steps", type=at_least_one, default=8, help="steps of one side's turn; (b): times 3")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="turns of each side; (b): a third of them")
    parser.add_argument("--only", type=chosen, default=list(BENCHMARKS), help="a, b, c, d: the rows to measure")
    parser.add_argument("--out", type=Path, help="file to write; default: results/step.json, none with --only")
    options = parser.parse_args(arguments)
    if options.out is None and options.only == list(BENCHMARKS):
        options.out = ROOT / "results" / "step.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when every bar is met."""
    options = parse(arguments)
    command = command_line("python benchmarks/step.py", arguments)
    out = options.out and options.out.absolute()
    setup.settle_process(MIDDLE)
    rows: list[Row] = []
    for name in options.only:
        for measured in BENCHMARKS[name](Turns(options.steps, options.rounds)):
            rows.append(measured)
            verdict = "met" if measured["met"] else "missed"
            print(f"{measured['benchmark']}: {measured['ratio']:.4f} (bar {measured['bar']}, {verdict})", flush=True)
    if out is not None:
        write_json(out, {"environment": environment(), "command": command, "rows": rows})
    return 0 if all(measured["met"] for measured in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
