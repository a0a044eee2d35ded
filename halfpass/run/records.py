"""What a run writes: `config.yaml`, a row per epoch per process in `metrics.jsonl`, weights, `result.json`."""

import datetime
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from halfpass.algorithm.client import Client
from halfpass.algorithm.server import Server
from halfpass.algorithm.whole import Whole
from halfpass.bounded import MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from halfpass.config import DECOUPLED, RECORDED, SPLIT, Config, as_dict, flatten, from_dict, nested
from halfpass.data.feeding import feeding_as_dict, feeding_of
from halfpass.data.samples import Dataset, digest
from halfpass.errors import InputError, RunError, reason
from halfpass.files import explained, make_folder, read_mapping, refuse_place, replacing, write_json
from halfpass.run import checkpoint
from halfpass.run.epoch import Score, Tally, Values
from halfpass.run.tracking import Tracks
from halfpass.tasks.task import Task
from halfpass.wire.disk import append, sync
from halfpass.wire.meter import Meter

Row = dict[str, Any]
LOG = logging.getLogger("halfpass")
DATA = "data.json"  # in a run folder: digests of its samples
SERVED = "serve.json"  # in the run folder of a server that was started by hand: where it listened
JOINED = "join.json"  # in the folder of such a client: where it joined
LEDGER = "ledger.csv"  # in a server's run folder: a line for each batch that it has learned from, in that order
CHECKPOINT = "unfinished.pt"  # in a run folder, from its first epoch's end to its last's

ROW_KEYS = (
    "epoch", "process", "loss", "test_accuracy", "aux_test_accuracy", "joint_test_accuracy", "metric", "metric_unit",
    "test", "aux_test", "joint_test", "tested", "steps", "samples", "uploads", "busy_seconds", "waiting_seconds",
    "learning_rate", "peak_memory_bytes", "bytes_up", "bytes_down",
    "socket_up", "socket_down",
)  # fmt: skip


def row(epoch: int, process: str, tally: Tally, epoch_seconds: float, **values: Any) -> Row:
    """A row of `metrics.jsonl`: one process's epoch, `epoch` counted from 0 here and from 1 in the file.

    What a process does not know is null. Waiting is what is left of the epoch's seconds, evaluation not included.
    """
    known = {
        "epoch": epoch + 1, "process": process, "loss": finite_or_none(tally.mean_loss), "steps": tally.steps,
        "samples": tally.samples, "busy_seconds": tally.busy_seconds, "learning_rate": tally.learning_rate,
        "peak_memory_bytes": tally.peak_memory_bytes,
        "waiting_seconds": max(0.0, epoch_seconds - tally.busy_seconds), **values,
    }  # fmt: skip
    return {key: known.get(key) for key in ROW_KEYS}


def scores(
    task: Task, *, test: Values | None = None, aux: Values | None = None, joint: Values | None = None
) -> dict[str, Any]:
    """The columns of a row, or of a result, that say how well a test went. Accuracy has columns of its own where it is
    that of classes, which is what it has always been there."""
    parts = {"test": test, "aux_test": aux, "joint_test": joint}
    known: dict[str, Any] = {"metric": task.lead, "metric_unit": task.unit}
    for part, values in parts.items():
        known[part] = None if values is None else {name: finite_or_none(value) for name, value in values.items()}
        accuracy = None if values is None or task.name != "classification" else finite_or_none(values["accuracy"])
        known[f"{part}_accuracy"] = accuracy
    return known


