"""Run folders → one self-contained HTML page: the table, the figures, the configuration, the environment.

Runs that differ only by the seed are shown as one: mean ± standard deviation. Try it: `halfpass report RUN…`.
"""

from collections.abc import Sequence
from pathlib import Path

from halfpass.errors import InputError
from halfpass.files import make_folder, refuse_file, replacing
from halfpass.report import figures, tables
from halfpass.report.beside import PAPER, beside, columns
from halfpass.report.runs import Run, make_series, read_run, summary


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Read the run folders `runs` and write the report to the HTML file `out`, which is returned.

    InputError when there is no run, a folder is no run or holds a broken file, or `out` cannot be a file.
    """
    out = Path(out)
    if not runs:
        raise InputError("report", "at least one run folder", "none", "name a folder written by 'halfpass train'")
    refuse_file("out", out)
    page = render([read_run(path) for path in runs])
    make_folder("out", out.parent)
    with replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def render(runs: Sequence[Run]) -> str:
    """The whole page as HTML text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    series = make_series(runs)
    groups = [one.results for one in series]
    measures, pairs = tables.measures(groups), beside(series)
    page = Environment(
        loader=PackageLoader("halfpass", "report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return page.get_template("page.html.j2").render(
        methods=_distinct(groups, "method"),
        datasets=_distinct(groups, "dataset", "the clients' own data"),  # which a server need not know
        seeds=_distinct(groups, "seed"),
        facts=tables.shared_settings(groups),
        columns=measures,
        rows=[
            (one.label, colour, [column.cell(one.results) for column in measures])
            for one, (colour, _) in zip(series, figures.looks(series), strict=True)
        ],
        pairs=pairs,
        pair_columns=columns(pairs),
        paper=PAPER,
        units_note=tables.UNITS_NOTE,
        said=tables.said,
        sites=tables.sites,
        several_seeds=any(len(group) > 1 for group in groups),
        pictures=figures.pictures(series),
        runs=[(run, summary(run)) for run in runs],
    )


def _distinct(groups: Sequence[tables.Group], key: str, unknown: str = "–") -> str:
    found = (result[key] for group in groups for result in group)
    return ", ".join(dict.fromkeys(unknown if value is None else str(value) for value in found))
