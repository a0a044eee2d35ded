"""Results → tables: the same columns for the terminal (rich), for Markdown and for the HTML report.

Runs that differ by nothing but the seed become one row: their seeds, and mean ± standard deviation (divisor n - 1).
Bytes and memory are in MB, 10⁶ bytes; what was not measured is "–". Try it: `halfpass report RUN…`.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from halfpass.config import RECORDED, SPLIT, Config, as_dict, flatten

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]  # the content of a run's result.json; `settings`, where there, are further ones by name
Measure = Callable[[Result], float | None]
Group = Sequence[Result]  # results that differ only by the seed
Item = TypeVar("Item")

MISSING = "–"
UNITS_NOTE = "MB = 10⁶ bytes; –: does not apply or was not measured"
DECOUPLED_ONLY = {"edge_cut", "budget", "micro_batch", "feedback_every"}
OFF = {"validation", "compile", *DECOUPLED_ONLY}  # whose None or False says so, not that they do not apply
USUAL = {  # of which a caption says nothing, nor of "off"
    "task": "classification", "rounds": "1", "lr_scale": "1.0", "every": "1", "replay": "1", "merge": "1",
}  # fmt: skip
NOT_OF_TRAINING = ("checkpoint", "tls", "log", "metrics")  # groups of settings that leave the weights as they are
SETTINGS = tuple(name for name in RECORDED if name not in ("method", "seed"))


# Groups and their settings


def group_seeds(items: Sequence[Item], result_of: Callable[[Item], Result]) -> list[list[Item]]:
    """Items whose results have equal settings together, in order of first appearance; an unfinished one alone."""
    groups: dict[str, list[Item]] = {}
    for number, item in enumerate(items):
        result = result_of(item)
        known = [value_unless_usual(result, name) for name in ("method", "link", *SETTINGS, "settings")]
        alone = number if result.get("unfinished") else None
        key = json.dumps([*known, alone, "retrained_from" in result], default=str)
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    return group_seeds(results, lambda result: result)


def value_unless_usual(result: Result, name: str) -> Any:
    """A setting's value; None where it is the usual one, which an older result may not have either, or of no effect."""
    value = result.get(name) if _applies(result, name) else None
    return None if not value or str(value) == USUAL.get(name) else value


def _applies(result: Result, name: str) -> bool:
    """Whether a setting is of effect in a training of the result's method."""
    method = result.get("method")
    return not ((name in SPLIT and method == "centralized") or (name in DECOUPLED_ONLY and method != "decoupled"))


def setting(group: Group, name: str) -> str | None:
    """A setting's value as text; None where it does not apply to the group's method, or is not known."""
    if not _applies(group[0], name):
        return None
    value = (group[0] if name in SETTINGS else group[0].get("settings") or {}).get(name)
    value = USUAL.get(name) if value is None else value  # an older run does not know it
    if name in OFF and not value:
        return "off"
    return _said(value)


