"""One server and 1 to 32 client processes: does the server keep its pace, does anyone starve, what does a client cost?

    python benchmarks/clients.py --out results/clients.json     all counts, both orders; 17 minutes on two cores
    python benchmarks/clients.py --clients 1,4 --batches 32         does it run?

Server and clients are processes as `halfpass serve` and `halfpass join` run them, decoupled and splitfed, one thread
each. ResNet-20 is cut behind its stem and batches are small, so the server half has far more to compute than a client
half, and one client is enough to keep the server busy: `server_busy_share` says how busy it was. What is left to see is
what more clients cost: so the server has a core of its own, as if the clients were elsewhere, and they share the other
cores (on Linux, with two cores at least). All counts train on the same batches per epoch, dealt out evenly, of random
pictures; a client may be four batches ahead of the server.

  batches per second   that the server trained, over the time of its epochs but the first; without evaluation, with the
                       averaging of the client halves and the wait for the first batches of an epoch
  served               batches of each client that the server had trained on when the first client's epoch was done: the
                       most over the least, in the worst epoch. 1 is even; in round-robin all but the last are equal
  memory               each process's own peak above what it held before its first batch

Exit status: 1 where the server falls more than 10 % behind its pace with one client, or a client starves.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from step import RECIPE, ROOT, Row, at_least_one, say

from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, WireConfig
from halfpass.cut import CutBatch
from halfpass.errors import RunError
from halfpass.files import write_json
from halfpass.report.runs import read_run
from halfpass.run.children import Child, stopping
from halfpass.run.records import RunFolder, command_line, environment
from halfpass.run.replay import Lessons
from halfpass.run.server_process import serve

COUNTS, ORDERS = [1, 2, 4, 8, 16, 32], ("round-robin", "arrival")
BATCH_SIZE, EPOCHS = 8, 3
BATCH_BYTES = BATCH_SIZE * 4 * 16 * 32 * 32  # at the cut
AHEAD = 4  # batches
PACE_BAR = 0.9  # of the batches per second with one client
STARVING_BAR = 2.0  # most over least served
END_SECONDS = 60.0  # for the clients to end after the server


@dataclass(frozen=True)
class Served:
    """A run as its server saw it."""

    result: dict[str, Any]
    rows: Sequence[Mapping[str, Any]]
    order: list[tuple[int, int]]  # (epoch, client) of each batch


def settings(clients: int, order: str, batches: int, folder: Path) -> Config:
    return Config(
        runtime="processes", data=DataConfig(name="benchmarks.step:plain_data", limit=batches * BATCH_SIZE),
        model=ModelConfig("resnet20", "stem", "linear"), clients=ClientsConfig(clients),
        train=replace(RECIPE, epochs=EPOCHS, batch_size=BATCH_SIZE, threads=1),
        wire=WireConfig(order=order, window=AHEAD * BATCH_BYTES + 2**16),  # type: ignore[arg-type]  # and its labels
        out=str(folder),
    )  # fmt: skip


def serve_clients(config: Config) -> Served:
    """The server of one run, in this process; its clients are child processes."""
    folder = RunFolder.create(config.folder, config).path
    order: list[tuple[int, int]] = []
    learn = Lessons.learn

    def noting(self: Lessons, batch: CutBatch, *rest: Any) -> Any:
        order.append((batch.epoch, batch.client))
        return learn(self, batch, *rest)

    children: list[Child] = []
    own, rest = split_cores()
    if rest:
        os.sched_setaffinity(0, own)

    def start_clients(port: int) -> None:
        for k in range(config.clients.count):
            options = ["--client", str(k), "--config", str(folder / "config.yaml")]
            children.append(Child(f"client {k}", ["join", f"127.0.0.1:{port}", *options], quiet=True))
            if rest:
                os.sched_setaffinity(children[-1].process.pid, rest)

    with stopping(children), mock.patch.object(Lessons, "learn", noting):
        result = serve(config, "127.0.0.1:0", start_clients)
        for child in children:
            if child.process.wait(END_SECONDS) != 0:
                raise child.failure()
    return Served(result, read_run(folder).metrics, order)


def split_cores() -> tuple[set[int], set[int]]:
    """The server's core and the clients'; none for them where they have to share it, or where that cannot be said."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    return set(cores[:1]), set(cores[1:])


