"""How far one server goes: many nodes of a simulation of which few train at a time, and many streams to one server.

    python benchmarks/scale.py --out results/scale.json      all rows, half an hour on two cores
    python benchmarks/scale.py --only streams --out FILE     rows of these groups alone; the others in FILE stay
    python benchmarks/scale.py --only streams --counts 1,4   does it run?
    python benchmarks/scale.py --draw                        docs/results/scale.svg from results/scale.json

nodes     Flower's simulation of 2, 10, 100 and 1,000 nodes with tiny networks; ten of them (`clients.sample`) train in
          each round. Seconds a round, until all nodes have said who they are, and the memory that the machine has less
          meanwhile: ServerApp, SuperLink and the simulation's workers together
streams   1, 32, 128 and 512 clients, each with its stream to one server process. The clients are stand-ins that send
          batches which were made before, all in one process, for so many that compute need as many cores. The server
          has a core of its own. Batches per second over those of one client, and the server's memory per client

The first needs pip install 'halfpass[flower]'. Exit status: 1 where a bar is missed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
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
from halfpass.run.client_process import join_of
from halfpass.run.epoch import handed_over
from halfpass.run.records import command_line, environment
from halfpass.wire import halfpass_pb2 as pb
from halfpass.wire.messages import write_weights
from halfpass.wire.service import METHOD, SERVICE, channel_options

NODES, STREAMS = [2, 10, 100, 1000], [1, 32, 128, 512]
SAMPLED, SAMPLES = 10, 16  # nodes that train in a round, and samples of each node
ROUNDS = 8
BATCHES, BATCH_SIZE, EPOCHS = 512, 8, 2  # per epoch, of all streams together
MADE_BATCHES = 64  # which clients send again and again
PACE_BAR = 0.9  # of the batches per second with one client
RESULTS, PICTURE = ROOT / "results" / "scale.json", ROOT / "docs" / "results" / "scale.svg"


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
    """Many clients that compute nothing, in one thread: halfpass's own have several each, which in one process would
    be what is measured."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, MADE_BATCHES)
        client = setup.build_client(config, self.network, 0)
        self.weights = write_weights(handed_over(config, client))
        self._config = config

    async def feed(self, address: str, client: int) -> None:
        config, steps = self._config, BATCHES // self._config.clients.count
        join = join_of(config, self.network, client, steps * BATCH_SIZE, steps, {})
        join.process, join.first = client + 1, 1
        options = [*channel_options(config.wire.window + 2**20), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = channel.stream_stream(
                f"/{SERVICE}/{METHOD}", request_serializer=pb.ClientMessage.SerializeToString,
                response_deserializer=pb.ServerMessage.FromString,
            )()  # fmt: skip
            sending = _Sending(call, config.wire.window)
            await sending.say(pb.ClientMessage(join=join))
            alive, work = asyncio.create_task(sending.stay_alive()), set[asyncio.Task[None]]()
            try:
                while isinstance(message := await call.read(), pb.ServerMessage):
                    await sending.heard(message)
                    kind = message.WhichOneof("kind")
                    if kind in ("failed", "rejected"):
                        raise RuntimeError(f"client {client}: {message}")
                    if kind in ("begin", "test", "finish"):
                        work.add(asyncio.create_task(self._do(sending, message, client, steps)))
                    for done in [task for task in work if task.done()]:
                        done.result()
            finally:
                alive.cancel()

    async def _do(self, sending: "_Sending", message: pb.ServerMessage, client: int, steps: int) -> None:
        kind, epoch = message.WhichOneof("kind"), message.begin.epoch
        if kind == "begin":
            for step in range(steps):  # of one batch alone a server would soon have learned all, and compute denormals
                (made,) = self.message(epoch, client * steps + step, False)
                made.batch.step = step
                await sending.say(self._of(client, [made]), placed=True)
            weights = self.weights if message.begin.return_weights else []
            end = pb.EpochEnd(epoch=epoch, samples=steps * BATCH_SIZE, uploads=steps, weights=weights)
            await sending.say(pb.ClientMessage(epoch_end=end), placed=True)
        elif kind == "test":
            for test in [self._of(client, self.message(message.test.epoch, 0, True)), self.end(message.test.epoch)]:
                await sending.say(test)
        else:
            await sending.say(pb.ClientMessage(finished=pb.Finished()), placed=True)

    def _of(self, client: int, messages: list[pb.ClientMessage]) -> pb.ClientMessage:
        messages[0].batch.client = client
        return messages[0]


class _Sending:
    """A client's messages, in their order (docs/reference/protocol.md)."""

    def __init__(self, call: Any, window: int) -> None:
        self._call, self._window = call, window
        self._turn, self._room = asyncio.Lock(), asyncio.Condition()
        self._place, self._received, self._on_the_way = 0, 0, dict[int, int]()  # sizes by place
        self._last = time.monotonic()

    async def say(self, message: pb.ClientMessage, *, placed: bool = False) -> None:
        size = message.ByteSize()
        async with self._room:
            await self._room.wait_for(lambda: not placed or self._has_room(size))
        async with self._turn:
            if placed:
                self._place += 1
                message.place, self._on_the_way[self._place] = self._place, size
            message.durable, self._last = self._received, time.monotonic()
            await self._call.write(message)

    def _has_room(self, size: int) -> bool:
        return not self._on_the_way or sum(self._on_the_way.values()) + size <= self._window

    async def heard(self, message: pb.ServerMessage) -> None:
        self._received = max(self._received, message.place)
        async with self._room:
            self._on_the_way = {p: size for p, size in self._on_the_way.items() if p > message.applied}
            self._room.notify_all()

    async def stay_alive(self) -> None:
        while True:
            await asyncio.sleep(1)
            if time.monotonic() - self._last > 5:
                await self.say(pb.ClientMessage(alive=pb.Alive()))


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


async def feed_all(feeders: Feeders, address: str, count: int) -> None:
    await asyncio.gather(*(feeders.feed(address, client) for client in range(count)))


def fed(config: Config) -> Row:
    own, rest = split_cores()
    feeders, count = Feeders(config), config.clients.count
    with serving(config) as (children, port):
        if rest:
            os.sched_setaffinity(children[0].process.pid, own)
            os.sched_setaffinity(0, rest)
        try:
            asyncio.run(feed_all(feeders, f"127.0.0.1:{port}", count))
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
    from halfpass.report.theme import BLUE, VERMILLION, picture_file

    shown = [row for row in rows if row["group"] == "nodes"]

    def paint(figure: Any) -> None:
        figure.set_layout_engine("constrained")
        for axes, key, label, colour in zip(
            figure.subplots(2, 1, sharex=True), ("seconds_a_round", "peak_mib_of_the_machine"),
            ("seconds a round", "memory of all\nprocesses, MiB"), (BLUE, VERMILLION), strict=True,
        ):  # fmt: skip
            counts, values = [row["clients"] for row in shown], [row[key] for row in shown]
            axes.plot(counts, values, "o-", color=colour)
            axes.set_xscale("log")
            axes.set_xticks(counts, [f"{count:,}" for count in counts])
            axes.set_xticks([], minor=True)
            axes.set_ylim(0, 1.15 * max(values))
            axes.set_ylabel(label)
            axes.grid(axis="y")
        axes.set_xlabel("nodes, of which up to ten train in a round")

    out.write_text(picture_file("scale", 3.4, paint), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Many nodes, and many streams to one server.")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas")
    parser.add_argument("--counts", help="other numbers of clients, with commas")
    parser.add_argument("--out", type=Path, help="file to write, such as results/scale.json")
    parser.add_argument("--draw", action="store_true", help="draw docs/results/scale.svg from results/scale.json")
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