def _seeds(group: Group) -> str:
    """The group's seeds, those that follow on each other as 0–2."""
    numbers = sorted({result["seed"] for result in group if result.get("seed") is not None})
    follow = [[n for _, n in some] for _, some in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{some[0]}–{some[-1]}" if len(some) > 1 else str(some[0]) for some in follow) or MISSING


def _shared_seed(groups: Sequence[Group]) -> str | None:
    """The only seed of every group, where they all have the same."""
    found = {_seeds(group) for group in groups}
    return found.pop() if len(found) == 1 and all(len(group) == 1 for group in groups) else None


def changed_settings(groups: Sequence[Group]) -> dict[str, str]:
    """The further settings of halfpass that all groups share and that are not their defaults, by their dotted names."""
    defaults = flatten(as_dict(Config()))
    settings = [group[0].get("settings") or {} for group in groups]
    of_training = [name for name in defaults if name.partition(".")[0] not in NOT_OF_TRAINING]
    known = [name for name in of_training if all(name in own for own in settings)]
    found = {name: {setting(group, name) for group in groups} for name in known}
    same = {name: values.pop() for name, values in found.items() if len(values) == 1}
    return {n: value for n, value in same.items() if value is not None and str(value) != _said(defaults[n])}


def _said(value: Any) -> str | None:
    return None if value is None else "on" if value is True else str(value)


def shared_settings(groups: Sequence[Group]) -> dict[str, str]:
    """The settings that are the same wherever they apply, with their value; without those that change nothing."""
    values = {name: {setting(group, name) for group in groups} - {None} for name in SETTINGS}
    shared = {name: str(found.pop()) for name, found in values.items() if len(found) == 1}
    return {name: value for name, value in shared.items() if value != USUAL.get(name, "off")}


def telling_settings(groups: Sequence[Group]) -> list[str]:
    """The settings that tell groups apart, and of the further ones those that tell two of the same method apart."""
    main = [name for name in SETTINGS if len({setting(group, name) for group in groups} - {None}) > 1]
    further = dict.fromkeys(name for group in groups for name in group[0].get("settings") or {})
    methods = {str(group[0].get("method")) for group in groups}
    alike = [[group for group in groups if str(group[0].get("method")) == method] for method in methods]
    return main + [n for n in further if any(len({setting(group, n) for group in some}) > 1 for some in alike)]


def names(groups: Sequence[Group]) -> list[tuple[str, dict[str, str]]]:
    """Each group's method, and the settings that tell it apart."""
    telling = telling_settings(groups)
    told = [{n: value for n in telling if (value := setting(group, n)) not in (None, "off")} for group in groups]
    return [(_method(group), settings) for group, settings in zip(groups, told, strict=True)]


def label(method: str, settings: Mapping[str, str]) -> str:
    return " · ".join(filter(None, (method, label_of(settings))))


def label_of(settings: Mapping[str, str]) -> str:
    return " · ".join(f"{name} {value}" for name, value in settings.items())


# Numbers


def value_at(result: Result, *keys: str) -> Any:
    """What stands under the nested `keys`, or None where a step is missing."""
    found: Any = result
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def lead(result: Result) -> str:
    """The metric that a result, or a row, leads with; one without a task is of classification."""
    return str(result.get("metric") or "accuracy")


def unit(result: Result) -> str:
    """"%" where that is from 0 to 1."""
    known = result.get("metric_unit")
    return "%" if known is None else str(known)


def score(result: Result, part: str = "test") -> float | None:
    """The leading metric of `part`: "test", "aux_test" (the auxiliary head's) or "joint_test" (of both together)."""
    metric, values = lead(result), result.get(part)
    found = values.get(metric) if isinstance(values, Mapping) else None
    return result.get(f"{part}_accuracy") if found is None and metric == "accuracy" else found


def said(result: Result) -> str:
    """The test's leading metric: `97.31 %` of accuracy, `rmse 0.4321` of another; "" where there is none."""
    value, metric = score(result), lead(result)
    if value is None:
        return ""
    number = f"{100 * value:.2f} %" if unit(result) == "%" else significant(value)
    return number if metric == "accuracy" else f"{metric} {number}"


def sites(result: Result) -> str:
    """Each site's own score, `client 0 97.31 % of 64, …`; "" where there are none."""
    of_all = {"metric": lead(result), "metric_unit": unit(result)}
    own = [(site, said({**of_all, "test": site.get("test")})) for site in result.get("sites") or []]
    return ", ".join(f"client {site['client']} {text or MISSING} of {site['samples']}" for site, text in own)


def megabytes(result: Result, *keys: str) -> float | None:
    """Bytes under `keys` in MB: a number as it is, the kinds of a mapping summed, of a list (clients) the largest."""
    found = value_at(result, *keys)
    if isinstance(found, Mapping):
        found = None if None in found.values() else sum(found.values())
    if isinstance(found, Sequence):
        found = max((number for number in found if number is not None), default=None)
    return None if found is None else found / 1e6


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there, or None."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def log10(value: float) -> float:
    """Of a positive number; minus infinity of others, which lie below every place of a logarithmic axis."""
    return math.log10(value) if value > 0 else -math.inf


def significant(value: float | None, digits: int = 4) -> str:
    """`value` with so many significant digits and no exponent where that is readable: 12.34, 81,920, 0.01234."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def amount(value: float | None) -> str:
    """MB or seconds as text: four significant digits, but no more than three decimals."""
    if value is None or value == 0 or value >= 10:
        return significant(value)
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def spread(values: Sequence[float | None], decimals: int) -> str:
    """`mean`, from two values on `mean ± std`; where values are missing, the number of those that are there."""
    present = [value for value in values if value is not None]
    if not present:
        return MISSING
    text = f"{statistics.fmean(present):,.{decimals}f}"
    if len(present) > 1:
        text += f" ± {statistics.stdev(present):,.{decimals}f}"
    return text if len(present) == len(values) else f"{text} (n={len(present)})"


# Columns


@dataclass(frozen=True)
class Column:
    """One column: its title, its unit (or "") and how a group of results becomes its text."""

    title: str
    unit: str
    cell: Callable[[Group], str]
    numeric: bool = True
    in_terminal: bool = True  # whose 80 columns do not hold all
    value: Measure | None = None  # the number of each result, where it is one

    @property
    def heading(self) -> str:
        return f"{self.title} {self.unit}".strip()


def _score_columns(groups: Sequence[Group]) -> list[Column]:
    """Of each leading metric, that of the test, of the auxiliary head, and of both together."""
    metrics = dict.fromkeys((lead(group[0]), unit(group[0])) for group in groups)
    return [
        Column(f"{part} {metric}", unit, _score_cell(metric, unit, key), in_terminal=part == "test")
        for metric, unit in metrics for part, key in (("test", "test"), ("aux", "aux_test"), ("joint", "joint_test"))
    ]  # fmt: skip


def _score_cell(metric: str, unit: str, key: str) -> Callable[[Group], str]:
    scale, decimals = (100, 2) if unit == "%" else (1, 4)

    def cell(group: Group) -> str:
        values = [score(result, key) if lead(result) == metric else None for result in group]
        return spread([None if value is None else scale * value for value in values], decimals)

    return cell


def _in_megabytes(title: str, *keys: str, in_terminal: bool = True) -> Column:
    def value(result: Result) -> float | None:
        return megabytes(result, *keys)

    return Column(title, "MB", lambda group: amount(mean(list(map(value, group)))), True, in_terminal, value)


def _seconds(result: Result) -> float | None:
    return result.get("train_seconds")


def _method(group: Group) -> str:
    result = group[0]
    told = {"unfinished": result.get("unfinished"), "retrained": "retrained_from" in result}
    remarks = [result.get("link"), *(remark for remark, holds in told.items() if holds)]
    return " ".join([result.get("method", MISSING), *(f"({remark})" for remark in remarks if remark)])


MEASURES = (
    _in_megabytes("bytes up", "bytes", "up"),
    _in_megabytes("bytes down", "bytes", "down"),
    _in_megabytes("socket up", "bytes", "socket_up", in_terminal=False),
    _in_megabytes("socket down", "bytes", "socket_down", in_terminal=False),
    _in_megabytes("client peak memory", "peak_memory_bytes", "client"),
    _in_megabytes("server peak memory", "peak_memory_bytes", "server"),
    _in_megabytes("one process peak memory", "peak_memory_bytes", "colocated"),
    Column("training time", "s", lambda group: spread(list(map(_seconds, group)), 1), value=_seconds),
)


def _setting_column(name: str) -> Column:
    return Column(name, "", lambda group: setting(group, name) or MISSING, numeric=False)


def table_columns(groups: Sequence[Group]) -> list[Column]:
    """The columns that say something about these groups, in their order in every table."""
    settings = [_setting_column(name) for name in telling_settings(groups)]
    return [Column("method", "", _method, numeric=False), *settings, *measures(groups)]


def measures(groups: Sequence[Group]) -> list[Column]:
    """The columns of numbers, those that no group has left out, behind that of the seeds, where one is not for all."""
    listed = [] if _shared_seed(groups) else [Column("seeds", "", _seeds)]
    every = [*_score_columns(groups), *MEASURES]
    return listed + [column for column in every if any(column.cell(group) != MISSING for group in groups)]


# Tables


def rich_table(results: Sequence[Result]) -> "Table":
    """The table of `results` (contents of result.json) for a terminal of 80 columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    groups = _groups(results)
    columns = [column for column in measures(groups) if column.in_terminal]
    title, space = Text(settings_line(results)), 1 if telling_settings(groups) else 0
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, title=title, caption=UNITS_NOTE, leading=space)
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(Text(column.heading.replace(" ", "\n")), justify="right", overflow="fold")
    for name, group in zip(names(groups), groups, strict=True):
        cells = (column.cell(group).replace(" ± ", "\n± ").replace(" (", "\n(") for column in columns)
        table.add_row(Text(label(*name).replace(" · ", "\n").replace(" (", "\n(")), *(Text(cell) for cell in cells))
    return table


