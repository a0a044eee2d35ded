"""Run folders, read back and checked: `read_run`, `summary`, and runs that differ only by the seed as one `Series`.

What is wrong in a folder is told with its file and key. A run that was killed is read as far as it got, with a note.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from halfpass.bounded import parse_json
from halfpass.config import RECORDED, flatten
from halfpass.errors import InputError
from halfpass.files import read_mapping
from halfpass.report import tables

Row = Mapping[str, Any]

NO_SETTINGS = (  # of config.yaml; runs that differ in these are alike
    "out", "data.download", "server.store", "server.store_limit", "train.test_every", "track.to", "track.folder",
)  # fmt: skip
REQUIRED = (
    "method", "seed", "epochs", "test_accuracy", "aux_test_accuracy", "train_seconds",
    "bytes.up.activations", "bytes.up.labels", "bytes.up.weights", "bytes.up.other",
    "bytes.down.gradients", "bytes.down.weights", "bytes.down.other", "bytes.socket_up", "bytes.socket_down",
    "peak_memory_bytes.client", "peak_memory_bytes.server", "peak_memory_bytes.colocated",
    "seconds.client_busy", "seconds.client_waiting", "seconds.server_busy", "seconds.server_waiting",
    "environment.commit", "environment.python", "environment.torch", "environment.hardware", "environment.threads",
)  # fmt: skip
NUMBERS = (
    "test_accuracy", "aux_test_accuracy", "joint_test_accuracy", "test", "aux_test", "joint_test", "train_seconds",
    "bytes", "peak_memory_bytes", "seconds",
)  # fmt: skip
ROW_NUMBERS = (
    "loss", "test_accuracy", "aux_test_accuracy", "joint_test_accuracy", "busy_seconds", "waiting_seconds",
    "peak_memory_bytes", "bytes_up", "bytes_down", "socket_up", "socket_down",
)  # fmt: skip
LAST_BYTES = 2**16  # of events.jsonl, in which the last event is

PARTS = ("test", "aux_test", "joint_test")  # of a row: metrics by name


@dataclass(frozen=True)
class Run:
    """A run folder as read; `result` is None where the run did not finish."""

    path: Path
    config: str
    settings: Mapping[str, Any]  # config.yaml with dotted keys
    metrics: Sequence[Row]
    result: Mapping[str, Any] | None
    notes: Sequence[str]


@dataclass(frozen=True)
class Series:
    """Runs that differ only by the seed, their summaries, and what tells them from other runs of a report."""

    method: str
    settings: Mapping[str, str]
    runs: Sequence[Run]
    results: Sequence[tables.Result]

    @property
    def label(self) -> str:
        return tables.label(self.method, self.settings)


class Point(NamedTuple):
    """A point of a curve; the deviation is None where only one run has a value."""

    epoch: int
    mean: float
    deviation: float | None


# Reading


def read_run(path: Path) -> Run:
    """The run in folder `path`. InputError names the file, and the line or key, that is missing or wrong."""
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise InputError(str(path), "a run folder", "no config.yaml in it", "give a folder written by 'halfpass train'")
    config, settings = read_mapping(path / "config.yaml")
    metrics, notes = _read_metrics(path / "metrics.jsonl")
    result = None
    if (path / "result.json").exists():
        _, found = read_mapping(path / "result.json")
        configured = flatten(settings)  # tells the settings that halfpass did not have yet when the run was made
        result = {name: configured.get(key) for name, key in RECORDED.items() if name not in REQUIRED} | found
        _check_result(path / "result.json", flatten(result))
    else:
        last = max((row["epoch"] for row in metrics), default=0)
        notes = [*notes, f"unfinished: there is no result.json; the last epoch in metrics.jsonl is {last}"]
        notes += _failure(path / "events.jsonl")
    return Run(path, config, flatten(settings), metrics, result, notes)


def _read_metrics(file: Path) -> tuple[list[Row], list[str]]:
    """The rows; a last line that was cut off by a kill is left out, with a note."""
    if not file.exists():
        return [], ["there is no metrics.jsonl: no epoch was recorded"]
    lines = [(number, line) for number, line in enumerate(file.read_bytes().split(b"\n"), start=1) if line.strip()]
    rows: list[Row] = []
    for number, line in lines:
        try:
            row = parse_json(line.decode())
        except ValueError as error:
            if number == lines[-1][0]:
                return rows, [f"line {number} of metrics.jsonl is cut off and was left out"]
            raise InputError(f"{file}:{number}", "a JSON row", str(error), "remove the line") from error
        _check_row(row, f"{file}:{number}")
        rows.append(row)
    return rows, []


def _failure(file: Path) -> list[str]:
    """Why the run ended, where its last event is that it failed; nothing is said of a file that cannot be read."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - LAST_BYTES))
            event = parse_json(opened.read().splitlines()[-1].decode())
        return [f"failed: {event['text']}"] if event["event"] == "failed" else []
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _check_row(row: Any, place: str) -> None:
    if not (isinstance(row, dict) and isinstance(row.get("epoch"), int) and isinstance(row.get("process"), str)):
        raise InputError(place, "'epoch' (a whole number) and 'process' (a name)", repr(row)[:80], "remove the line")
    for key in ROW_NUMBERS:
        _check_number(row.get(key), f"{place}: {key}")
    for part in PARTS:
        if row.get(part) is not None and not isinstance(row[part], dict):
            raise InputError(f"{place}: {part}", "metrics and their values", repr(row[part])[:80], "remove the line")
        for metric, value in (row.get(part) or {}).items():
            _check_number(value, f"{place}: {part} {metric}")


