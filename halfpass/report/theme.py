"""Colours and letters of every picture, for light and dark pages, and figures as SVG: of reports and of docs/.

A picture is drawn in light colours. On a dark screen a style sheet gives each of them its dark counterpart; a viewer
that knows no style sheets, and paper, show the light ones. Text is 8.5 points at PAGE_INCHES, which is 11 pixels and
more where the picture is shown 327 pixels wide, as on a phone.
"""

import re
from collections.abc import Callable
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart, orange and sky blue made darker: each has a
# contrast of 3 to white paper. Shapes and hatches repeat what colours say.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b57f00", "#3b94cc"
INK, GREY, WHITE, GRID = "#1f2933", "#6b7785", "#ffffff", "#e7eaee"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)  # of the series, in their order
DARK = {
    BLUE: "#4c9fe0", VERMILLION: "#ff8345", GREEN: "#2bbd8c", PURPLE: "#e08fbd", ORANGE: "#f0b93a", SKY: "#9ad8fb",
    INK: "#e4e9ee", GREY: "#97a3af", WHITE: "#171c22", GRID: "#2b333c",
}  # fmt: skip
PAGE_INCHES = 3.45
POINTS = 8.5
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"], "font.size": POINTS,
    "legend.fontsize": POINTS, "axes.titlesize": POINTS, "axes.labelsize": POINTS, "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS, "legend.title_fontsize": POINTS,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": GRID,
    "hatch.linewidth": 0.5, "lines.linewidth": 1.4, "lines.markersize": 3.5, "legend.frameon": False,
    "legend.handlelength": 1.5, "legend.handletextpad": 0.5, "legend.columnspacing": 1.0, "legend.borderpad": 0.0,
}  # fmt: skip


def dark_rules() -> str:
    """A style sheet's rules: what is drawn in a light colour has its dark counterpart. No `svg` stands before them:
    what is in <defs> would not be found where it is used."""
    return "\n".join(
        f'[style*="fill: {light}"], [fill="{light}"] {{ fill: {dark} !important; }}\n'
        f'[style*="stroke: {light}"] {{ stroke: {dark} !important; }}'
        for light, dark in DARK.items()
    )


def draw(name: str, width: float, height: float, paint: Callable[["Figure"], None], **changes: Any) -> str:
    """The SVG element of what `paint` paints on a figure of so many inches. `name` is in all of its ids, and `changes`
    are matplotlib's settings."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {**STYLE, "svg.hashsalt": name, **changes}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor="none")
        FigureCanvasSVG(figure)
        paint(figure)
        text = StringIO()
        without = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=without)
    svg = text.getvalue()
    needless = r'<!--.*?-->|<metadata>.*?</metadata>| transform="rotate\(-0 [^"]*"'
    svg = re.sub(needless, "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", svg).replace("\n/>", "/>")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def fluid(svg: str) -> str:
    """The element without a size: it takes the width of its place."""
    return re.sub(r"\s(?:width|height)=\"[\d.]+pt\"", "", svg, count=2)


def picture_file(name: str, height: float, paint: Callable[["Figure"], None], width: float = PAGE_INCHES) -> str:
    """A whole SVG file, for docs/: light or dark as the screen is, and shown 480 pixels wide where there is room."""
    svg = fluid(draw(name, width, height, paint))
    style = f"<style>\n@media screen and (prefers-color-scheme: dark) {{\n{dark_rules()}\n}}\n</style>"
    ground = f'<rect width="100%" height="100%" style="fill: {WHITE}"/>'  # a page may be dark where its screen is not
    opening, rest = svg.split(">", 1)
    size = f'width="480" height="{480 * height / width:.0f}"'
    return f"{opening} {size}>\n{style}\n{ground}{rest}"