def epoch_rows(
    epoch: int,
    seconds: float,
    task: Task,
    server: Tally,
    clients: Mapping[int, Tally],
    score: Score | None,
    auxiliary: Mapping[int, Values],
    meters: Mapping[int, Meter],
    sockets: Mapping[int, tuple[int, int] | None],
    before: Sequence[Row],
) -> list[Row]:
    """The rows of one epoch of a split run: the clients' and, last, the server's. Where several clients tested, a
    client's has the server half's score on its own test set, of so many samples `tested`.

    `meters` and `sockets` (up, down) count from the beginning of the run; `before` are the rows of earlier epochs.
    """
    rows = []
    for k, tally in sorted(clients.items()):
        counted = dict(zip(("socket_up", "socket_down"), sockets[k] or (None, None), strict=True))
        counted |= {"bytes_up": meters[k].up.total(), "bytes_down": meters[k].down.total()}
        earlier = [r for r in before if r["process"] == f"client-{k}"]
        new = {key: None if n is None else n - sum(r[key] for r in earlier) for key, n in counted.items()}
        new["uploads"] = tally.uploads
        tested = scores(task, aux=auxiliary.get(k))
        if score is not None and k in score.sites:
            site = score.sites[k]
            own = scores(task, test=site.values(), joint=site.joint_values())
            tested |= {"test": own["test"], "joint_test": own["joint_test"], "tested": site.samples}
        rows.append(row(epoch, f"client-{k}", tally, seconds, **tested, **new))
    of_server = scores(task)
    if score is not None:
        of_server = scores(task, test=score.values(), joint=score.joint_values()) | {"tested": score.samples}
    return [*rows, row(epoch, "server", server, seconds, **of_server)]


def peak_so_far(rows: Sequence[Row], side: str) -> int:
    """Bytes: a side's largest in its rows of earlier epochs, which may have run before a resume; 0 without any."""
    return max((r["peak_memory_bytes"] or 0 for r in rows if r["process"] == side), default=0)


def finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Wires:
    """The bytes of all clients' wires over a whole run."""

    meters: Sequence[Meter]
    sockets: tuple[int, int] | None  # (up, down), evaluation not included; None without sockets

    def as_dict(self) -> dict[str, Any]:
        up, down = Counter[str](), Counter[str]()
        for meter in self.meters:
            up.update(meter.up)
            down.update(meter.down)
        socket_up, socket_down = self.sockets or (None, None)
        return {
            "up": {kind: up[kind] for kind in ("activations", "labels", "weights", "other")},
            "down": {kind: down[kind] for kind in ("gradients", "weights", "other")},
            "socket_up": socket_up,
            "socket_down": socket_down,
        }

    def evaluation(self) -> dict[str, int]:
        return {
            "up": sum(meter.evaluation_up for meter in self.meters),
            "down": sum(meter.evaluation_down for meter in self.meters),
        }


def result(
    config: Config, task: Task, cut: str | None, rows: Sequence[Row], wires: Wires, environment: dict[str, Any]
) -> dict[str, Any]:
    """`result.json`, from the rows of all epochs. Scores are the last epoch's on the test set, never the best's."""
    last = config.train.epochs
    clients = [f"client-{k}" for k in range(config.clients.count)]
    owner = [r for r in rows if r["process"] in ("server", "whole")]
    tested = next(r for r in owner if r["epoch"] == last)
    of_clients = [r for r in rows if r["epoch"] == last and r["process"] in clients]
    auxiliary = [r["aux_test_accuracy"] for r in of_clients if r["aux_test_accuracy"] is not None]
    split = config.method != "centralized"
    separate = split and config.runtime == "processes"
    settings = flatten(as_dict(config)) | {"model.cut": cut}
    if config.method == "conventional":
        settings["model.head"] = None
    return {
        **{name: settings[key] if split or name not in SPLIT else None for name, key in RECORDED.items()},
        "test_every": config.train.test_every,
        "test_accuracy": tested["test_accuracy"],
        "joint_test_accuracy": tested["joint_test_accuracy"],
        "aux_test_accuracy": sum(auxiliary) / len(auxiliary) if auxiliary else None,
        "metric": task.lead, "higher_is_better": task.higher_is_better, "metric_unit": task.unit,
        "test": tested["test"], "joint_test": tested["joint_test"],
        "aux_test": _mean_values([r["aux_test"] for r in of_clients if r["aux_test"] is not None]),
        "sites": [
            {"client": int(r["process"].removeprefix("client-")), "samples": r["tested"],
             **{part: r[part] for part in ("test", "aux_test", "joint_test")}}
            for r in of_clients if r["tested"] is not None
        ],
        "train_seconds": sum(r["busy_seconds"] + r["waiting_seconds"] for r in owner),
        "bytes": wires.as_dict(),
        "evaluation_bytes": wires.evaluation(),
        "peak_memory_bytes": {
            "client": [_peak(rows, client) for client in clients] if separate else [],
            "server": _peak(rows, "server") if separate else None,
            "colocated": None if separate else _peak(owner, owner[0]["process"]),
        },
        "seconds": {
            "client_busy": _mean_seconds(rows, clients, "busy_seconds") if split else None,
            "client_waiting": _mean_seconds(rows, clients, "waiting_seconds") if separate else None,
            "server_busy": sum(r["busy_seconds"] for r in owner),
            "server_waiting": sum(r["waiting_seconds"] for r in owner) if separate else None,
        },
        "environment": environment,
    }


