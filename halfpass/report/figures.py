"""Series of runs → pictures: score and loss over epochs, bytes, peak memory, time, sites. Used by `report`."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from halfpass.report import tables
from halfpass.report.runs import Point, Series, mean_curve
from halfpass.report.sites import sites_of
from halfpass.report.theme import BLUE, COLOURS, GREEN, GREY, ORANGE, PURPLE, VERMILLION, WHITE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = tuple(zip(COLOURS, "os^Dvp*", strict=True))  # colour and marker
DASHED = (0, (3, 2))
BACKSLASHES = 4 * "\\"
ONE_PROCESS = "one process"
KIND_STYLES = {
    "activations": (BLUE, ""), "labels": (ORANGE, "////"), "gradients": (VERMILLION, BACKSLASHES),
    "weights": (GREEN, "xxxx"), "other": (PURPLE, ""),
    "client": (BLUE, ""), "server": (ORANGE, "////"), ONE_PROCESS: (GREEN, BACKSLASHES),
    "busy": (BLUE, ""), "waiting": (WHITE, "////"),
}  # fmt: skip
SCORES = {"server": "test", "client": "aux_test"}  # keys of metrics.jsonl by side
LOSSES = {"server": "loss", "client": "loss"}
# Places are reckoned from the letters, in inches: matplotlib's own layout engine takes longer than all of the drawing.
LETTERS_PER_INCH, LINE_INCHES, LEGEND_LINE_INCHES = 14.5, 0.16, 0.18
AXIS_INCHES = 0.42  # below axes: numbers, and what they are of
NUMBERS_INCHES = 0.62  # left of axes: likewise
EDGE_INCHES = 0.12
HANDLE_LETTERS = 5  # as wide as a handle of a legend
NEAR = 0.012  # of an axis: what is nearer than that lies on each other
LONG_INCHES = 8.0  # a page folds pictures that are higher


class Picture(NamedTuple):
    """A figure of a report: what paints it, how high it is in inches for a width, a caption, and the numbers that it
    shows, ready to print."""

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    height: Callable[[float], float]
    paint: Callable[["Figure"], None]

    @property
    def name(self) -> str:
        """Fit for files and ids."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


class Line(NamedTuple):
    """A curve: its name in the table of numbers, its look, its points."""

    name: str
    colour: str
    marker: str
    dashed: bool
    points: Sequence[Point]


class Bar(NamedTuple):
    """A horizontal bar: its name and its parts by kind, stacked in their order."""

    name: str
    parts: Mapping[str, float]


def pictures(series: Sequence[Series]) -> list[Picture]:
    """Every figure that the runs have numbers for."""
    several = any(len(one.runs) > 1 for one in series)
    band = " Lines are means over runs that differ only by the seed, bands one standard deviation." if several else ""
    means = " Means over the seeds." if several else ""
    means += " Of a chain each link by itself." if any(one.results[0].get("link") for one in series) else ""
    metrics = list(dict.fromkeys((tables.lead(one.results[0]), tables.unit(one.results[0])) for one in series))
    of_metric = {found: [o for o in series if (tables.lead(o.results[0]), tables.unit(o.results[0])) == found]
                 for found in metrics}  # fmt: skip
    drawn = [
        curves(
            of_metric[metric, unit],
            f"Test {metric}", f"test {metric} ({unit})" if unit else f"test {metric}", SCORES, "auxiliary head",
            f"{metric.capitalize()} on the test set after each tested epoch, of the whole network as client and server "
            "compute it together, through the codec. Dashed: of the auxiliary head at the cut, mean over clients."
            + band, percent=unit == "%",
        )
        for metric, unit in metrics
    ] + [sites(found, metric, unit, means) for (metric, unit), found in of_metric.items()] + [
        curves(
            series, "Training loss", "training loss", LOSSES, "client's auxiliary loss",
            "Training loss at the network's output, the mean over each epoch's steps. Dashed: the auxiliary loss at "
            "the cut, mean over clients." + band, percent=False,
        ),
        *(
            frontier(
                found, metric,
                f"Test {metric} after the last epoch against all bytes of the training, at the socket where there is "
                "one. Further left is less to send." + means,
            )
            for (metric, _), found in of_metric.items()
        ),
        bars(
            "Bytes", "MB", [(one.label, byte_bars(one)) for one in series],
            "What the application sent in the whole training, without evaluation; up is client → server. "
            "MB = 10⁶ bytes." + means,
        ),
        bars(
            "Peak memory", "MB", [(one.label, memory_bars(one)) for one in series],
            "Peak memory of each process above what it held before the first batch; of several clients the largest. "
            "MB = 10⁶ bytes." + means,
        ),
        bars(
            "Time", "seconds", [(one.label, time_bars(one)) for one in series],
            "Seconds of training, without evaluation, in which each side computed (busy) or waited for the other; of "
            "several clients the mean." + means,
        ),
    ]  # fmt: skip
    return [picture for picture in drawn if picture]