def measure(config: Config) -> Row:
    """A row of `results/clients.json` but for what compares it with one client."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # a server with no past
        run = pool.submit(serve_clients, config).result()
    counted = [row for row in run.rows if row["process"] == "server" and row["epoch"] > 1]
    busy = sum(row["busy_seconds"] for row in counted)
    seconds = busy + sum(row["waiting_seconds"] for row in counted)
    most, least = most_and_least(run.order, config.clients.count)
    memory = run.result["peak_memory_bytes"]
    return {
        "clients": config.clients.count, "order": config.wire.order, "batches_per_epoch": counted[0]["steps"],
        "server_batches_per_second": sum(row["steps"] for row in counted) / seconds,
        "server_busy_share": busy / seconds,
        "served_most": most, "served_least": least, "served_max_over_min": most / least if least else None,
        "client_peak_mib": max(memory["client"]) / 2**20, "server_peak_mib": memory["server"] / 2**20,
    }  # fmt: skip


def most_and_least(order: Sequence[tuple[int, int]], clients: int) -> tuple[int, int]:
    """Batches of the client served most and of the one served least when the first was through with its epoch; of the
    least even epoch. Raises RunError where an epoch ended before all batches of all clients were served."""
    found = []
    for epoch in range(EPOCHS):
        served = [client for of, client in order if of == epoch]
        every = Counter(served)
        if len(every) < clients or max(every.values()) - min(every.values()) > 1:  # shards differ by a sample at most
            raise RunError(f"epoch {epoch}", f"as many batches of each of {clients} clients", str(every), "report this")
        so_far: Counter[int] = Counter({client: 0 for client in range(clients)})
        for client in served:
            so_far[client] += 1
            if so_far[client] == every[client]:
                break
        found.append((max(so_far.values()), min(so_far.values())))
    return max(found, key=lambda pair: pair[0] / (pair[1] or 0.1))


def compared(row: Row, one: Row) -> Row:
    """With one client's row of the same order."""
    more = {"throughput_over_one_client": row["server_batches_per_second"] / one["server_batches_per_second"]}
    more["client_peak_over_one_client"] = row["client_peak_mib"] / one["client_peak_mib"]
    if row["clients"] > one["clients"]:
        added = row["clients"] - one["clients"]
        more["server_mib_per_added_client"] = (row["server_peak_mib"] - one["server_peak_mib"]) / added
    return row | more


def met(row: Row) -> bool:
    even = row["served_max_over_min"] is not None and row["served_max_over_min"] <= STARVING_BAR
    return even and row["throughput_over_one_client"] >= PACE_BAR


def print_row(row: Row) -> None:
    print(
        f"{row['clients']:>3} clients, {row['order']:<12}{row['server_batches_per_second']:>7.2f} batches/s"
        f" ({row['throughput_over_one_client']:.3f} of one client's, server busy {row['server_busy_share']:.3f}),"
        f" served {row['served_most']} to {row['served_least']},"
        f" client {row['client_peak_mib']:.1f} MiB, server {row['server_peak_mib']:.1f} MiB",
        flush=True,
    )


# --- The command ------------------------------------------------------------------------------------------------------


def chosen_counts(text: str) -> list[int]:
    """`1,4` → numbers; 1 is always among them, for the others are compared with it."""
    return sorted({1, *map(at_least_one, text.split(","))})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A server's pace, fairness and memory with more and more clients.")
    parser.add_argument("--clients", type=chosen_counts, default=COUNTS, help="numbers of clients, by commas")
    parser.add_argument("--orders", default=",".join(ORDERS), help="wire.order: round-robin, arrival or both")
    parser.add_argument("--batches", type=at_least_one, default=512, help="of all clients together, per epoch")
    parser.add_argument("--out", type=Path, help="file to write, such as results/clients.json")
    options = parser.parse_args(arguments)
    options.orders = options.orders.split(",")
    if not set(options.orders) <= set(ORDERS):
        parser.error(f"expected --orders of {', '.join(ORDERS)}")
    if any(options.batches % count for count in options.clients):
        parser.error(f"expected --batches that {', '.join(map(str, options.clients))} clients can share evenly")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 0 when every bar is met."""
    options = parse(arguments)
    command = command_line("python benchmarks/clients.py", arguments)
    out = options.out and options.out.absolute()
    measured_on = environment()
    rows: list[Row] = []
    with contextlib.chdir(ROOT), tempfile.TemporaryDirectory() as folder:  # `data.name` is found from there
        for order in options.orders:
            one: Row = {}
            for count in options.clients:
                say(f"{count} clients, {order}")
                row = measure(settings(count, order, options.batches, Path(folder) / f"{order}-{count}"))
                one = one or row
                rows.append(compared(row, one))
                print_row(rows[-1])
                if out is not None:  # also what there is so far: a long measurement may be stopped
                    write_json(out, {"environment": measured_on, "command": command, "rows": rows})
    return 0 if all(map(met, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
