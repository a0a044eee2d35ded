"""Series of runs → figures as SVG: accuracy and loss over epochs, bytes, peak memory, time. Used by `report`."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from halfpass.report import tables
from halfpass.report.runs import Point, Series, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart; shapes and hatches repeat what colours say
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, WHITE = "#1f2933", "#6b7785", "#ffffff"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)  # of the series, in their order
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
WIDTH_INCHES = 5.2
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 8.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#e7eaee",
    "hatch.linewidth": 0.5, "lines.linewidth": 1.6, "lines.markersize": 3.5, "legend.frameon": False,
    "legend.handlelength": 1.5, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0,
}  # fmt: skip


class Picture(NamedTuple):
    """A figure of the report: an SVG element, a caption, and the numbers that it shows, ready to print."""

    title: str
    svg: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


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
    drawn = [
        curves(
            [one for one in series if (tables.lead(one.results[0]), tables.unit(one.results[0])) == (metric, unit)],
            f"Test {metric}", f"test {metric} ({unit})" if unit else f"test {metric}", SCORES, "auxiliary head",
            f"{metric.capitalize()} on the test set after each tested epoch, of the whole network as client and server "
            "compute it together, through the codec. Dashed: of the auxiliary head at the cut, mean over clients."
            + band, percent=unit == "%",
        )
        for metric, unit in dict.fromkeys((tables.lead(o.results[0]), tables.unit(o.results[0])) for o in series)
    ] + [
        curves(
            series, "Training loss", "training loss", LOSSES, "client's auxiliary loss",
            "Training loss at the network's output, the mean over each epoch's steps. Dashed: the auxiliary loss at "
            "the cut, mean over clients." + band, percent=False,
        ),
        *(
            frontier(
                [one for one in series if tables.lead(one.results[0]) == metric], metric,
                f"Test {metric} after the last epoch against all bytes of the training, at the socket where there is "
                "one. Further left is less to send." + means,
            )
            for metric in dict.fromkeys(tables.lead(one.results[0]) for one in series)
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
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    means = [point.mean for line in every for point in line.points]
    log = not percent and 0 < 30 * min(means) < max(means)  # losses near zero would all lie on the axis

    def paint(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (heading, members) in zip(grid.flat, shown, strict=False):
            for line in (line for number in members for line in lines[number]):
                _paint_line(axes, line)
            axes.set_title(textwrap.fill(heading, 40), size="medium", loc="left")
            axes.locator_params(axis="x", nbins=8, integer=True, min_n_ticks=1)
            axes.grid(axis="y")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        if log:
            grid[0, 0].set_yscale("log")
            grid[0, 0].set_ylim(min(means) / 1.5, max(means) * 1.5)
            grid[0, 0].yaxis.set_major_formatter("{x:g}")
        for axes in grid.flat[len(shown) - columns : len(shown)]:  # the lowest of each column
            axes.set_xlabel("epoch")
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel(unit)
        _paint_legend(figure, entries, dashed if any(line.dashed for line in every) else None)

    height = 0.6 + 2.0 * rows + _legend_inches(entries)
    return Picture(title, draw(title, height, paint), caption, ["epoch", *(line.name for line in every)], _cells(every))


def _cells(lines: Sequence[Line]) -> list[list[str]]:
    """A row per epoch, a column per line."""
    found = [{point.epoch: _mean_text(point) for point in line.points} for line in lines]
    epochs = sorted({epoch for cells in found for epoch in cells})
    return [[str(epoch), *(cells.get(epoch, tables.MISSING) for cells in found)] for epoch in epochs]


def _mean_text(point: Point) -> str:
    band = "" if point.deviation is None else f" ± {tables.significant(point.deviation, 2)}"
    return tables.significant(point.mean) + band


def _paint_line(axes: "Axes", line: Line) -> None:
    epochs, means = [p.epoch for p in line.points], [p.mean for p in line.points]
    marked = len(epochs) == 1 or (len(epochs) <= 30 and not line.dashed)
    style: Any = DASHED if line.dashed else "-"
    axes.plot(epochs, means, color=line.colour, linestyle=style, marker=line.marker if marked else "")
    low, high = ([p.mean + sign * (p.deviation or 0.0) for p in line.points] for sign in (-1, 1))
    if low != high:
        axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _legend_inches(entries: Sequence[tuple[str, tuple[str, str]]]) -> float:
    return 0.16 * sum(1 + len(name) // 48 for name, _ in entries)


def _paint_legend(figure: "Figure", entries: Sequence[tuple[str, tuple[str, str]]], dashed: str | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker=marker) for _, (colour, marker) in entries]
    names = [textwrap.fill(name, 48) for name, _ in entries]
    if dashed:
        handles, names = [*handles, Line2D([], [], color=GREY, linestyle=DASHED)], [*names, dashed]
    columns = max(1, 80 // (max(map(len, names)) + 6))  # some 80 letters fit the width; a handle is as wide as six
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def frontier(series: Sequence[Series], metric: str, caption: str) -> Picture | None:
    """A point per series that sent something, where there are two or more of them."""
    title, unit = f"{metric.capitalize()} against bytes", tables.unit(series[0].results[0])
    found = [(one, look, sent_megabytes(one), _score(one)) for one, look in zip(series, looks(series), strict=True)]
    points = [(one, look, sent, value) for one, look, sent, value in found if sent and value is not None]
    if len(points) < 2:
        return None
    drawn = {look for _, look, *_ in points}
    entries = [(name, look) for name, look in legend(series) if look in drawn]

    def paint(figure: "Figure") -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes = figure.add_subplot()
        for _, (colour, marker), sent, value in points:
            axes.plot([sent], [value], color=colour, marker=marker, linestyle="", markersize=6)
        axes.set(xscale="log", xlabel="MB, up and down", ylabel=f"test {metric} ({unit})" if unit else f"test {metric}")
        axes.margins(0.15, 0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.grid()
        _paint_legend(figure, entries)

    decimals = 2 if unit == "%" else 4
    cells = [[one.label, tables.amount(sent), f"{value:.{decimals}f}"] for one, _, sent, value in points]
    headings = ["method", "MB up and down", f"test {metric} {unit}".rstrip()]
    return Picture(title, draw(title, 2.7 + _legend_inches(entries), paint), caption, headings, cells)


def sent_megabytes(one: Series) -> float | None:
    """MB of the whole training, up and down: at the socket, or as the application counts them where there is none."""
    directions = [
        _mean_megabytes(one, "bytes", f"socket_{way}") or _mean_megabytes(one, "bytes", way) for way in ("up", "down")
    ]
    return sum(way or 0.0 for way in directions)


def _score(one: Series) -> float | None:
    mean = tables.mean([tables.score(result) for result in one.results])
    return mean if mean is None or tables.unit(one.results[0]) != "%" else 100 * mean


# Bars


def bars(title: str, unit: str, groups: Sequence[tuple[str, Sequence[Bar]]], caption: str) -> Picture | None:
    """Horizontal bars with their sums, those of one series under its label; the legend holds the kinds that occur."""
    groups = [(label, group) for label, group in groups if group]
    every = [(label, bar) for label, group in groups for bar in group]
    kinds = [kind for kind in KIND_STYLES if any(kind in bar.parts for _, bar in every)]
    if not every:
        return None

    def paint(figure: "Figure") -> None:
        axes = figure.add_subplot()
        longest = max(sum(bar.parts.values()) for _, bar in every) or 1.0
        names: dict[int, str] = {}  # by place, from the top
        for label, group in groups:
            axes.text(0, len(names), label, va="center", weight="bold", in_layout=False)
            names[len(names)] = ""
            for bar in group:
                _paint_bar(axes, len(names), bar, 0.02 * longest)
                names[len(names)] = bar.name
        axes.set(yticks=list(names), yticklabels=names.values(), xlabel=unit, xlim=(0, 1.15 * longest))
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        _paint_kinds(figure, kinds)

    svg = draw(title, 1.0 + 0.22 * (len(every) + len(groups)), paint)
    cells = [[label, bar.name, *(tables.amount(bar.parts.get(kind)) for kind in kinds)] for label, bar in every]
    return Picture(title, svg, caption, ["method", unit, *kinds], cells)


def _paint_bar(axes: "Axes", place: int, bar: Bar, gap: float) -> None:
    left = 0.0
    for kind, value in bar.parts.items():
        axes.barh(place, value, 0.8, left, **_fill(kind))
        left += value
    axes.text(left + gap, place, tables.amount(left), va="center")


def _fill(kind: str) -> dict[str, Any]:
    colour, hatch = KIND_STYLES[kind]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": GREY if colour == WHITE else WHITE, "linewidth": 0.5}


def _paint_kinds(figure: "Figure", kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    if len(kinds) > 1:
        figure.legend([Patch(**_fill(kind)) for kind in kinds], kinds, loc="outside upper left", ncols=5)


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


# SVG


def draw(title: str, height_inches: float, paint: Callable[["Figure"], None]) -> str:
    """An SVG element that takes the width of its place, and whose ids no other figure of the page has."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    name = title.replace(" ", "-").lower()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        text = StringIO()
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=without)
    svg = text.getvalue()
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return re.sub(r"\s(?:width|height)=\"[\d.]+pt\"", "", svg, count=2)
