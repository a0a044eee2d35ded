"""How close decoupled training comes to its slowest part alone, over links of several bandwidths and delays.

    python benchmarks/overlap.py --out results/overlap.json     all links; half an hour on two cores
    python benchmarks/overlap.py --draw                         docs/results/overlap.svg from results/overlap.json
    python benchmarks/overlap.py --quick                        one link, few steps, printed only: does it run?

The halves are processes, `halfpass serve` and `halfpass join` with one thread each; the link between them is
`benchmarks/link.py`. A training has two epochs, of which the second counts: its wall time over its steps, with the
first batch's way to the server and the last acknowledgement's way back. No method can be faster than the slowest of

  client alone   the client process against a server that acknowledges at once and trains nothing
  server alone   the server process fed with batches that were made before
  wire alone     those batches, from this feeder to that server, over the link

All are measured for each link, in turn with the trainings over it. The first two need no link; the wire is measured
from the arrival of the first to that of the last batch, so without its delay. `at once` is the slower of client and
server, each alone, but both at the same time: what two processes on this machine cost each other, which is no fault
of the wire. Exit status: 1 where the bar is missed.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from link import link
from nullserver import NullServer
from step import BATCH_SIZE, PLAIN_SAMPLES, RECIPE, ROOT, Row, epoch_seconds_per_step, say

from halfpass.algorithm import client as client_side
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, WireConfig
from halfpass.data.batches import batch_count, train_batches
from halfpass.errors import RunError
from halfpass.files import write_json
from halfpass.report.tables import significant
from halfpass.report.theme import BLUE, GREY, INK, VERMILLION, picture_file
from halfpass.run import setup
from halfpass.run.children import Child, stopping
from halfpass.run.client_process import connect, end_of_test, join_of
from halfpass.run.network import build_network
from halfpass.run.records import RunFolder, command_line, environment
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Connection
from halfpass.wire.messages import write_batch

BAR = 1.05  # decoupled over the bound
EPOCHS = 2
EPOCH_SECONDS = 20.0  # an epoch has fewer steps where they would take longer
LEAST_STEPS = 4
CONVENTIONAL_SHARE = 0.5  # of decoupled's steps: a conventional one takes twice as long, and they are all alike
MADE_BATCHES = 4  # that the feeder sends in turn
START_SECONDS, RUN_SECONDS = 120.0, 900.0
RESULTS, PICTURE = ROOT / "results" / "overlap.json", ROOT / "docs" / "results" / "overlap.svg"


@dataclass(frozen=True)
class Link:
    bandwidth: float  # bits per second, in each direction
    rtt: float  # seconds

    def __str__(self) -> str:
        megabits = self.bandwidth / 1e6
        speed = f"{megabits / 1000:g} Gbit/s" if megabits >= 1000 else f"{megabits:g} Mbit/s"
        return f"{speed}, {1000 * self.rtt:g} ms"


LINKS = [Link(bandwidth, rtt) for bandwidth in (1e9, 100e6, 20e6) for rtt in (0.0, 0.02, 0.1)]


# --- The two halves, as processes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(config: Config) -> Iterator[tuple[list[Child], int]]:
    """`halfpass serve` and its port; whoever joins the list is stopped with it."""
    folder = RunFolder.create(config.folder, config).path
    options = ["--config", str(folder / "config.yaml"), "--bind", "127.0.0.1:0"]
    children = [Child("server", ["serve", *options], quiet=True, pipe=True)]
    with stopping(children):
        words = children[0].first_line(START_SECONDS).split()  # listening on HOST:PORT …
        if words[:2] != ["listening", "on"]:
            raise RunError("server", "a line that says its address", " ".join(words) or "none", "run it by hand")
        yield children, int(words[2].rpartition(":")[2])


def joining(config: Config, address: str) -> Child:
    """`halfpass join` of the only client."""
    folder = config.folder
    if not (folder / "config.yaml").exists():
        RunFolder.create(folder, config)
    return Child("client", ["join", address, "--config", str(folder / "config.yaml")], quiet=True)


def wait_for(children: Sequence[Child]) -> None:
    """Until all have ended well."""
    deadline = time.monotonic() + RUN_SECONDS
    while any(child.status() is None for child in children):
        for child in children:
            if child.status():
                raise child.failure()
        if time.monotonic() > deadline:
            raise RunError("training", f"its end within {RUN_SECONDS:g} s", "none", "take fewer steps")
        time.sleep(0.05)
    for child in children:
        if child.status():
            raise child.failure()


def training(config: Config, way: Link) -> float:
    """Seconds per step of a training over a link."""
    with serving(config) as (children, port), link(port, way.bandwidth, way.rtt) as near:
        children.append(joining(config, f"127.0.0.1:{near}"))
        wait_for(children)
    return epoch_seconds_per_step(config.folder)


# --- Stand-ins for either half ----------------------------------------------------------------------------------------


class Feeder:
    """A client that computes nothing: it sends batches that were made and encoded before."""

    def __init__(self, config: Config, made: int = MADE_BATCHES) -> None:
        """`made` batches, which are sent again and again."""
        data = setup.load_data(config.data)
        shard = setup.make_shards(replace(config, clients=ClientsConfig(1)), data)[0]
        self.network = build_network(config, data.train.sample_shape, data.classes)
        client = setup.build_client(config, self.network, 0)
        self._size = config.train.batch_size
        drawn = list(itertools.islice(train_batches(data, shard, self._size, seed=0, client=0, epoch=0), made))
        cut = [client_side.decoupled_step(client, x, labels, 0, step)[0] for step, (x, labels) in enumerate(drawn)]
        self.batches = [write_batch(batch, config.wire.codec) for batch in cut]
        client_side.set_training(client, False)
        self.test = write_batch(client_side.evaluate(client, *drawn[0], 0, 0)[0], config.wire.codec, test=True)

    @property
    def batch_bytes(self) -> float:
        return statistics.mean(batch.ByteSize() for batch in self.batches)

    def run(self, address: str, config: Config) -> None:
        """Until the server says Finish; `config` is that of the run, whose epochs may be shorter than this one's."""
        samples, steps = samples_of(config), steps_of(config)
        join = join_of(config, self.network, 0, samples, steps, {})
        connection = connect(config, join, address, "feeder")
        try:
            while (message := connection.receive("begin", "test", "finish")).WhichOneof("kind") != "finish":
                self.send_epoch(connection, message, samples, steps)
            connection.finish()
        except BaseException:
            connection.fail("the feeder failed")
            raise

    def send_epoch(self, connection: Connection, message: pb.ServerMessage, samples: int, steps: int) -> None:
        """All batches of an epoch as fast as they are taken, or the one of a test."""
        test = message.WhichOneof("kind") == "test"
        epoch = message.test.epoch if test else message.begin.epoch
        for step in range(1 if test else steps):
            connection.send_in_turn(partial(self.message, epoch, step, test))
        end = self.end(epoch) if test else pb.ClientMessage(epoch_end=pb.EpochEnd(epoch=epoch, samples=samples))
        connection.send_in_turn(lambda: [end])

    def end(self, epoch: int) -> pb.ClientMessage:
        """Of a test."""
        scores = dict.fromkeys(map(str, self.network.task.metrics()), 0.0)
        return pb.ClientMessage(test_end=end_of_test(epoch, self._size, scores, has_head=True))

    def message(self, epoch: int, step: int, test: bool) -> list[pb.ClientMessage]:
        """A copy of a batch: those before it may not be on the wire yet."""
        copy = pb.ClientMessage()
        copy.CopyFrom(self.test if test else self.batches[step % len(self.batches)])
        copy.batch.epoch, copy.batch.step = epoch, step
        return [copy]


