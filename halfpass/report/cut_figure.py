"""The cuts of a network as a figure: bars side by side, readable on light and dark grounds. Used by `halfpass cuts`."""

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from halfpass.report.theme import BLUE, STYLE, VERMILLION, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = Sequence[tuple[str, Sequence[float]]]  # each heading, and a value for each cut
WIDTH_INCHES, ROW_INCHES, HEAD_INCHES = 8.0, 0.22, 1.1


def cut_figure(title: str, names: Sequence[str], columns: Columns, chosen: int | None, form: str) -> bytes:
    """A row for each cut, in the order of the forward pass, and a column of bars for each of what it costs; the chosen
    row is of another colour. `form` is svg, pdf or png; an SVG adapts to the reader's light or dark ground."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def paint(figure: Figure) -> None:
        _paint(figure, title, names, columns, chosen)

    height = HEAD_INCHES + ROW_INCHES * max(1, len(names))
    if form == "svg":
        return picture_file("cuts", height, paint, WIDTH_INCHES).encode()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height))
        FigureCanvasAgg(figure)
        paint(figure)
        written = BytesIO()
        figure.savefig(written, format=form, dpi=150, metadata={"CreationDate": None} if form == "pdf" else {})
    return written.getvalue()


def _paint(figure: "Figure", title: str, names: Sequence[str], columns: Columns, chosen: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=9)
    every: "list[Axes]" = list(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0])
    colours = [VERMILLION if number == chosen else BLUE for number in range(len(names))]
    for axes, (heading, values) in zip(every, columns, strict=True):
        bars = axes.barh(range(len(names)), values, color=colours)
        said = [f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in values]
        axes.bar_label(bars, said, padding=3, fontsize=7)
        axes.set_title(heading, fontsize=8.5)
        axes.margins(x=0.3, y=0.01)
        axes.tick_params(axis="x", labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    every[0].set_yticks(range(len(names)), names)
    every[0].invert_yaxis()