# What tells the series apart


def looks(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Colour and marker of each; where there are not enough for all, those of its method."""
    if len(series) <= len(LOOKS):
        return list(LOOKS[: len(series)])
    methods = list(dict.fromkeys(one.method for one in series))
    return [LOOKS[methods.index(one.method) % len(LOOKS)] for one in series]


def legend(series: Sequence[Series]) -> list[tuple[str, tuple[str, str]]]:
    """What each look stands for."""
    found = zip(series, looks(series), strict=True)
    if len(series) <= len(LOOKS):
        return [(one.label, look) for one, look in found]
    return list({one.method: look for one, look in found}.items())


def panels(series: Sequence[Series]) -> list[tuple[str, list[int]]]:
    """Numbers of series, by the title of a panel: all in one, or, where the looks are not enough for that, those of
    equal settings. What lacks a setting, as centralized training lacks a cut, is in every panel that it may be
    compared in."""
    if len(series) <= len(LOOKS):
        return [("", list(range(len(series))))]
    settings = {tables.label_of(one.settings): set(one.settings.items()) for one in series}
    largest = {title: own for title, own in settings.items() if not any(own < other for other in settings.values())}
    return [
        (title, [number for number, one in enumerate(series) if set(one.settings.items()) <= own])
        for title, own in largest.items()
    ]


def lying_on(places: Sequence[Mapping[float, float]], span: float) -> list[int]:
    """How many later curves, each {x: y}, lie on each one: no further from it than NEAR of `span` at most of the x that
    they share."""
    found = [0] * len(places)
    for (number, one), (_, other) in combinations(enumerate(places), 2):
        shared = one.keys() & other.keys()
        near = sum(abs(one[x] - other[x]) <= NEAR * span for x in shared)
        found[number] += bool(shared) and 2 * near > len(shared)
    return found


# Curves


def curves(
    series: Sequence[Series], title: str, unit: str, keys: Mapping[str, str], dashed: str, caption: str, percent: bool
) -> Picture | None:
    """Curves over epochs of the server's key, solid, and of the clients', dashed and so named in the legend."""
    lines = [
        [
            Line(one.label + (", client" if side == "client" else ""), *look, side == "client", points)
            for side, key in keys.items()
            if (points := mean_curve(one.runs, side, key, 100.0 if percent else 1.0))
        ]
        for one, look in zip(series, looks(series), strict=True)
    ]
    every = [line for found in lines for line in found]
    if not every:
        return None
    if not any(line.dashed for line in every):
        caption = re.sub(r" Dashed: [^.]*\.", "", caption)

    shown, entries = panels(series), legend(series)
    if any(line.dashed for line in every):
        entries = [*entries, (dashed, (GREY, ""))]
    means = [point.mean for line in every for point in line.points]
    log = not percent and 0 < 30 * min(means) < max(means)  # losses near zero would all lie on the axis
    drawn = [[line for number in members for line in lines[number]] for _, members in shown]
    beneath = [lying_on([_places(line, log) for line in some], _span(means, log)) for some in drawn]
    if any(map(any, beneath)):
        caption += " Of curves that lie on each other the lower one is drawn broader."

    def columns_of(width: float) -> int:
        return min(2 if width < 5 else 4, len(shown))

    def wrapped(heading: str, width: float) -> list[str]:
        return textwrap.wrap(heading, int(LETTERS_PER_INCH * (width - NUMBERS_INCHES) / columns_of(width)) - 2)

    def title_inches(width: float) -> float:
        return LINE_INCHES * max(len(wrapped(heading, width)) for heading, _ in shown)

    def paint(figure: "Figure") -> None:
        width = figure.get_figwidth()
        columns = columns_of(width)
        rows = -(-len(shown) // columns)
        gap = 0.26 + title_inches(width)
        places = _places_of(figure, NUMBERS_INCHES, _legend_inches(entries, width) + title_inches(width), rows, gap)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, gridspec_kw=places)
        for axes, (heading, _), some, depths in zip(grid.flat, shown, drawn, beneath, strict=False):
            for line, depth in zip(some, depths, strict=True):
                _paint_line(axes, line, depth)
            axes.set_title("\n".join(wrapped(heading, width)), loc="left", y=1, pad=4)
            axes.locator_params(axis="x", nbins=8 if columns == 1 else 4, integer=True, min_n_ticks=1)
            axes.locator_params(axis="y", nbins=6 if columns == 1 else 4)
            axes.tick_params(labelbottom=True)
            axes.grid(axis="y")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        if log:
            grid[0, 0].set_yscale("log")
            grid[0, 0].set_ylim(min(means) / 1.5, max(means) * 1.5)
            grid[0, 0].yaxis.set_major_formatter("{x:g}")
        elif percent:
            grid[0, 0].set_ylim(*_percents(*grid[0, 0].get_ylim()))
        for axes in grid.flat[len(shown) - columns : len(shown)]:  # the lowest of each column
            axes.set_xlabel("epoch")
        for axes in grid[:, 0]:
            axes.set_ylabel(unit)
        _paint_legend(figure, entries)

    def height(width: float) -> float:
        columns = columns_of(width)
        rows = -(-len(shown) // columns)
        axes = (1.7 if columns == 1 else 0.95) * rows + (0.26 + title_inches(width)) * (rows - 1)
        return _legend_inches(entries, width) + title_inches(width) + axes + AXIS_INCHES

    return Picture(title, caption, ["epoch", *(line.name for line in every)], _cells(every), height, paint)


def _places_of(figure: "Figure", left: float, top: float, rows: int = 1, gap: float = 0.0) -> dict[str, float]:
    """Where axes are, with so many inches left of them and above, and between `rows` of them."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    inner = height - top - AXIS_INCHES
    return {
        "left": left / width, "right": 1 - EDGE_INCHES / width, "bottom": AXIS_INCHES / height, "top": 1 - top / height,
        "hspace": gap * rows / (inner - gap * (rows - 1)), "wspace": 0.12,
    }  # fmt: skip


def _places(line: Line, log: bool) -> dict[float, float]:
    return {point.epoch: tables.log10(point.mean) if log else point.mean for point in line.points}


def _span(values: Sequence[float], log: bool) -> float:
    low, high = min(values), max(values)
    return tables.log10(high) - tables.log10(low) if log else high - low


def _percents(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis that goes no further than percents do, and shows two of them at least."""
    missing = max(0.0, 2 - (high - low)) / 2
    high = min(100.0 + 0.03 * (high - low), high + missing)
    return max(-0.03 * (high - low), min(low, high - 2, low - missing)), high


def _cells(lines: Sequence[Line]) -> list[list[str]]:
    """A row per epoch, a column per line."""
    found = [{point.epoch: _mean_text(point) for point in line.points} for line in lines]
    epochs = sorted({epoch for cells in found for epoch in cells})
    return [[str(epoch), *(cells.get(epoch, tables.MISSING) for cells in found)] for epoch in epochs]


def _mean_text(point: Point) -> str:
    band = "" if point.deviation is None else f" ± {tables.significant(point.deviation, 2)}"
    return tables.significant(point.mean) + band


def _paint_line(axes: "Axes", line: Line, depth: int) -> None:
    """`depth`: on how many others it is seen only where it is broader than they are."""
    epochs, means = [p.epoch for p in line.points], [p.mean for p in line.points]
    marked = len(epochs) == 1 or not line.dashed
    style: Any = DASHED if line.dashed else "-"
    axes.plot(
        epochs, means, color=line.colour, linestyle=style, marker=line.marker if marked else "",
        markevery=max(1, len(epochs) // 15), linewidth=1.4 + 1.8 * depth, markersize=3.5 + 2.5 * depth,
    )  # fmt: skip
    low, high = ([p.mean + sign * (p.deviation or 0.0) for p in line.points] for sign in (-1, 1))
    if low != high:
        axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _legend_columns(names: Sequence[str], width: float) -> int:
    return max(1, int(LETTERS_PER_INCH * width) // (max(map(len, names)) + HANDLE_LETTERS))


def _legend_inches(entries: Sequence[tuple[str, Any]], width: float) -> float:
    letters = int(LETTERS_PER_INCH * width) - HANDLE_LETTERS
    lines = [len(textwrap.wrap(name, letters)) for name, _ in entries]
    rows = -(-len(lines) // _legend_columns([name[:letters] for name, _ in entries], width))
    return LEGEND_LINE_INCHES * max(rows, sum(lines) if rows == len(lines) else 0) + EDGE_INCHES


def _paint_legend(figure: "Figure", entries: Sequence[tuple[str, tuple[str, str]]]) -> None:
    """A handle without a marker stands for what is dashed."""
    from matplotlib.lines import Line2D

    width = figure.get_figwidth()
    letters = int(LETTERS_PER_INCH * width) - HANDLE_LETTERS
    names = [textwrap.fill(name, letters) for name, _ in entries]
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="-" if marker else DASHED)
        for _, (colour, marker) in entries
    ]
    longest = [max(name.split("\n"), key=len) for name in names]
    _place_legend(figure, handles, names, _legend_columns(longest, width))


def _place_legend(figure: "Figure", handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    figure.legend(handles, names, loc="upper left", bbox_to_anchor=(0.01, 1), borderaxespad=0.2, ncols=columns)


# A point or a few for each series


def frontier(series: Sequence[Series], metric: str, caption: str) -> Picture | None:
    """A point per series that sent something, where there are two or more of them."""
    title, unit = f"{metric.capitalize()} against bytes", tables.unit(series[0].results[0])
    found = [(one, look, sent_megabytes(one), _score(one)) for one, look in zip(series, looks(series), strict=True)]
    points = [(one, look, sent, value) for one, look, sent, value in found if sent and value is not None]
    if len(points) < 2:
        return None
    drawn = {look for _, look, *_ in points}
    entries = [(name, look) for name, look in legend(series) if look in drawn]
    values = [value for *_, value in points]
    span = max(max(values) - min(values), 2.0 if unit == "%" else 0.0)
    depths = lying_on([{round(20 * tables.log10(sent)): value} for _, _, sent, value in points], span)

    def paint(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        places = _places_of(figure, NUMBERS_INCHES, _legend_inches(entries, figure.get_figwidth()))
        axes = figure.subplots(gridspec_kw=places)
        for (_, (colour, marker), sent, value), depth in zip(points, depths, strict=True):
            axes.plot([sent], [value], color=colour, marker=marker, linestyle="", markersize=5 + 3 * min(depth, 3))
        axes.set(xscale="log", xlabel="MB, up and down", ylabel=f"test {metric} ({unit})" if unit else f"test {metric}")
        axes.margins(0.15, 0.15)
        if unit == "%":
            axes.set_ylim(*_percents(*axes.get_ylim()))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.grid()
        _paint_legend(figure, entries)

    decimals = 2 if unit == "%" else 4
    cells = [[one.label, tables.amount(sent), f"{value:.{decimals}f}"] for one, _, sent, value in points]
    headings = ["method", "MB up and down", f"test {metric} {unit}".rstrip()]
    return Picture(title, caption, headings, cells, lambda width: 2.0 + _legend_inches(entries, width), paint)


def sent_megabytes(one: Series) -> float | None:
    """MB of the whole training, up and down: at the socket, or as the application counts them where there is none."""
    directions = [
        _mean_megabytes(one, "bytes", f"socket_{way}") or _mean_megabytes(one, "bytes", way) for way in ("up", "down")
    ]
    return sum(way or 0.0 for way in directions)


def _score(one: Series) -> float | None:
    mean = tables.mean([tables.score(result) for result in one.results])
    return mean if mean is None or tables.unit(one.results[0]) != "%" else 100 * mean


def sites(series: Sequence[Series], metric: str, unit: str, means: str) -> Picture | None:
    """A point for each site's own score, the series beside each other on its line."""
    scale = 100.0 if unit == "%" else 1.0
    found = [(one, look, {site.client: site for site in sites_of(one)})
             for one, look in zip(series, looks(series), strict=True)]  # fmt: skip
    found = [(one, look, own) for one, look, own in found if any(site.score is not None for site in own.values())]
    if not found:
        return None
    clients = sorted({client for *_, own in found for client in own})
    drawn = {look for _, look, _ in found}
    entries = [(name, look) for name, look in legend(series) if look in drawn]

    def paint(figure: "Figure") -> None:
        left = _letters_inches([f"client {clients[-1]}"])
        axes = figure.subplots(gridspec_kw=_places_of(figure, left, _legend_inches(entries, figure.get_figwidth())))
        for number, (_, (colour, marker), own) in enumerate(found):
            shift = 0.5 * ((number + 0.5) / len(found) - 0.5)  # equal ones are not on each other
            known = [(place, own[c].score) for place, c in enumerate(clients) if c in own and own[c].score is not None]
            axes.plot([scale * value for _, value in known if value is not None], [place + shift for place, _ in known],
                      color=colour, marker=marker, linestyle="", markersize=5)  # fmt: skip
        axes.set_yticks(range(len(clients)), [f"client {client}" for client in clients])
        axes.set(ylim=(len(clients) - 0.5, -0.5), xlabel=f"test {metric} ({unit})" if unit else f"test {metric}")
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        axes.grid()
        _paint_legend(figure, entries)

    title = f"Test {metric} by site"
    caption = f"{metric.capitalize()} of the whole network after the last epoch, on each client's own test set." + means
    decimals = 2 if unit == "%" else 4
    cells = [
        [one.label, f"client {site.client}", f"{site.samples:,}",
         tables.MISSING if site.score is None else f"{scale * site.score:.{decimals}f}"]
        for one, _, own in found for site in own.values()
    ]  # fmt: skip
    headings = ["method", "site", "test samples", f"test {metric} {unit}".rstrip()]
    row_inches = 0.16 + 0.07 * min(len(found), 7)
    return Picture(
        title, caption, headings, cells,
        lambda width: AXIS_INCHES + 0.1 + row_inches * len(clients) + _legend_inches(entries, width), paint,
    )  # fmt: skip


# Bars


def bars(title: str, unit: str, groups: Sequence[tuple[str, Sequence[Bar]]], caption: str) -> Picture | None:
    """Horizontal bars with their sums, those of one series under its label; the legend holds the kinds that occur."""
    groups = [(label, group) for label, group in groups if group]
    every = [(label, bar) for label, group in groups for bar in group]
    kinds = [kind for kind in KIND_STYLES if any(kind in bar.parts for _, bar in every)]
    if not every:
        return None

    def headings(width: float) -> list[list[str]]:
        letters = int(0.86 * LETTERS_PER_INCH * (width - _letters_inches([bar.name for _, bar in every])))  # bold
        return [textwrap.wrap(label, letters) for label, _ in groups]

    def paint(figure: "Figure") -> None:
        width = figure.get_figwidth()
        left = _letters_inches([bar.name for _, bar in every])
        axes = figure.subplots(gridspec_kw=_places_of(figure, left, _kinds_inches(kinds, width)))
        longest = max(sum(bar.parts.values()) for _, bar in every) or 1.0
        place = 0  # from the top
        for heading, (_, group) in zip(headings(width), groups, strict=True):
            for line in heading:
                axes.text(0, place, line, va="center", weight="bold")
                place += 1
            for bar in group:
                axes.text(-0.02 * longest, place, bar.name, va="center", ha="right")  # a tick takes ten times as long
                _paint_bar(axes, place, bar, 0.02 * longest)
                place += 1
        axes.set(yticks=[], xlabel=unit, xlim=(0, 1.3 * longest), ylim=(place - 0.4, -0.6))
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=4)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        _paint_kinds(figure, kinds)

    def height(width: float) -> float:
        lines = len(every) + sum(map(len, headings(width)))
        return _kinds_inches(kinds, width) + 0.19 * lines + AXIS_INCHES

    cells = [[label, bar.name, *(tables.amount(bar.parts.get(kind)) for kind in kinds)] for label, bar in every]
    return Picture(title, caption, ["method", unit, *kinds], cells, height, paint)


def _letters_inches(names: Sequence[str]) -> float:
    """Room for names left of axes."""
    return max(map(len, names)) / 13 + EDGE_INCHES + 0.1  # they stand a little off the axis


def _paint_bar(axes: "Axes", place: int, bar: Bar, gap: float) -> None:
    left = 0.0
    for kind, value in bar.parts.items():
        axes.barh(place, value, 0.8, left, **_fill(kind))
        left += value
    axes.text(left + gap, place, tables.amount(left), va="center")


def _fill(kind: str) -> dict[str, Any]:
    colour, hatch = KIND_STYLES[kind]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": GREY if colour == WHITE else WHITE, "linewidth": 0.5}


def _kinds_inches(kinds: Sequence[str], width: float) -> float:
    if len(kinds) <= 1:
        return 0.05
    return LEGEND_LINE_INCHES * -(-len(kinds) // _legend_columns(kinds, width)) + EDGE_INCHES


def _paint_kinds(figure: "Figure", kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    if len(kinds) > 1:
        columns = _legend_columns(kinds, figure.get_figwidth())
        _place_legend(figure, [Patch(**_fill(kind)) for kind in kinds], kinds, columns)


def byte_bars(one: Series) -> list[Bar]:
    """MB up and MB down, by kind."""
    found: list[Bar] = []
    for direction in ("up", "down"):
        means = {kind: _mean_megabytes(one, "bytes", direction, kind) for kind in KIND_STYLES}
        if any(mean is not None for mean in means.values()):
            found.append(Bar(direction, {kind: mean for kind, mean in means.items() if mean}))
    return found


def memory_bars(one: Series) -> list[Bar]:
    """MB of the largest client, of the server, and of one process that holds both."""
    keys = {"client": "client", "server": "server", ONE_PROCESS: "colocated"}
    means = {kind: _mean_megabytes(one, "peak_memory_bytes", key) for kind, key in keys.items()}
    return [Bar(kind, {kind: mean}) for kind, mean in means.items() if mean is not None]


def time_bars(one: Series) -> list[Bar]:
    """Seconds busy and waiting, of the client and of the server."""
    found: list[Bar] = []
    for side in ("client", "server"):
        times = {w: [tables.value_at(r, "seconds", f"{side}_{w}") for r in one.results] for w in ("busy", "waiting")}
        means = {what: mean for what, values in times.items() if (mean := tables.mean(values)) is not None}
        name = ONE_PROCESS if one.results[0]["method"] == "centralized" else side
        found += [Bar(name, means)] if means else []
    return found


def _mean_megabytes(one: Series, *keys: str) -> float | None:
    return tables.mean([tables.megabytes(result, *keys) for result in one.results])