def _check_result(file: Path, flat: Mapping[str, Any]) -> None:
    for key in REQUIRED:
        if key not in flat:
            raise InputError(str(file), f"the key {key!r}", "none", "remove the file to report the run as unfinished")
    for key in flat:
        if key == "peak_memory_bytes.client":
            if not isinstance(flat[key], list):
                raise InputError(f"{file}: {key}", "a list of numbers", repr(flat[key]), "run again")
            for number in flat[key]:
                _check_number(number, f"{file}: {key}")
        elif key.split(".")[0] in NUMBERS:
            _check_number(flat[key], f"{file}: {key}")
    _check_sites(f"{file}: sites", flat.get("sites") or [])


def _check_sites(place: str, sites: Any) -> None:
    for site in sites if isinstance(sites, list) else [sites]:
        known = site if isinstance(site, dict) else {}
        if not (isinstance(known.get("client"), int) and isinstance(known.get("samples"), int)):
            raise InputError(place, "rows with 'client' and 'samples' (whole numbers)", repr(site)[:80], "run again")
        for part in PARTS:
            if not isinstance(known.get(part) or {}, dict):
                raise InputError(f"{place} {part}", "metrics and their values", repr(known[part])[:80], "run again")
            for metric, value in (known.get(part) or {}).items():
                _check_number(value, f"{place} {part} {metric}")


def _check_number(value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise InputError(place, "a number or null", repr(value), "run again")


# Runs → results → series


def summary(run: Run) -> dict[str, Any]:
    """What result.json says and the further `settings`; of an unfinished run its settings and last accuracy. Of a chain
    it is that of one `link`, which is named."""
    known = run.result or {
        **{name: run.settings.get(key) for name, key in RECORDED.items()},
        **_last_scores(run),
        "unfinished": True,
    }
    told = set(RECORDED.values())
    if run.settings.get("model.edge_cut") is not None:  # a chain's result is that of its upper link
        told = {key for name, key in RECORDED.items() if known.get(name) == run.settings.get(key)}
        if run.result is not None:
            known = {**known, "link": "edge → server" if known.get("edge_cut") is None else "client → edge"}
    further = {k: v for k, v in run.settings.items() if k not in told and k not in NO_SETTINGS}
    return {**known, "settings": further}


def _last_scores(run: Run) -> dict[str, Any]:
    """As far as an unfinished run got, as its result would have it."""
    rows = [row for row in run.metrics if row.get("metric")]
    known: dict[str, Any] = {"metric": rows[-1]["metric"], "metric_unit": rows[-1].get("metric_unit")} if rows else {}
    for side, part in (("server", "test"), ("client", "aux_test"), ("server", "joint_test")):
        value = _last(by_epoch(run, side, part))
        known[f"{part}_accuracy"] = value if tables.lead(known) == "accuracy" else None
        known[part] = None if value is None else {tables.lead(known): value}
    return known


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def by_epoch(run: Run, side: str, key: str) -> dict[int, float]:
    """`key` after each epoch, of PARTS the leading metric: of the "server" (the whole, when centralized), or the mean
    over every "client"."""
    names = ("server", "whole") if side == "server" else ("client",)
    found: dict[int, list[float]] = {}
    for row in run.metrics:
        value = tables.score(row, key) if key in PARTS else row.get(key)
        if row["process"].startswith(names) and value is not None:
            found.setdefault(row["epoch"], []).append(value)
    return {epoch: statistics.fmean(found[epoch]) for epoch in sorted(found)}


def mean_curve(runs: Sequence[Run], side: str, key: str, scale: float = 1.0) -> list[Point]:
    """Mean and standard deviation (divisor n - 1), times `scale`, over those runs that have a value for the epoch."""
    curves = [by_epoch(run, side, key) for run in runs]
    points = []
    for epoch in sorted({epoch for curve in curves for epoch in curve}):
        values = [scale * curve[epoch] for curve in curves if epoch in curve]
        points.append(Point(epoch, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None))
    return points


def make_series(runs: Sequence[Run]) -> list[Series]:
    """The runs, those that differ only by the seed as one, named by method and the settings that tell them apart."""
    groups = tables.group_seeds([(run, summary(run)) for run in runs], lambda pair: pair[1])
    results = [[result for _, result in group] for group in groups]
    named = zip(tables.names(results), groups, results, strict=True)
    return [Series(*name, [run for run, _ in group], own) for name, group, own in named]