def markdown_table(results: Sequence[Result]) -> str:
    """The table of `results` (contents of result.json) in Markdown, without a line end after the last row."""
    groups = _groups(results)
    columns = table_columns(groups)
    rows = [[column.cell(group) for column in columns] for group in groups]
    return _markdown([c.heading for c in columns], [c.numeric for c in columns], rows)


def settings_line(results: Sequence[Result]) -> str:
    """The settings that all `results` share, for above or below their table."""
    groups = _groups(results)
    shared = shared_settings(groups)
    if (seed := _shared_seed(groups)) not in (None, MISSING):
        shared["seed"] = str(seed)
    return ", ".join(f"{name} {value}" for name, value in shared.items())


def plain_cell(value: Any) -> str:
    """Any JSON value as a cell: four significant digits, "–" for null, "key value, …" for a mapping."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(plain_cell, value))
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def markdown_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Any rows in Markdown: their keys, in order of appearance, give the headings; underscores read as blanks."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in keys]
    cells = [[plain_cell(row.get(key)) for key in keys] for row in rows]
    return _markdown([key.replace("_", " ") for key in keys], numeric, cells)


def _markdown(headings: Sequence[str], numeric: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    rules = ["---:" if right else "---" for right in numeric]
    written = [[_markdown_cell(cell) for cell in row] for row in (headings, *rows)]
    lines = [written[0], rules, *written[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