def _mean_values(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None] | None:
    """Of each metric, over those that have it."""
    if not found:
        return None
    known = {name: [v for values in found if (v := values.get(name)) is not None] for name in found[0]}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}


def _peak(rows: Sequence[Row], process: str) -> int:
    return max((r["peak_memory_bytes"] for r in rows if r["process"] == process), default=0)


def _mean_seconds(rows: Sequence[Row], clients: Sequence[str], key: str) -> float:
    """Over the run, of a client on average."""
    return sum(r[key] for r in rows if r["process"] in clients) / len(clients)


def environment() -> dict[str, Any]:
    """Where figures were measured: commit (with + where the tree was changed), versions, hardware."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
    }


def command_line(program: str, arguments: Sequence[str] | None = None) -> str:
    """What was typed, for a results file: `program` stands for what this process was started by."""
    return " ".join([program, shlex.join(sys.argv[1:] if arguments is None else arguments)]).rstrip()


def _commit() -> str:
    here = Path(__file__).resolve().parent.parent  # the whole package
    try:
        tracked = _git(here, "ls-files", "--error-unmatch", __file__)
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return f"halfpass {metadata.version('halfpass')}"
    return commit + ("+" if tracked and _git(here, "status", "--porcelain", "-uno", "--", ".") else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hardware() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {available_cores()} cores{gpu}"


def _digests(data: Dataset, *, test_alone: bool = False) -> dict[str, str]:
    parts = {"test": data.test} if test_alone else {"training": data.train, "test": data.test}
    return {part: digest(samples) for part, samples in parts.items()}


def _fed(data: Dataset) -> dict[str, Any]:
    feeding = feeding_of(data)
    return {"how_to_feed": feeding.as_text(), "names": list(data.names), **feeding_as_dict(feeding)}


class RunFolder:
    """A folder that one run is written to."""

    def __init__(self, path: Path) -> None:
        self.path, self._checkpoint = path, path / CHECKPOINT
        self._noted, self._ledger_size = list[bytes](), 0  # lines that are not in the ledger yet; its bytes
        self._rows = list[str]()  # that are not in metrics.jsonl yet
        self._tracks: Tracks | None = None
        self.environment = environment()  # as it is when the run begins: the tree may change meanwhile

    @classmethod
    def create(cls, path: Path, config: Config) -> "RunFolder":
        """Makes the folder and writes the configuration; refuses a folder that holds a run."""
        refuse_run(path)
        make_folder("out", path)
        folder = cls(path)
        folder.write_config(config)
        return folder

    @contextmanager
    def tracked(self, config: Config) -> "Iterator[RunFolder]":
        """Trackers, where the settings name some, follow what is written here meanwhile."""
        self._tracks = Tracks(config, self.path)
        try:
            yield self
        finally:
            self._tracks.finish(None)  # nothing, where the run has finished
            self._tracks = None

    def write_config(self, config: Config) -> None:
        with replacing(self.path / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(as_dict(config), sort_keys=False))

    @classmethod
    def for_client(cls, path: Path, index: int) -> "RunFolder":
        """A folder that this process only adds its own weights to; refuses one that holds that client's already."""
        _refuse_folder(path, [f"client-{index}.safetensors"])
        return cls(path)

    def part(self, name: str, config: Config) -> "RunFolder":
        """A folder in it, of another owner's; made unless the run is gone on with. The state is kept by the whole."""
        part = RunFolder(self.path / name) if self.has_checkpoint else RunFolder.create(self.path / name, config)
        part.environment, part._checkpoint = self.environment, self._checkpoint
        return part

    def keep_digests(self, sites: Sequence[Dataset]) -> None:
        """Notes which samples are trained and tested on: what goes on with the run, or tests it, must find them. Beside
        that, for who uses the weights elsewhere, what was done to the inputs."""
        write_json(self.path / DATA, {"sites": [_digests(site) | {"inputs": _fed(site)} for site in sites]})

    def check_digests(self, sites: Sequence[Dataset], *, test_alone: bool = False, first: int = 0) -> None:
        """Raises InputError where `sites`, of which the first has that number, have other samples than were noted; a
        run of an older version noted none."""
        if not (file := self.path / DATA).is_file():
            return
        known = read_mapping(file)[1].get("sites")
        for number, site in enumerate(sites, first):
            noted = known[min(number, len(known) - 1)] if isinstance(known, list) and known else {}
            noted = noted if isinstance(noted, dict) else {}
            for part, found in _digests(site, test_alone=test_alone).items():
                if noted.get(part) != found:
                    expected = f"the run's {part} samples (digest {noted.get(part)})"
                    remedy = "restore them; a data() that draws must do so by seeds of its own, or global generators"
                    raise InputError(f"data {site.name}", expected, f"others (digest {found})", remedy)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return checkpoint.there(self._checkpoint)

    def save_checkpoint(self, config: Config, epochs: int, state: Mapping[str, Any], run: str = "") -> None:
        """Writes all that the run needs to go on behind so many epochs, or in the midst of the next. What was kept
        before stays as the one before it. `run` names the run, where it is one between processes. Raises RunError where
        there is no room."""
        self._write_rows()  # before the state behind them is
        whole = {"epochs": epochs, "environment": self.environment, "settings": as_dict(config), "state": state}
        checkpoint.write(self._checkpoint, run, whole)

    def read_checkpoint(self, config: Config) -> tuple[int, dict[str, Any]] | None:
        """(epochs that are done, the state behind them), tensors on the CPU; None where there is none. Raises
        InputError where it cannot be read, or is of other settings."""
        if not self.has_checkpoint:
            return None
        read = checkpoint.read(self._checkpoint)
        epochs, earlier, state, settings = (read[key] for key in ("epochs", "environment", "state", "settings"))
        refuse_changes(self.path, config, settings)
        for key, now in self.environment.items():
            known = str(earlier[key]).split("; ")  # several, where several commits or machines made one run
            self.environment[key] = earlier[key] if str(now) in known else f"{earlier[key]}; {now}"
        return epochs, state

    def load_checkpoint(self, config: Config, load: Callable[[dict[str, Any]], None]) -> list[Row]:
        """Where there is one, gives its state to `load`; returns the rows of the epochs before it."""
        if (kept := self.read_checkpoint(config)) is None:
            return []
        load(kept[1])
        return self.rows(kept[0])

    def rows(self, epochs: int) -> list[Row]:
        """Those of the first so many epochs; later ones, of an epoch that was not kept, leave the file. Raises
        InputError where some are missing."""
        file = self.path / "metrics.jsonl"
        try:
            lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
            rows = [loaded for line in lines if line.endswith("\n") and (loaded := parse_json(line))["epoch"] <= epochs]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(str(file), "a row in each line", reason(error), "train anew") from None
        found = len({entry["epoch"] for entry in rows})
        if found != epochs:
            expected = f"rows of the {epochs} epochs that were trained"
            raise InputError(str(file), expected, f"those of {found}", "train anew")
        if len(rows) < len(lines):
            file.write_text("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in rows))
        if self._tracks is not None:
            self._tracks.log(rows)  # which an earlier process may not have got to
        return rows

    def note(self, client: int, epoch: int, step: int, samples: int) -> None:
        """A line of `ledger.csv`: the server has learned from this batch. In the file by the next checkpoint."""
        self._noted.append(b"%d,%d,%d,%d\n" % (client, epoch + 1, step, samples))

    def ledger_bytes(self) -> int:
        """The ledger's size, once all that was noted is in it. Raises RunError where there is no room, and then nothing
        of it is."""
        file = self.path / LEDGER
        if not self._noted:
            return self._ledger_size
        lines = b"".join([b"" if self._ledger_size else b"client,epoch,step,samples\n", *self._noted])
        with explained(file), file.open("r+b" if self._ledger_size else "wb") as opened:
            opened.seek(self._ledger_size)
            opened.write(lines)
            opened.flush()
            os.fsync(opened.fileno())
        self._ledger_size += len(lines)
        self._noted.clear()
        return self._ledger_size

    def cut_ledger(self, size: int) -> None:
        """What was noted behind a checkpoint goes: it is learned from again."""
        file = self.path / LEDGER
        there = file.stat().st_size if file.is_file() else 0
        if size > there:  # it is a record, and nothing that is gone on with
            LOG.warning("%s has lost lines: %d of its %d bytes are there", file, there, size)
            size = there
        if size:
            os.truncate(file, size)
        else:
            file.unlink(missing_ok=True)
        self._ledger_size = size

    def add_rows(self, rows: list[Row]) -> list[Row]:
        """To `metrics.jsonl`; where there is no room, with those that come later, or at the end."""
        self._rows += [json.dumps(entry, allow_nan=False) + "\n" for entry in rows]
        try:
            self._write_rows()
        except RunError as error:
            LOG.warning("not written yet: %s", error)
        if self._tracks is not None:
            self._tracks.log(rows)
        return rows

    def _write_rows(self) -> None:
        """Raises RunError where there is no room, and then nothing of them is there."""
        if self._rows:
            path = self.path / "metrics.jsonl"
            with explained(path):
                append(path, path.stat().st_size if path.is_file() else 0, "".join(self._rows).encode())
                sync(path)
            self._rows = []

    def save_client(self, client: Client, config: Config, signature: str) -> None:
        head = {} if client.head is None else client.head.state_dict()
        parts = {"client_half": client.half.state_dict(), "auxiliary_head": head}
        self._save_weights(f"client-{client.index}", parts, config, signature)

    def save_server(self, server: Server, config: Config, signature: str) -> None:
        self._save_weights("server", {"server_half": server.weights()}, config, signature)

    def save_whole(self, whole: Whole, config: Config, signature: str) -> None:
        self._save_weights("whole", {"whole": whole.model.state_dict()}, config, signature)

    def _save_weights(
        self, name: str, parts: Mapping[str, Mapping[str, Tensor]], config: Config, signature: str
    ) -> None:
        """`NAME.safetensors`, each part's tensors under `PART.`: one owner's weights and nobody else's. The signature
        (`signature.py`) says how to use them."""
        tensors = {
            f"{part}.{key}": value.detach().cpu().contiguous().clone()  # tied weights share memory; in a file none may
            for part, state in parts.items()
            for key, value in state.items()
        }
        make_folder("out", self.path)
        with replacing(self.path / f"{name}.safetensors") as partial:
            save_file(tensors, partial, metadata={"config": json.dumps(as_dict(config)), "signature": signature})

    def finish(self, outcome: dict[str, Any]) -> dict[str, Any]:
        self._write_rows()
        write_json(self.path / "result.json", outcome)
        if self._checkpoint.parent == self.path:
            checkpoint.remove(self._checkpoint)
        if self._tracks is not None:
            self._tracks.finish(outcome)
        return outcome


def default_folder(config: Config) -> str:
    """A new name under runs/, which tells method, data set, network and time."""
    name = f"{config.method}-{config.data.name}-{config.model.name}".replace(":", "-").replace("/", "-")
    return f"runs/{now()}-{name}"


def now() -> str:
    """Date and time to the millisecond, for the names of folders."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S.%f}"[:-3]


def refuse_run(path: Path) -> None:
    """Raises InputError when the folder cannot take a run: it holds one, or is no folder."""
    weights = ["server.safetensors", "whole.safetensors"]  # which a run has left that ended in its first epoch
    _refuse_folder(path, ["metrics.jsonl", "result.json", "compare.json", CHECKPOINT, *weights])


def _refuse_folder(path: Path, files: Sequence[str]) -> None:
    held = [name for name in files if (path / name).exists()]
    if held:
        remedy = "choose another folder"
        if checkpoint.there(path / CHECKPOINT) or any(path.glob(f"*/{CHECKPOINT}")):
            remedy += f", or go on with it: halfpass resume {path}"
        raise InputError("out", "a folder without a run", f"{held[0]} in {path}", remedy)
    refuse_place("out", path)


def read_config(path: Path) -> Config:
    """The settings of the run in that folder."""
    file = path / "config.yaml"
    try:
        settings = flatten(parse_yaml(read_text(file, MOST_YAML_BYTES)))
        if settings.get("method") == "centralized":  # an older one may have what was of no effect
            settings = {key: value for key, value in settings.items() if key not in DECOUPLED}
        return from_dict(nested(settings))
    except (OSError, ValueError, TypeError, AttributeError) as error:  # an InputError is a ValueError
        found = " ".join(str(error).split())
        raise InputError(str(file), "the settings of a run", found, "restore the file, or run again") from None


def read_result(path: Path) -> dict[str, Any]:
    """A finished run's `result.json`; raises RunError when the run did not get that far."""
    file = path / "result.json"
    if not file.is_file():
        raise RunError(str(path), "result.json of a finished run", "none", "look at what the run printed")
    return read_mapping(file)[1]


def read_where(file: Path, address: str) -> dict[str, Any]:
    """What `serve.json` or `join.json` says of where a process listened or joined, under `address`, and how."""
    said = read_mapping(file)[1]
    above = said.setdefault("above", None)
    if not (isinstance(said.get(address), str) and isinstance(said.get("insecure"), bool)
            and (above is None or isinstance(above, str))):  # fmt: skip
        expected, remedy = f"{address!r}, 'above' and 'insecure'", "restore the file, or say them again with --resume"
        raise InputError(str(file), f"{expected} as they were written", repr(said)[:80], remedy)
    return said


# In which one training, begun at one time and gone on with or looked for at another, may differ.
_FREE = (
    "out", "train.threads", "train.test_every", "data.path", "data.download", "wire.window", "wire.timeout",
    "wire.reconnect", "checkpoint.every", "checkpoint.spool",
    "server.store", "server.store_limit",
    "tls.folder", "tls.certificate", "tls.key", "tls.authority", "tls.tokens", "tls.token", "tls.server_name",
    "log.json", "log.level", "metrics.port", "metrics.host",
    "track.to", "track.folder",
)  # fmt: skip


def refuse_changes(place: Path, config: Config, began: Mapping[str, Any]) -> None:
    """Raises InputError, each one in it, where settings make another training than those with which it began."""
    before = flatten(began)
    now = {k: v for k, v in flatten(as_dict(config)).items() if k not in _FREE and before.get(k) != v}
    if now:
        expected = ", ".join(f"{key} {before.get(key)}" for key in now) + ", with which it began"
        found = ", ".join(str(value) for value in now.values())
        raise InputError(str(place), expected, found, "go on with those settings, or train anew")


def difference(
    config: Config, others: Mapping[str, Any], counts: Callable[[str], bool] = lambda key: key not in _FREE
) -> tuple[str, Any, Any] | None:
    """A setting that counts, by default one that makes another training, and is not that of the others, which are as
    `as_dict` gives them: its name, and both values."""
    there = flatten(others)
    settings = flatten(as_dict(config)).items()
    return next(((k, v, there.get(k)) for k, v in settings if counts(k) and there.get(k) != v), None)
