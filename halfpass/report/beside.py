"""Decoupled runs beside conventional ones that differ by nothing else, and beside what the paper observed."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from halfpass.config import RECORDED
from halfpass.report import tables
from halfpass.report.runs import Series
from halfpass.report.tables import MISSING, Result

# In which the two may differ: what only one of them has, or what changes nothing for the other.
OWN = {"method", "seed", "head", "edge_cut", "every", "budget", "replay", "merge", "micro_batch", "feedback_every"}
# Zihad et al., arXiv 2601.19261: ResNet-110, linear head, one GPU; the time is that of the authors' logs.
PAPER = {"accuracy": "on par", "bytes": "−50 %", "one process memory": "up to −58 %", "time": "+15 %"}


class Beside(NamedTuple):
    """A decoupled series: its label, and what it has more or less than the conventional one, by column."""

    label: str
    cells: dict[str, str]


def beside(series: Sequence[Series]) -> list[Beside]:
    """A row for every decoupled series that has a conventional one with a seed in common. One that is cut elsewhere is
    the same training, so that accuracy can be compared, and nothing else."""
    # "decoupled (unfinished)" is none of them, nor is a link of a chain
    decoupled, conventional = ([one for one in series if one.method == m] for m in ("decoupled", "conventional"))
    rows = []
    for one in decoupled:
        others = [other for other in conventional if _alike(one, other, but={"cut"})]
        others.sort(key=lambda other: not _alike(one, other))  # of the same cut first
        cells = next(filter(None, (_compare(one, other) for other in others)), None)
        if cells:
            rows.append(Beside(one.label, cells))
    return rows


def columns(rows: Sequence[Beside]) -> list[str]:
    """Those that some row has, in their order."""
    return [name for name in COLUMNS if any(name in row.cells for row in rows)]


def _alike(one: Series, other: Series, but: set[str] | frozenset[str] = frozenset()) -> bool:
    return _settings(one.results[0], but) == _settings(other.results[0], but)


def _settings(result: Result, but: set[str] | frozenset[str]) -> dict[str, Any]:
    recorded = {name: tables.value_unless_usual(result, name) for name in RECORDED if name not in OWN | but}
    return {**recorded, "settings": result.get("settings") or {}}


def _compare(one: Series, other: Series) -> dict[str, str]:
    theirs = {result["seed"]: result for result in other.results}
    pairs = [(result, theirs[result["seed"]]) for result in one.results if result["seed"] in theirs]
    same_cut = _alike(one, other)
    found = {name: column(pairs) for name, column in COLUMNS.items() if same_cut or column in POINTS} if pairs else {}
    return {name: text for name, text in found.items() if text != MISSING}


Pairs = Sequence[tuple[Result, Result]]  # of one seed each, decoupled and conventional


def _points(key: str) -> Callable[[Pairs], str]:
    """Percentage points of accuracy under `key` above conventional's: mean and, of several seeds, standard deviation of
    the differences."""

    def column(pairs: Pairs) -> str:
        known = [(a[key], b["test_accuracy"]) for a, b in pairs if None not in (a.get(key), b.get("test_accuracy"))]
        if not known:
            return MISSING
        points = [100 * (a - b) for a, b in known]
        return _signed(statistics.fmean(points), 2) + (f" ± {statistics.stdev(points):.2f}" if len(points) > 1 else "")

    return column


def _change(value: Callable[[Result], float | None]) -> Callable[[Pairs], str]:
    """Percent above conventional's, of the means over the seeds."""

    def column(pairs: Pairs) -> str:
        ours, theirs = (tables.mean([value(result) for result in side]) for side in zip(*pairs, strict=True))
        return MISSING if ours is None or not theirs else f"{_signed(100 * (ours / theirs - 1), 1)} %"

    return column


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def _bytes(result: Result) -> float | None:
    """Up and down in MB, at the socket where there is one."""
    for keys in (("socket_up", "socket_down"), ("up", "down")):
        found = [tables.megabytes(result, "bytes", key) for key in keys]
        if None not in found:
            return sum(filter(None, found))
    return None


POINTS = (_points("test_accuracy"), _points("joint_test_accuracy"))
COLUMNS: dict[str, Callable[[Pairs], str]] = {
    "accuracy": POINTS[0],
    "accuracy with its head": POINTS[1],
    "bytes": _change(_bytes),
    "client memory": _change(lambda result: tables.megabytes(result, "peak_memory_bytes", "client")),
    "server memory": _change(lambda result: tables.megabytes(result, "peak_memory_bytes", "server")),
    "one process memory": _change(lambda result: tables.megabytes(result, "peak_memory_bytes", "colocated")),
    "time": _change(lambda result: result.get("train_seconds")),
}
