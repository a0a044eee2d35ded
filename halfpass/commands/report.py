"""`report`: run folders, found wherever they are, as a page, and as figures and tables for a paper."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from halfpass.errors import InputError
from halfpass.report import paper
from halfpass.report.outputs import CSV, LATEX, PAGE, refuse_output
from halfpass.report.runs import make_series, read_run
from halfpass.run.records import JOINED

DEEPEST = 5  # folders in folders


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Each folder, or the runs in it, such as those of a comparison, a grid, or a folder of comparisons; an edge's link
    behind its run. One that is named twice is no second seed. InputError where a folder holds none."""
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = list(_runs_in(folder, DEEPEST)) if folder.is_dir() else [folder]
        if not runs:
            expected = f"a run folder, or one with runs in it, at most {DEEPEST} folders deep"
            raise InputError(str(folder), expected, "none", "give a folder written by 'halfpass train'")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        if (folder / "edge" / "result.json").is_file():
            yield folder / "edge"
    elif depth > 0:
        for inner in _folders_in(folder):
            if not (inner / JOINED).is_file():  # a client's part, whose run is at its server
                yield from _runs_in(inner, depth - 1)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:  # one that may not be read has no runs for us
        return []


def write_for_paper(
    runs: Sequence[Path], page: Path, figures: Path | None, csv: Path | None, latex: Path | None
) -> list[Path]:
    """Writes what was asked for besides the page, and returns the files. InputError, nothing written, where one of them
    cannot be, the page included."""
    refuse_output("--out", page, PAGE)
    if csv is not None:
        refuse_output("--csv", csv, CSV)
    if latex is not None:
        refuse_output("--latex", latex, LATEX)
    if figures is csv is latex is None:
        return []
    series = make_series([read_run(run) for run in runs])
    written = paper.write_figures(series, figures) if figures is not None else []
    written += [paper.write_csv(series, csv)] if csv is not None else []
    return written + ([paper.write_latex(series, latex)] if latex is not None else [])
