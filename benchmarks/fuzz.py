"""Changed bytes into every decoder of bytes from outside: does each give a value, or refuse in its own words?

    python benchmarks/fuzz.py --decoder all --inputs 1000000 --out results/fuzz.json       hours; goes on where it was
    python benchmarks/fuzz.py --decoder pictures --inputs 2000                              does it run?

Inputs are valid ones (`decoders.py`) with bits, lengths, ends and pieces changed. Where atheris can be imported
(`pip install atheris`), the lines of halfpass that an input reaches decide what is changed next, and libFuzzer's own
changes take turns with these; else changes are drawn by the seed alone. Code that is not Python's is not watched.

Each decoder runs in a process of its own. `other` counts the inputs that ended in neither way: another exception, an
input that took longer than the deadline, or a process that died, which ends the row. `peak_memory_growth_bytes` is what
the process held at most above what it held after its first inputs, `memory_growth_bytes` what it held at the end; of a
guided run what the fuzzer keeps is in both. `slowest_seconds` are the processor's, for one input. A picture may have as
many pixels as Pillow allows.
With --keep FOLDER the inputs of the first of each kind of failure go there; outside of the repository, please.
Exit status: 1 where `other` is not 0.
"""

import argparse
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from halfpass.files import write_json
from halfpass.run.memory import PeakMemory
from halfpass.run.records import command_line, environment

try:
    import atheris
except ImportError:
    atheris = None

DEADLINE_SECONDS = 20  # for one input, on a machine that does other things too
MOST_BYTES = 1 << 16  # of any input
WARM_INPUTS = 2000  # before memory counts
REPORT_SECONDS = 2.0
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
Row = dict[str, Any]


# --- Changes ----------------------------------------------------------------------------------------------------------


