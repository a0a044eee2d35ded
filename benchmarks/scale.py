"""How far one server goes: many nodes of a simulation of which few train at a time, and many streams to one server.

    python benchmarks/scale.py --out results/scale.json      all rows, half an hour on two cores
    python benchmarks/scale.py --only streams --out FILE     rows of these groups alone; the others in FILE stay
    python benchmarks/scale.py --only streams --counts 1,4   does it run?
    python benchmarks/scale.py --draw                        docs/scale.svg from results/scale.json

nodes     Flower's simulation of 2, 10, 100 and 1,000 nodes with tiny networks; ten of them (`clients.sample`) train in
          each round. Seconds a round, until all nodes have said who they are, and the memory that the machine has less
          meanwhile: ServerApp, SuperLink and the simulation's workers together
streams   1, 32, 128 and 512 clients, each with its stream to one server process. The clients are stand-ins that send
          batches which were made before, all in one process, for so many that compute need as many cores. The server
          has a core of its own. Batches per second over those of one client, and the server's memory per client

The first needs pip install 'halfpass[flower]'. Exit status: 1 where a bar is missed.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clients import split_cores
from engines import Flower, checked, write_app
from overlap import Feeder, serving, wait_for
from step import RECIPE, ROOT, Row, say
from torch import nn
from torch.utils.data import TensorDataset

from halfpass.bounded import parse_json
from halfpass.config import CheckpointConfig, ClientsConfig, Config, DataConfig, ModelConfig, WireConfig
from halfpass.files import write_json
from halfpass.run import setup
from halfpass.run.client_process import connect, join_of
from halfpass.run.epoch import handed_over
from halfpass.run.records import command_line, environment
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.connection import Connection
from halfpass.wire.messages import write_weights

NODES, STREAMS = [2, 10, 100, 1000], [1, 32, 128, 512]
SAMPLED, SAMPLES = 10, 16  # nodes that train in a round, and samples of each node
ROUNDS = 8
BATCHES, BATCH_SIZE, EPOCHS = 512, 8, 3  # per epoch, of all streams together
PACE_BAR = 0.9  # of the batches per second with one client
RESULTS, PICTURE = ROOT / "results" / "scale.json", ROOT / "docs" / "scale.svg"


# --- Nodes ------------------------------------------------------------------------------------------------------------


def tiny_data() -> tuple[TensorDataset, TensorDataset]:
    """For 1,000 nodes; fewer nodes take as many samples each (`data.limit`)."""
    draws = torch.Generator().manual_seed(0)
    train, test = (
        TensorDataset(torch.rand(n, 16, generator=draws), torch.randint(0, 4, (n,), generator=draws))
        for n in (SAMPLES * max(NODES), 64)
    )
    return train, test


def tiny_network(sample_shape: Sequence[int], outputs: int) -> nn.Sequential:
    below, above = nn.Sequential(nn.Linear(sample_shape[0], 32), nn.ReLU()), nn.Linear(32, outputs)
    network = nn.Sequential()
    for name, part in (("below", below), ("above", above)):
        network.add_module(name, part)
    return network


def nodes(counts: Sequence[int]) -> Iterator[Row]:
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            flower = Flower(Path(folder))
            try:
                flower.superlink("--simulation")
                yield simulated(flower, count)
            finally:
                flower.stop()


def simulated(flower: Flower, count: int) -> Row:
    out = flower.folder / "run"
    app = write_app(flower.folder / "app", {
        "data.name": "benchmarks.scale:tiny_data", "data.limit": SAMPLES * count,
        "model.name": "benchmarks.scale:tiny_network", "model.cut": "below",
        "clients.count": count, "clients.sample": min(count, SAMPLED), "train.epochs": ROUNDS,
        "train.batch_size": SAMPLES // 2, "train.threads": 1, "train.test_every": ROUNDS, "out": str(out),
    })  # fmt: skip
    begin, most, over = used_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            most[0] = max(most[0], used_bytes() - begin)

    watching = threading.Thread(target=watch)
    watching.start()
    began = time.monotonic()
    try:
        words = f"num-supernodes={count} client-resources-num-cpus=1"
        checked(flower.run(app, "--federation-config", words), out)
    finally:
        over.set()
        watching.join()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rounds = [row["busy_seconds"] + row["waiting_seconds"] for row in rows if row["process"] == "server"]
    counted, before = rounds[1:], time.monotonic() - began - sum(rounds)
    return {
        "group": "nodes", "clients": count, "sampled": min(count, SAMPLED), "rounds": len(counted),
        "seconds_a_round": statistics.median(counted), "seconds_before_the_first": before,
        "peak_mib_of_the_machine": most[0] / 2**20,
    }  # fmt: skip


def used_bytes() -> int:
    """Of the machine's memory."""
    said = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * (int(said["MemTotal"].split()[0]) - int(said["MemAvailable"].split()[0]))


