"""Run folders → one self-contained HTML page: what they show in a sentence, tables, figures, settings, environment.

Runs that differ only by the seed are shown as one: mean ± standard deviation. Try it: `halfpass report RUN…`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halfpass.config import nested
from halfpass.errors import InputError
from halfpass.files import make_folder, replacing
from halfpass.report import figures, tables, theme
from halfpass.report.beside import PAPER, beside, columns
from halfpass.report.outputs import PAGE, refuse_output
from halfpass.report.runs import Run, make_series, read_run, summary
from halfpass.report.sites import class_rows, metric_rows, site_rows
from halfpass.report.verdict import verdict


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Read the run folders `runs` and write the report to the HTML file `out`, which is returned.

    InputError when there is no run, a folder is no run or holds a broken file, or `out` cannot be a file, is not named
    as an HTML file, or is another file than a report.
    """
    out = Path(out)
    if not runs:
        raise InputError("report", "at least one run folder", "none", "name a folder written by 'halfpass train'")
    refuse_output("out", out, PAGE)
    page = render([read_run(path) for path in runs])
    make_folder("out", out.parent)
    with replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


def render(runs: Sequence[Run]) -> str:
    """The whole page as HTML text; the same runs make the same page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    series = make_series(runs)
    groups = [one.results for one in series]
    measures, pairs = tables.measures(groups), beside(series)
    drawn = sorted(map(_drawn, figures.pictures(series)), key=lambda one: one.long)  # long ones last
    page = Environment(
        loader=PackageLoader("halfpass", "report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return page.get_template("page.html.j2").render(
        methods=_distinct(groups, "method"),
        datasets=_distinct(groups, "dataset", "the clients' own data"),  # which a server need not know
        limit=tables.changed_settings(groups).get("data.limit"),
        verdict=verdict(series),
        facts=tables.shared_settings(groups) | tables.changed_settings(groups) | {"seed": _distinct(groups, "seed")},
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
        sites=site_rows(series),
        classes=class_rows(series),
        metrics=metric_rows(series),
        several_seeds=any(len(group) > 1 for group in groups),
        first=drawn[0] if drawn and not drawn[0].long else None,
        pictures=drawn,
        runs=[(run, summary(run)) for run in runs],
        shared=(shared := _shared_configuration(runs)),
        shared_text=as_yaml(shared),
        own=_own_configuration,
        dark_rules=theme.dark_rules(),
        dark=theme.DARK,
    )


class Drawn(NamedTuple):
    """A picture as the page shows it; a long one is folded."""

    picture: figures.Picture
    svg: str
    long: bool


def _drawn(picture: figures.Picture) -> Drawn:
    height = picture.height(theme.PAGE_INCHES)
    svg = theme.fluid(theme.draw(picture.name, theme.PAGE_INCHES, height, picture.paint))
    return Drawn(picture, svg, height > figures.LONG_INCHES)


def _distinct(groups: Sequence[tables.Group], key: str, unknown: str = "–") -> str:
    found = (result[key] for group in groups for result in group)
    return ", ".join(dict.fromkeys(unknown if value is None else str(value) for value in found))


def _shared_configuration(runs: Sequence[Run]) -> Mapping[str, Any]:
    """The settings that all runs have alike, where there are several runs."""
    if len(runs) == 1:
        return {}
    return {k: v for k, v in runs[0].settings.items() if all(k in r.settings and r.settings[k] == v for r in runs)}


def _own_configuration(run: Run, shared: Mapping[str, Any]) -> str:
    """The file as it is, or what is in it besides `shared` settings."""
    if not shared:
        return run.config
    return as_yaml({key: value for key, value in run.settings.items() if key not in shared})


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings by dotted names, as config.yaml has them."""
    import yaml

    return str(yaml.safe_dump(nested(settings), sort_keys=False, allow_unicode=True))
