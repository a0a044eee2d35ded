"""Decoupled runs beside conventional ones that differ by nothing else, and beside what the paper observed."""

import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

from halfpass.config import RECORDED
from halfpass.report import tables
from halfpass.report.runs import Series
from halfpass.report.tables import MISSING, Measure, Result

# Of decoupled training alone, or of each run by itself
OWN = {"method", "seed", "head", "every", "budget", "replay", "merge", "micro_batch", "feedback_every"}
# Zihad et al., arXiv 2601.19261: ResNet-110, linear head, one GPU; the time is that of the authors' logs
PAPER = {"accuracy": "on par", "bytes": "−50 %", "one process memory": "up to −58 %", "time": "+15 %"}


class Beside(NamedTuple):
    """A decoupled series: its label, and by column what it has more or less than the conventional one."""

    label: str
    cells: dict[str, str]


class Pair(NamedTuple):
    """The runs of one seed."""

    decoupled: list[Result]
    conventional: list[Result]


class Compared(NamedTuple):
    """The pairs of a decoupled series, and whether both were cut at the same place: else only scores are comparable."""

    pairs: Sequence[Pair]
    same_cut: bool


Cell = Callable[[Sequence[Pair]], str]


def beside(series: Sequence[Series]) -> list[Beside]:
    """A row for every decoupled series that has a conventional one with a seed in common."""
    rows = []
    for one in series:
        if found := compared(one, series):
            cells = _cells(ACCURACY, found.pairs)
            if found.same_cut:
                cells |= _cells(BYTES, found.pairs) | _cells(MEMORY | TIME, on_one_machine(found.pairs))
            if cells:
                rows.append(Beside(one.label, cells))
    return rows


def compared(one: Series, series: Sequence[Series]) -> Compared | None:
    """What conventional training, of `series`, a decoupled series is to be compared with; None where there is none."""
    # "decoupled (unfinished)" is none of them, nor is "(retrained)", nor a link of a chain
    if one.method != "decoupled":
        return None
    conventional = [other for other in series if other.method == "conventional"]
    if pairs := _pairs(one, conventional):
        return Compared(pairs, True)
    elsewhere = _pairs(one, conventional, but={"cut"}) if _any_cut(one.results[0]) else []
    return Compared(elsewhere, False) if elsewhere else None


def columns(rows: Sequence[Beside]) -> list[str]:
    """Those that some row has, in their order."""
    return [name for name in ACCURACY | BYTES | MEMORY | TIME if any(name in row.cells for row in rows)]


# Which runs are compared


def _pairs(one: Series, others: Sequence[Series], but: Set[str] = frozenset()) -> list[Pair]:
    """By seed, with all of the others whose settings are equal, `but` those."""
    settings = _settings(one.results[0], but)
    theirs = [result for other in others if _settings(other.results[0], but) == settings for result in other.results]
    seeds = dict.fromkeys(result["seed"] for result in one.results)
    pairs = [Pair(*([r for r in side if r["seed"] == seed] for side in (one.results, theirs))) for seed in seeds]
    return [pair for pair in pairs if pair.conventional]


def _settings(result: Result, but: Set[str]) -> dict[str, Any]:
    recorded = {name: tables.value_unless_usual(result, name) for name in RECORDED if name not in OWN | but}
    return {**recorded, "settings": result.get("settings") or {}}


def _any_cut(result: Result) -> bool:
    """Whether conventional training is the same wherever it is cut: with one client, who sends exactly."""
    usual_rate = tables.value_unless_usual(result, "lr_scale") is None
    return result.get("clients") == 1 and result.get("codec") in ("none", "none+zstd") and usual_rate


def on_one_machine(pairs: Sequence[Pair]) -> list[Pair]:
    """Those of which both sides had the same hardware."""
    machines = [{tables.value_at(r, "environment", "hardware") for side in pair for r in side} for pair in pairs]
    return [pair for pair, found in zip(pairs, machines, strict=True) if len(found) == 1]


# What is said of them


def _cells(named: Mapping[str, Cell], pairs: Sequence[Pair]) -> dict[str, str]:
    return {name: text for name, cell in named.items() if (text := cell(pairs)) != MISSING}


def values_of(pairs: Sequence[Pair], ours: Measure, theirs: Measure) -> list[tuple[float, float]]:
    """(decoupled, conventional) of every pair that has both."""
    sides = [(tables.mean(list(map(ours, a))), tables.mean(list(map(theirs, b)))) for a, b in pairs]
    return [(a, b) for a, b in sides if a is not None and b is not None]


def _points(part: str, accuracy: bool) -> Cell:
    """What the leading metric of `part` is above conventional's, in percentage points where it is from 0 to 1: mean
    and, of several seeds, standard deviation of the differences. Of accuracy, or of any other metric."""

    def cell(pairs: Sequence[Pair]) -> str:
        fitting = [p for p in pairs if (tables.lead(p.decoupled[0]) == "accuracy") == accuracy]
        values = values_of(fitting, lambda result: tables.score(result, part), tables.score)
        if not values:
            return MISSING
        scale, decimals = (100, 2) if tables.unit(fitting[0].decoupled[0]) == "%" else (1, 4)
        points = [scale * (a - b) for a, b in values]
        spread = f" ± {statistics.stdev(points):.{decimals}f}" if len(points) > 1 else ""
        return _signed(statistics.fmean(points), decimals) + spread

    return cell


def _change(value: Measure) -> Cell:
    """Percent above conventional's, of the means over the seeds."""

    def cell(pairs: Sequence[Pair]) -> str:
        values = values_of(pairs, value, value)
        ours, theirs = sum(a for a, _ in values), sum(b for _, b in values)
        return f"{_signed(100 * (ours / theirs - 1), 1)} %" if theirs else MISSING

    return cell


def _peak(side: str) -> Cell:
    return _change(lambda result: tables.megabytes(result, "peak_memory_bytes", side))


def _signed(value: float, decimals: int) -> str:
    return f"{value:+.{decimals}f}".replace("-", "−")


def sent(result: Result) -> float | None:
    """MB up and down, by the application's count."""
    up, down = (tables.megabytes(result, "bytes", way) for way in ("up", "down"))
    return None if up is None or down is None else up + down


ACCURACY = {
    "accuracy": _points("test", True), "accuracy with its head": _points("joint_test", True),
    "score": _points("test", False), "score with its head": _points("joint_test", False),
}  # fmt: skip
BYTES = {"bytes": _change(sent)}
MEMORY = {
    "client memory": _peak("client"), "server memory": _peak("server"), "one process memory": _peak("colocated"),
}  # fmt: skip
TIME = {"time": _change(lambda result: result.get("train_seconds"))}