# --- Streams ----------------------------------------------------------------------------------------------------------


def settings(clients: int, folder: Path) -> Config:
    return Config(
        runtime="processes", data=DataConfig(name="benchmarks.step:plain_data", limit=BATCHES * BATCH_SIZE),
        model=ModelConfig("resnet20", "stem", "linear"), clients=ClientsConfig(clients), out=str(folder / "run"),
        train=replace(RECIPE, epochs=EPOCHS, batch_size=BATCH_SIZE, threads=1), checkpoint=CheckpointConfig(every=0),
        wire=WireConfig(window=2**22),
    )  # fmt: skip


class Feeders(Feeder):
    """Many clients that compute nothing."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        client = setup.build_client(config, self.network, 0)
        self.weights = write_weights(handed_over(config, client))
        self.failed = threading.Event()

    def feed(self, address: str, config: Config, client: int) -> None:
        samples = BATCHES * BATCH_SIZE // config.clients.count
        join = join_of(config, self.network, client, samples, samples // BATCH_SIZE, {})
        connection = connect(config, join, address, f"feeder {client}")
        try:
            while (message := connection.receive("begin", "take", "test", "finish")).WhichOneof("kind") != "finish":
                if message.WhichOneof("kind") == "begin":
                    self.send_batches(connection, message.begin, client, samples // BATCH_SIZE)
                elif message.WhichOneof("kind") == "test":
                    self.send_epoch(connection, message, samples, 1)
            connection.finish()
        except BaseException:
            connection.fail("the feeder failed")
            raise

    def send_batches(self, connection: Connection, begin: pb.Begin, client: int, steps: int) -> None:
        for step in range(steps):
            connection.send_in_turn(partial(self.message_of, client, begin.epoch, step))
        weights = self.weights if begin.return_weights else []
        end = pb.EpochEnd(epoch=begin.epoch, samples=steps * BATCH_SIZE, uploads=steps, weights=weights)
        connection.send_in_turn(lambda: [pb.ClientMessage(epoch_end=end)])

    def message_of(self, client: int, epoch: int, step: int) -> list[pb.ClientMessage]:
        (message,) = self.message(epoch, step, False)
        message.batch.client = client
        return [message]


def streams(counts: Sequence[int]) -> Iterator[Row]:
    """Two turns of each count, in turn; the first is the one that the others are compared with."""
    found: dict[int, list[Row]] = {count: [] for count in counts}
    for number in range(2):
        for count in counts if number == 0 else reversed(counts):
            with tempfile.TemporaryDirectory() as folder:
                found[count].append(fed(settings(count, Path(folder))))
    one = middle(found[counts[0]])
    for count in counts:
        row = middle(found[count])
        more = row["server_peak_mib"] - one["server_peak_mib"]
        ratio = row["batches_per_second"] / one["batches_per_second"]
        added = {} if count == counts[0] else {"server_mib_per_added_client": more / (count - counts[0])}
        yield row | {"over_one_client": ratio, "bar": f"≥ {PACE_BAR}", "met": ratio >= PACE_BAR} | added


def middle(rows: Sequence[Row]) -> Row:
    numbers = {key for key in rows[0] if isinstance(rows[0][key], float)}
    return {key: statistics.median(row[key] for row in rows) if key in numbers else rows[0][key] for key in rows[0]}


def fed(config: Config) -> Row:
    own, rest = split_cores()
    feeders, count = Feeders(config), config.clients.count
    with serving(config) as (children, port):
        if rest:
            os.sched_setaffinity(children[0].process.pid, own)
            os.sched_setaffinity(0, rest)
        try:
            with ThreadPoolExecutor(count) as pool:
                feeding = [pool.submit(feeders.feed, f"127.0.0.1:{port}", config, k) for k in range(count)]
                for done in as_completed(feeding):  # the first one's error is the one to see
                    done.result()
            wait_for(children)
        finally:
            if rest:
                os.sched_setaffinity(0, own | rest)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["process"] == "server" and row["epoch"] > 1]
    seconds = sum(row["busy_seconds"] + row["waiting_seconds"] for row in counted)
    memory = parse_json((config.folder / "result.json").read_text())["peak_memory_bytes"]["server"]
    row = {
        "group": "streams", "clients": count, "batches_per_second": sum(row["steps"] for row in counted) / seconds,
        "server_peak_mib": memory / 2**20,
    }  # fmt: skip
    say(json.dumps(row))
    return row


# --- The command ------------------------------------------------------------------------------------------------------

GROUPS: dict[str, tuple[Callable[[Sequence[int]], Iterator[Row]], list[int]]] = {
    "nodes": (nodes, NODES), "streams": (streams, STREAMS),
}  # fmt: skip


def draw(rows: Sequence[Row], out: Path) -> None:
    """Seconds a round and memory by number of nodes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from halfpass.report.figures import BLUE, STYLE, VERMILLION

    style: dict[Any, Any] = {**STYLE, "svg.fonttype": "path", "svg.hashsalt": "scale", "font.size": 9}
    shown = [row for row in rows if row["group"] == "nodes"]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.0, 2.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        for axes, key, label, colour in zip(
            figure.subplots(1, 2), ("seconds_a_round", "peak_mib_of_the_machine"),
            ("seconds a round", "memory of all processes, MiB"), (BLUE, VERMILLION), strict=True,
        ):  # fmt: skip
            axes.plot([row["clients"] for row in shown], [row[key] for row in shown], "o-", color=colour)
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.set_xlabel("nodes, of which up to ten train in a round")
            axes.set_ylabel(label)
        figure.savefig(out, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many nodes, and many streams to one server.")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas")
    parser.add_argument("--counts", help="other numbers of clients, with commas")
    parser.add_argument("--out", type=Path, help="file to write, such as results/scale.json")
    parser.add_argument("--draw", action="store_true", help="draw docs/scale.svg from results/scale.json")
    options = parser.parse_args(arguments)
    if options.draw:
        draw(parse_json(RESULTS.read_text())["rows"], PICTURE)
        return 0
    groups = options.only.split(",")
    if unknown := {*groups} - GROUPS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; groups are {', '.join(GROUPS)}")
    out = options.out and options.out.absolute()
    made = {"environment": environment(), "command": command_line("python benchmarks/scale.py", arguments)}
    rows = list[Row]()
    if out is not None and out.exists():
        rows = [row for row in parse_json(out.read_text())["rows"] if row["group"] not in groups]
    torch.set_num_threads(1)
    with contextlib.chdir(ROOT):
        for group in groups:
            measure, counts = GROUPS[group]
            for row in measure([int(count) for count in options.counts.split(",")] if options.counts else counts):
                rows.append(row | {"environment": made["environment"]})
                say(json.dumps(row, ensure_ascii=False))
                if out is not None:
                    write_json(out, {**made, "rows": sorted(rows, key=lambda row: [*GROUPS].index(row["group"]))})
    return 0 if all(row.get("met", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