def _flip(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    return _put(data, at, bytes([data[at] ^ 1 << amount % 8]) if data else b"")


def _byte(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    return _put(data, at, bytes([amount % 256]))


def _cut(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    return data[:at]


def _drop(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    return data[:at] + data[at + 1 + amount % 64 :]


def _repeat(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    piece = data[at : at + 1 + amount % 64]
    return data[:at] + piece * (2 + amount % 7) + data[at + len(piece) :]


def _splice(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    return data[:at] + other[amount % (len(other) + 1) :]


def _insert(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    begin = amount % (len(other) + 1)
    return data[:at] + other[begin : begin + 1 + amount // 7 % 64] + data[at:]


def _number(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    """As a length is written: 1, 2, 4 or 8 bytes, in either order."""
    size, value = 1 << amount % 4, NUMBERS[amount // 4 % len(NUMBERS)]
    return _put(data, at, (value % 256**size).to_bytes(size, "big" if amount % 8 > 3 else "little"))


def _near(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    """A byte a little larger or smaller: a length that is off by one."""
    return _put(data, at, bytes([(data[at] + (1, -1, 2, -2)[amount % 4]) % 256]) if data else b"")


def _varint(data: bytes, at: int, amount: int, other: bytes) -> bytes:
    """As protobuf writes numbers, in place of a byte."""
    value, written = NUMBERS[amount % len(NUMBERS)], b""
    while value > 127:
        value, written = value >> 7, written + bytes([value & 127 | 128])
    return data[:at] + written + bytes([value]) + data[at + 1 :]


CHANGES: tuple[Callable[[bytes, int, int, bytes], bytes], ...] = (
    _flip, _byte, _cut, _drop, _repeat, _splice, _insert, _number, _near, _varint,
)  # fmt: skip


def _put(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def change(data: bytes, kind: int, where: int, amount: int, other: bytes) -> bytes:
    """One change of that kind; any numbers will do. `other` is a valid input that pieces are taken from."""
    return CHANGES[kind % len(CHANGES)](data, where % max(len(data), 1), amount, other)


def changed(data: bytes, seeds: Sequence[bytes], draws: random.Random) -> bytes:
    """One change, or up to four."""
    for _ in range(draws.choice((1, 1, 1, 2, 3, 4))):
        kind, where, amount = draws.randrange(len(CHANGES)), draws.randrange(1 << 20), draws.randrange(1 << 20)
        data = change(data, kind, where, amount, draws.choice(seeds))
    return data[: most_bytes(seeds)]


def most_bytes(seeds: Sequence[bytes]) -> int:
    """Of an input: what is repeated must not make all later ones large, and slow."""
    return min(MOST_BYTES, 4 * max(map(len, seeds)))


# --- One decoder, in a process of its own -----------------------------------------------------------------------------


class Trial:
    """Counts what became of the inputs, and says so in `folder/row.json` every few seconds."""

    def __init__(self, name: str, inputs: int, seconds: float, folder: Path) -> None:
        with atheris.instrument_imports(include=["halfpass"]) if atheris else nullcontext():
            from decoders import DECODERS
        self.inputs, self.limit_seconds, self.folder = inputs, seconds, folder
        (folder / "files").mkdir()
        self.decoder = DECODERS[name](folder / "files")
        self.counts = {"inputs": 0, "values": 0, "refusals": 0, "other": 0}
        self.slowest, self.failures = 0.0, dict[str, int]()
        self.memory, self.held = PeakMemory(torch.device("cpu")), resident_bytes()
        with (folder / "input").open("w+b") as file:  # the input at work, for whoever finds this process dead
            file.truncate(8 + 2 * MOST_BYTES)
            self.input = mmap.mmap(file.fileno(), 0)
        for seed in self.decoder.seeds:
            self.decoder.decode(seed)
        self.began = self.said = time.perf_counter()

    def __call__(self, data: bytes) -> None:
        self.input[: 8 + len(data)] = len(data).to_bytes(8, "little") + data
        began = time.process_time()  # of which other processes take nothing
        try:
            self.decoder.decode(data)
            self.counts["values"] += 1
        except self.decoder.refusals:
            self.counts["refusals"] += 1
        except BaseException as error:  # safetensors is Rust, whose panics are no Exception
            self._fail(error, data)
        self.slowest, now = max(self.slowest, time.process_time() - began), time.perf_counter()
        self.counts["inputs"] += 1
        if self.counts["inputs"] == WARM_INPUTS:
            self.memory, self.held = PeakMemory(torch.device("cpu")), resident_bytes()
        done = self.counts["inputs"] >= self.inputs or now - self.began > self.limit_seconds
        if done or now - self.said > REPORT_SECONDS:
            self.said = now
            self.say(done)
        if done:
            sys.stdout.flush()
            os._exit(0)  # libFuzzer would write its own report

    def _fail(self, error: BaseException, data: bytes) -> None:
        self.counts["other"] += 1
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        kind = f"{type(error).__name__} at {where}"
        if kind not in self.failures:
            (self.folder / f"failed-{len(self.failures)}").write_bytes(data)
            print(f"    {kind}: {' '.join(str(error).split())[:300]}", flush=True)
        self.failures[kind] = self.failures.get(kind, 0) + 1

    def say(self, done: bool) -> None:
        row = {
            **self.counts, "seconds": round(time.perf_counter() - self.began, 1),
            "peak_memory_growth_bytes": self.memory.peak_bytes(),
            "memory_growth_bytes": max(0, resident_bytes() - self.held), "slowest_seconds": round(self.slowest, 3),
            "failures": self.failures, "done": done,
        }  # fmt: skip
        partial = self.folder / "row.part"
        partial.write_text(json.dumps(row))
        partial.replace(self.folder / "row.json")


def resident_bytes() -> int:
    """0 where the system does not say."""
    said = Path("/proc/self/statm")
    return int(said.read_text().split()[1]) * mmap.PAGESIZE if said.exists() else 0


def run_child(name: str, inputs: int, seconds: float, seed: int, folder: Path) -> None:
    """Does not return."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trial = Trial(name, inputs, seconds, folder)
    seeds, draws = trial.decoder.seeds, random.Random(seed)
    if atheris is None:
        while True:
            signal.setitimer(signal.ITIMER_REAL, DEADLINE_SECONDS)  # whose signal ends this process
            trial(changed(draws.choice(seeds), seeds, draws))
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, content in enumerate(seeds):
        (corpus / f"seed-{i}").write_bytes(content)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        mine = random.Random(number)
        if (way := mine.randrange(4)) > 1:  # libFuzzer forgets valid inputs that reach no line of their own
            return changed(mine.choice(seeds), seeds, mine)[:most]
        new = changed(data, seeds, mine) if way == 1 else atheris.Mutate(data, most)
        return bytes(new[:most])

    options = (
        f"-seed={seed + 1}", f"-max_len={most_bytes(seeds)}", f"-timeout={DEADLINE_SECONDS}",
        f"-artifact_prefix={folder}/", "-rss_limit_mb=0", "-verbosity=0", "-mutate_depth=1", "-detect_leaks=0",
        "-len_control=0",
    )  # fmt: skip
    atheris.Setup([sys.argv[0], *options, str(corpus)], trial, custom_mutator=mutate)
    atheris.Fuzz()


# --- All of them ------------------------------------------------------------------------------------------------------


def measure(name: str, options: argparse.Namespace) -> Row:
    temporary = "/dev/shm" if Path("/dev/shm").is_dir() else None  # decoders of files write each input
    with tempfile.TemporaryDirectory(dir=temporary) as made:
        folder = Path(made)
        command = [sys.executable, __file__, "--decoder", name, "--child", made]
        command += [f"--{key}={getattr(options, key)}" for key in ("inputs", "seconds", "seed")]
        status = subprocess.run(command, stderr=subprocess.DEVNULL if atheris else None).returncode
        file = folder / "row.json"
        said = json.loads(file.read_text()) if file.exists() else dict.fromkeys(("inputs", "values", "refusals"), 0)
        row: Row = {"decoder": name, **said, "seed": options.seed, "guided": atheris is not None}
        if not row.pop("done", False):  # what it counted since it last said so is lost
            row["other"] = row.get("other", 0) + 1
            row["failures"] = {**row.get("failures", {}), f"the process ended with status {status}": 1}
        row["limit"] = f"{options.inputs} inputs" if row["inputs"] >= options.inputs else f"{options.seconds:g} s"
        if not row["failures"]:
            del row["failures"]
        if options.keep is not None and row["other"]:
            keep(folder, options.keep, name)
    return row


def keep(folder: Path, into: Path, name: str) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("failed-*"):
        (into / f"{name.replace(' ', '-')}-{file.name}").write_bytes(file.read_bytes())
    last = (folder / "input").read_bytes()
    size = int.from_bytes(last[:8], "little")
    (into / f"{name.replace(' ', '-')}-last").write_bytes(last[8 : 8 + size])


def kept_rows(file: Path | None, options: argparse.Namespace) -> list[Row]:
    """Those of earlier calls with the same seed."""
    if file is None or not file.exists():
        return []
    content = json.loads(file.read_text())
    rows = [{**row, "environment": row.get("environment", content["environment"])} for row in content["rows"]]
    return [row for row in rows if row["seed"] == options.seed and not row["other"]]


def far_enough(row: Row, options: argparse.Namespace) -> bool:
    return bool(row["inputs"] >= options.inputs or row["seconds"] >= options.seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Changed bytes into every decoder of bytes from outside.")
    parser.add_argument("--decoder", default="all", help="one or several, with commas between; all; or list")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each decoder")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which a decoder's inputs end, if before")
    parser.add_argument("--seed", type=int, default=0, help="of the changes")
    parser.add_argument("--out", type=Path, help="file to write, such as results/fuzz.json; rows in it are kept")
    parser.add_argument("--again", action="store_true", help="what the file has already, too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where inputs that failed go")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child is not None:
        run_child(options.decoder, options.inputs, options.seconds, options.seed, options.child)
    from decoders import DECODERS

    names = list(DECODERS) if options.decoder in ("all", "list") else options.decoder.split(",")
    if options.decoder == "list" or not set(names) <= set(DECODERS):
        print("\n".join(DECODERS))
        return 0 if options.decoder == "list" else 2
    counted = ("decoder", "inputs", "seconds", "seed", "out")
    given = [f"--{key}={getattr(options, key)}" for key in counted]
    made = {"environment": environment(), "command": command_line("python benchmarks/fuzz.py", given)}
    made["fuzzer"] = "atheris, guided by the lines of halfpass" if atheris else "changes drawn by the seed, not guided"
    rows = kept_rows(options.out, options)
    for name in names:
        if not options.again and any(row["decoder"] == name and far_enough(row, options) for row in rows):
            continue
        row = {**measure(name, options), "environment": made["environment"]}
        rows = [*(other for other in rows if other["decoder"] != name), row]
        print(
            f"{name:<26}{row['inputs']:>10,} inputs{row.get('seconds', 0):>8.0f} s{row['values']:>10,} values"
            f"{row['refusals']:>10,} refusals{row['other']:>4} other"
            f"{row.get('peak_memory_growth_bytes', 0) / 1e6:>8.1f} MB more, slowest {row.get('slowest_seconds', 0)} s",
            flush=True,
        )
        if options.out is not None:
            order = sorted(rows, key=lambda row: list(DECODERS).index(row["decoder"]))
            write_json(options.out, {**made, "rows": order})
    return 1 if any(row["other"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
