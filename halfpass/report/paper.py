"""What goes into a paper: each figure as SVG and PDF, one and two columns wide, and the results as CSV and LaTeX.

    halfpass report RUN… --figures DIR --csv FILE --latex FILE

Figures are light, whatever the screen; their text is text, in DejaVu Sans, which is in the files.
"""

import base64
import csv
import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfpass.errors import InputError
from halfpass.files import make_folder, replacing
from halfpass.report import figures, tables, theme
from halfpass.report.outputs import CSV, LATEX, PDF, SVG, refuse_output
from halfpass.report.runs import Series
from halfpass.report.tables import Group

COLUMN_INCHES = {"": 3.45, "-wide": 7.1}  # of a paper with two columns, by what the file's name ends in
CREATOR = "halfpass report"
FACES = {"400": "DejaVuSans.ttf", "700": "DejaVuSans-Bold.ttf"}  # by weight, as matplotlib brings them

# Figures


def write_figures(series: Sequence[Series], folder: Path) -> list[Path]:
    """Writes NAME.svg, NAME.pdf, NAME-wide.svg and NAME-wide.pdf of every figure into the folder, which is made;
    returns the files. InputError, none written, where one would take the place of a file that halfpass did not write.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("--figures", "a folder", f"a file at {folder}", "name a folder")
    drawn = figures.pictures(series)
    found = [(picture, ending, width) for picture in drawn for ending, width in COLUMN_INCHES.items()]
    for picture, ending, _ in found:
        for kind in (SVG, PDF):
            refuse_output("--figures", folder / f"{picture.name}{ending}{kind.endings[0]}", kind)
    make_folder("--figures", folder)
    written = []
    for picture, ending, width in found:
        for suffix, make in ((".svg", _svg), (".pdf", _pdf)):
            file = folder / f"{picture.name}{ending}{suffix}"
            with replacing(file) as partial:
                partial.write_bytes(make(picture, width))
            written.append(file)
    return written


def _svg(picture: figures.Picture, width: float) -> bytes:
    svg = theme.draw(picture.name, width, picture.height(width), picture.paint)
    opening, rest = svg.split(">", 1)
    return f"<!-- {CREATOR} -->\n{opening}>\n<style>{_faces(rest)}</style>{rest}".encode()


def _pdf(picture: figures.Picture, width: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**theme.STYLE, "pdf.fonttype": 42}):
        figure = Figure(figsize=(width, picture.height(width)))
        FigureCanvasPdf(figure)
        picture.paint(figure)
        content = io.BytesIO()
        known = {"Creator": CREATOR, "Title": picture.title, "CreationDate": None}
        figure.savefig(content, format="pdf", metadata=known)
    return content.getvalue()


def _faces(svg: str) -> str:
    """Style rules with the letters that the text needs, of each weight that occurs."""
    weights = ["400", *(["700"] if "font-weight: 700" in svg else [])]
    letters = "".join(sorted(set(re.sub(r"<[^>]*>|&\w+;", "", svg)) | set("&<>")))
    return "".join(
        f'@font-face {{ font-family: "DejaVu Sans"; font-weight: {weight}; '
        f"src: url(data:font/woff;base64,{_face(FACES[weight], letters)}) }}\n"
        for weight in weights
    )


def _face(file: str, letters: str) -> str:
    """The font file with these letters alone, as base64 of WOFF."""
    import matplotlib
    from fontTools import subset

    options = subset.Options(flavor="woff", notdef_outline=True, recalc_timestamp=False)
    options.drop_tables = [*options.drop_tables, "FFTM"]  # FontForge's, which fontTools would warn of
    font = subset.load_font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file), options)
    chosen = subset.Subsetter(options)
    chosen.populate(text=letters)
    chosen.subset(font)
    content = io.BytesIO()
    subset.save_font(font, content, options)
    return base64.b64encode(content.getvalue()).decode()


# Tables


def write_csv(series: Sequence[Series], file: Path) -> Path:
    """Writes a row for each series: settings, and mean and standard deviation of every measure, as exact as they are.
    What was not measured, or has one seed, is empty."""
    refuse_output("--csv", file, CSV)
    return _write(file, csv_text(series))


def csv_text(series: Sequence[Series]) -> str:
    groups = [one.results for one in series]
    # told apart by more than is recorded: further settings
    settings = list(dict.fromkeys([*tables.SETTINGS, *(name for one in series for name in one.settings)]))
    measures = _measures(groups)
    headings = ["series", "method", "n", "seeds", *(name.replace(".", "_") for name in settings)]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*headings, *(f"{name}_{what}" for name in measures for what in ("mean", "std"))])
    for one in series:
        seeds = " ".join(str(result["seed"]) for result in one.results)
        own = [tables.setting(one.results, name) or "" for name in settings]
        numbers = [number for value in measures.values() for number in _mean_and_deviation(one.results, value)]
        texts = [_harmless(text) for text in (one.label, one.method, *own)]
        out.writerow([*texts[:2], len(one.results), seeds, *texts[2:], *numbers])
    return text.getvalue()


def _harmless(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def _measures(groups: Sequence[Group]) -> dict[str, tables.Measure]:
    """By name with its unit: the leading metrics and those of `tables.MEASURES`, that some group has."""
    found: dict[str, tables.Measure] = {}
    for metric, unit in dict.fromkeys((tables.lead(group[0]), tables.unit(group[0])) for group in groups):
        for part in ("test", "aux_test", "joint_test"):
            ending, scale = ("_percent", 100) if unit == "%" else ("", 1)
            found[f"{part}_{metric}{ending}"] = _score(metric, part, scale)
    for column in tables.MEASURES:
        assert column.value is not None
        found[f"{column.title}_{column.unit}".replace(" ", "_")] = column.value
    results = [result for group in groups for result in group]
    return {name: value for name, value in found.items() if any(value(result) is not None for result in results)}


def _score(metric: str, part: str, scale: int) -> tables.Measure:
    def value(result: tables.Result) -> float | None:
        found = tables.score(result, part) if tables.lead(result) == metric else None
        return None if found is None else scale * found

    return value


def _mean_and_deviation(group: Group, value: tables.Measure) -> tuple[Any, Any]:
    known = [number for result in group if (number := value(result)) is not None]
    return statistics.fmean(known) if known else "", statistics.stdev(known) if len(known) > 1 else ""


def write_latex(series: Sequence[Series], file: Path) -> Path:
    """Writes a table for LaTeX with the package booktabs."""
    refuse_output("--latex", file, LATEX)
    return _write(file, latex_text(series))


def latex_text(series: Sequence[Series]) -> str:
    """The report's table: a row for each series with its seeds n, mean ± standard deviation. What the rows share is in
    the caption."""
    groups = [one.results for one in series]
    columns = [c for c in tables.table_columns(groups) if c.title != "seeds" and not c.title.startswith("socket")]
    settings, numbers = [c for c in columns if not c.numeric], [c for c in columns if c.numeric]
    rows = [
        [*(c.cell(group) for c in settings), str(len(group)), *(c.cell(group) for c in numbers)] for group in groups
    ]
    heads = [*(_heading(c.title, "") for c in settings), "$n$", *(_heading(c.title, c.unit) for c in numbers)]
    several = max(map(len, groups)) > 1
    caption = f"{escaped(tables.settings_line([r for group in groups for r in group]))}. $n$ seeds"
    caption += ", mean \\(\\pm\\) standard deviation." if several else "."
    caption += " MB: $10^6$ bytes; --: does not apply or was not measured."
    return "\n".join([
        f"% {CREATOR}: needs \\usepackage{{booktabs}}",
        "\\begin{table*}", "  \\centering", "  \\footnotesize", "  \\setlength{\\tabcolsep}{4pt}",
        f"  \\caption{{{caption}}}", "  \\label{tab:halfpass}",
        f"  \\begin{{tabular}}{{{'l' * len(settings)}{'r' * (1 + len(numbers))}}}", "    \\toprule",
        f"    {' & '.join(heads)} \\\\", "    \\midrule",
        *(f"    {' & '.join(map(escaped, row))} \\\\" for row in rows),
        "    \\bottomrule", "  \\end{tabular}", "\\end{table*}", "",
    ])  # fmt: skip


def _heading(title: str, unit: str) -> str:
    """Words and unit over each other, for narrow columns."""
    words = [escaped(word) for word in [*title.split(), *([unit] if unit else [])]]
    over = r" \\ ".join(words)
    return over if len(words) == 1 else f"\\shortstack[r]{{{over}}}"


ESCAPES = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "±": r"\(\pm\)", "−": r"\(-\)", "–": "--", "·": r"\(\cdot\)",
    "→": r"\(\rightarrow\)", "×": r"\(\times\)", "…": r"\ldots{}", "\t": " ", "\n": " ", "\r": " ",
}  # fmt: skip


def escaped(text: str) -> str:
    """Text as LaTeX shows it; control characters are left out."""
    return "".join(ESCAPES.get(c, c if c.isprintable() else "") for c in text)


def _write(file: Path, text: str) -> Path:
    make_folder(str(file), file.parent)
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return file