def client_alone(config: Config) -> float:
    """Seconds per step of the client process, whose server trains nothing."""
    null = NullServer(config)
    children = [joining(config, f"127.0.0.1:{null.hub.port}")]
    try:
        with stopping(children):
            answered, _ = null.run(EPOCHS, test=False)
            wait_for(children)
    finally:
        null.hub.stop()
    return (answered[-1] - answered[0]) / (len(answered) - 1)


def server_alone(config: Config, feeder: Feeder) -> float:
    """Seconds per step of the server process, whose client computes nothing."""
    with serving(config) as (children, port):
        feeder.run(f"127.0.0.1:{port}", config)
        wait_for(children)
    return epoch_seconds_per_step(config.folder)


def wire_alone(config: Config, feeder: Feeder, way: Link) -> float:
    """Seconds per step of a link between two that compute nothing."""
    null = NullServer(config)
    try:
        with link(null.hub.port, way.bandwidth, way.rtt) as near, ThreadPoolExecutor(1) as pool:
            feeding = pool.submit(feeder.run, f"127.0.0.1:{near}", config)
            answered, _ = null.run(EPOCHS, test=False)
            feeding.result(START_SECONDS)
    finally:
        null.hub.stop()
    return (answered[-1] - answered[0]) / (len(answered) - 1)


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What is trained, how long, and where the run folders go."""

    config: Config  # decoupled
    steps: int  # at most, per epoch
    repeat: int
    folder: Path
    runs: int = 0

    def settings(self, method: str, steps: int) -> Config:
        """One more training, with a folder of its own."""
        self.runs += 1
        data = replace(self.config.data, limit=steps * BATCH_SIZE)
        out = str(self.folder / f"{self.runs}-{method}")
        return replace(self.config, method=method, data=data, out=out)  # type: ignore[arg-type]

    def decoupled(self, steps: int) -> Config:
        return self.settings("decoupled", steps)

    def over(self, way: Link, feeder: Feeder) -> Row:
        """The row of one link: its parts alone and both trainings in turn, as often as asked for."""
        fitting = int(EPOCH_SECONDS * way.bandwidth / (8 * feeder.batch_bytes))
        steps = max(LEAST_STEPS, min(self.steps, fitting))
        few = max(LEAST_STEPS, int(CONVENTIONAL_SHARE * steps))
        measured: dict[str, list[float]] = {}

        def keep(name: str, what: str, seconds: float) -> None:
            say(f"{way}: {what}: {seconds:.4f} s per step")
            measured.setdefault(name, []).append(seconds)

        for _ in range(self.repeat):
            keep("client", "client alone", client_alone(self.decoupled(steps)))
            keep("server", "server alone", server_alone(self.decoupled(steps), feeder))
            keep("at_once", "both alone at once, the slower one", self.at_once(steps, feeder))
            keep("wire", "wire alone", wire_alone(self.decoupled(steps), feeder, way))
            keep("decoupled", "decoupled", training(self.decoupled(steps), way))
            keep("conventional", "conventional", training(self.settings("conventional", few), way))
        return row(way, steps, {name: statistics.median(seconds) for name, seconds in measured.items()})

    def at_once(self, steps: int, feeder: Feeder) -> float:
        client, server = (self.decoupled(steps) for _ in range(2))
        with ThreadPoolExecutor(1) as pool:
            seconds = pool.submit(client_alone, client)
            return max(server_alone(server, feeder), seconds.result(RUN_SECONDS))


def samples_of(config: Config) -> int:
    return config.data.limit or PLAIN_SAMPLES


def steps_of(config: Config) -> int:
    """Per epoch."""
    return batch_count(samples_of(config), BATCH_SIZE)


def row(way: Link, steps: int, seconds: dict[str, float]) -> Row:
    """What `results/overlap.json` says of one link."""
    bound = max(seconds["client"], seconds["server"], seconds["wire"])
    return {
        "link": str(way),
        "bandwidth_bits_per_second": way.bandwidth,
        "round_trip_seconds": way.rtt,
        "steps_per_epoch": steps,
        "decoupled_seconds_per_step": seconds["decoupled"],
        "conventional_seconds_per_step": seconds["conventional"],
        "client_alone_seconds_per_step": seconds["client"],
        "server_alone_seconds_per_step": seconds["server"],
        "wire_alone_seconds_per_step": seconds["wire"],
        "at_once_seconds_per_step": seconds["at_once"],
        "decoupled_over_bound": seconds["decoupled"] / bound,
        "conventional_over_decoupled": seconds["conventional"] / seconds["decoupled"],
    }


def bound_seconds(measured: Row) -> float:
    return max(float(measured[f"{part}_alone_seconds_per_step"]) for part in ("client", "server", "wire"))


def print_table(rows: Sequence[Row]) -> None:
    """Seconds per step, and the two ratios."""
    print(f"{'link':<20}{'client':>9}{'server':>9}{'at once':>9}{'wire':>9}{'decoupled':>11}{'over bound':>12}"
          f"{'conventional':>14}{'over decoupled':>16}")  # fmt: skip
    for one in rows:
        found = [one[f"{part}_seconds_per_step"] for part in ("client_alone", "server_alone", "at_once", "wire_alone")]
        parts = "".join(f"{significant(seconds):>9}" for seconds in found)
        print(
            f"{one['link']:<20}{parts}{one['decoupled_seconds_per_step']:>11.4f}{one['decoupled_over_bound']:>12.3f}"
            f"{one['conventional_seconds_per_step']:>14.4f}{one['conventional_over_decoupled']:>16.2f}"
        )


# --- The picture ------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], out: Path) -> None:
    """Seconds per step of both methods on each link, and the bound, as SVG."""

    def paint(figure: Any) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
        from matplotlib.ticker import LogLocator, NullLocator

        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        for place, one in enumerate(rows):
            for shift, name, colour in ((-0.19, "decoupled", BLUE), (0.19, "conventional", VERMILLION)):
                seconds = one[f"{name}_seconds_per_step"]
                axes.barh(place + shift, seconds, 0.36, color=colour)
                axes.annotate(f"{significant(seconds, 2)} s", (seconds, place + shift), (5, 0),
                              textcoords="offset points", va="center")  # fmt: skip
            axes.vlines(bound_seconds(one), place - 0.42, place + 0.04, color=INK, linewidth=2)
        every = [one[f"{name}_seconds_per_step"] for one in rows for name in ("decoupled", "conventional")]
        axes.set_xscale("log")
        axes.set(xlim=(0.5 * min(every), 2.5 * max(every)), ylim=(len(rows) - 0.5, -0.5), xlabel="seconds per step")
        axes.set_yticks(range(len(rows)), [one["link"].replace(", ", ",\n") for one in rows])
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="x")
        for place, (one, after) in enumerate(itertools.pairwise(rows)):
            if one["bandwidth_bits_per_second"] != after["bandwidth_bits_per_second"]:
                axes.axhline(place + 0.5, color=GREY, linewidth=0.5)
        tick: dict[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 2}
        figure.legend(
            [Patch(color=BLUE), Patch(color=VERMILLION), Line2D([], [], color=INK, linestyle="", **tick)],
            ["decoupled", "conventional", "slowest of client, server and wire, each alone"],
            loc="outside upper left",
        )  # fmt: skip

    out.write_text(picture_file("overlap", 1.1 + 0.42 * len(rows), paint), encoding="utf-8")


def chosen_links(text: str) -> list[Link]:
    """`1000:0,100:20` → links, in Mbit/s and milliseconds of round-trip time."""
    try:
        found = [[float(number) for number in one.split(":")] for one in text.split(",")]
        return [Link(1e6 * megabits, 1e-3 * milliseconds) for megabits, milliseconds in found]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected MBIT:MS,MBIT:MS,…, found {text!r}") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoupled training over links, beside its bound.")
    most = PLAIN_SAMPLES // BATCH_SIZE
    parser.add_argument("--links", type=chosen_links, default=LINKS, help="Mbit/s:ms of round-trip time, by commas")
    parser.add_argument("--steps", type=int, default=most, help=f"steps per epoch at most; {most} are the limit")
    parser.add_argument("--repeat", type=int, default=1, help="measure everything so often and take medians")
    parser.add_argument("--codec", default="none", help="wire.codec")
    parser.add_argument("--cut", default="stage_1.2", help="model.cut; the default balances the halves")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"], help="train.precision")
    parser.add_argument("--out", type=Path, help="file to write, such as results/overlap.json")
    parser.add_argument("--quick", action="store_true", help="one link and few steps, to see that it runs")
    parser.add_argument("--draw", action="store_true", help=f"only draw {PICTURE.name} from {RESULTS.name}")
    options = parser.parse_args(arguments)
    if options.quick:
        options.links, options.steps = [Link(100e6, 0.02)], LEAST_STEPS
    if not (LEAST_STEPS <= options.steps <= most and options.repeat >= 1):
        parser.error(f"expected --steps from {LEAST_STEPS} to {most} and --repeat of at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when decoupled keeps to the bar on every link."""
    options = parse(arguments)
    if options.draw:
        draw(json.loads(RESULTS.read_text())["rows"], PICTURE)
        return 0
    command = command_line("python benchmarks/overlap.py", arguments)
    out = options.out and options.out.absolute()
    torch.set_num_threads(1)
    config = Config(
        runtime="processes", data=DataConfig(name="benchmarks.step:plain_data"),
        model=ModelConfig("resnet20", options.cut, "linear"),
        train=replace(RECIPE, epochs=EPOCHS, precision=options.precision, threads=1),
        wire=WireConfig(codec=options.codec),
    )  # fmt: skip
    measured_on = environment()
    rows: list[Row] = []
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # `data.name` is found from there
        bench = Bench(config, options.steps, options.repeat, Path(folder))
        feeder = Feeder(bench.decoupled(options.steps))
        for way in options.links:
            rows.append(bench.over(way, feeder))
            if out is not None:  # also what there is so far: a long measurement may be stopped
                write_json(out, {"environment": measured_on, "command": command, "rows": rows})
    print_table(rows)
    return 0 if options.quick or all(one["decoupled_over_bound"] <= BAR for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
