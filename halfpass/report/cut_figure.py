"""The cuts of a network as a figure: bars side by side, readable on light and dark grounds. Used by `halfpass cuts`."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from halfpass.report.theme import BLUE, GREY, INK, STYLE, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 8.0, 0.22, 1.1
LIGHT, DARK = (INK, "#ffffff"), ("#e6e9ed", "#15191e")  # ink and ground of an SVG, as its reader has it
RULE = "svg{color:%s;background:%s}"
ADAPTING = f"<style>{RULE % LIGHT} @media (prefers-color-scheme:dark){{{RULE % DARK}}}</style>"


def cut_figure(
    title: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]], chosen: int | None, form: str
) -> bytes:
    """A row for each cut, in the order of the forward pass, and a column of bars for each of what it costs; the chosen
    row is of another colour. `form` is svg, pdf or png; an SVG adapts to the reader's light or dark ground."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "cuts"}):
        height = HEAD_INCHES + ROW_INCHES * max(1, len(names))
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=9)
        every: "list[Axes]" = list(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0])
        colours = [VERMILLION if number == chosen else BLUE for number in range(len(names))]
        for axes, (heading, values) in zip(every, columns, strict=True):
            bars = axes.barh(range(len(names)), values, color=colours)
            axes.bar_label(bars, [f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in values],
                           padding=3, fontsize=7)  # fmt: skip
            axes.set_title(heading, fontsize=8.5)
            axes.margins(x=0.3, y=0.01)
            axes.tick_params(axis="x", labelsize=7)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
        every[0].set_yticks(range(len(names)), names)
        every[0].invert_yaxis()
        written = BytesIO()
        without = {"svg": {"Creator": None, "Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
        figure.savefig(written, format=form, transparent=form == "svg", dpi=150, metadata=without)
    return _adapted(written.getvalue()) if form == "svg" else written.getvalue()


def _adapted(svg: bytes) -> bytes:
    text = svg.decode()
    for colour in (INK, GREY):
        text = text.replace(colour, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    return (text[:start] + ADAPTING + text[start:]).encode()
