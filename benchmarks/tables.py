"""Fills the marked places of the README and the docs with tables made from results/*.json.

    python benchmarks/tables.py            rewrites what stands between the marks
    python benchmarks/tables.py --check    writes nothing; exits with 1 when a table is not what its results say

A marked place begins with a line `<!-- table: results/NAME.json -->` and ends with a line `<!-- end table -->`. With
`<!-- table: results/NAME.json, trained with N seeds or more -->` the other trainings are left out; with
`<!-- table: results/NAME.json, in short -->` it is four measures of runs between processes, a column for each.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfpass.errors import InputError
from halfpass.report.tables import UNITS_NOTE, group_seeds, markdown_rows, markdown_table, settings_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "benchmarks/README.md", "results/README.md", "docs/**/*.md")
START = re.compile(r"^<!-- table:.*$", re.MULTILINE)
PLACE = re.compile(
    r"^(?P<start><!-- table: (?P<file>results/[\w.-]+\.json)"
    r"(?:, trained with (?P<seeds>\d+) seeds or more|(?P<short>, in short))? -->\n)"
    r"(?:(?!^<!-- table:).)*?"
    r"(?P<end>^<!-- end table -->$)",
    re.MULTILINE | re.DOTALL,
)


def load_results(root: Path, name: str) -> dict[str, Any]:
    """results/NAME.json as a mapping that has `environment`, `command` and `rows`."""
    try:
        content = json.loads((root / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(name, "a results file", "none", "run the benchmark that writes it") from error
    except ValueError as error:
        raise InputError(name, "JSON", str(error), "run the benchmark that writes it again") from error
    missing = {"environment", "command", "rows"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise InputError(name, f"the key {min(missing)!r}", "none", "run the benchmark that writes it again")
    return content


def with_seeds(content: dict[str, Any], least: int) -> dict[str, Any]:
    """The results of trainings with so many seeds."""
    groups = group_seeds(content["rows"], lambda row: row)
    return content | {"rows": [row for group in groups if len({r["seed"] for r in group}) >= least for row in group]}


def results_markdown(content: dict[str, Any]) -> str:
    """The tables of one results file and the line that says how and where they were measured."""
    rows = [{"training": row["training"], **row["ratios"]} if "ratios" in row else row for row in content["rows"]]
    training = [row for row in rows if "test_accuracy" in row]
    other = [row for row in rows if "test_accuracy" not in row]
    parts = [markdown_table(training)] if training else []
    parts += [markdown_rows([{key: row[key] for key in row if key != "environment"} for row in other])] if other else []
    note = f" All rows: {settings_line(training)}. {UNITS_NOTE}." if training else ""
    return "\n\n".join([*parts, source_line(content) + note])


def short_markdown(content: dict[str, Any]) -> str:
    """Four measures of runs that differ by their method alone."""
    rows = content["rows"]
    columns = [str(row["method"]) for row in rows]
    measures = {
        "test accuracy": [f"{100 * row['test_accuracy']:.1f} %" for row in rows],
        "bytes on the wire": [f"{_on_the_wire(row) / 1e9:.1f} GB" for row in rows],
        "peak memory of the client": [f"{max(row['peak_memory_bytes']['client']) / 1e6:.0f} MB" for row in rows],
        "training time": [f"{row['train_seconds'] / 60:.1f} min" for row in rows],
    }
    lines = [["", *columns], ["---", *(["---:"] * len(columns))], *([name, *cells] for name, cells in measures.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _on_the_wire(row: dict[str, Any]) -> int:
    """Bytes at the socket, both ways, with all framing."""
    return int(row["bytes"]["socket_up"] + row["bytes"]["socket_down"])


def source_line(content: dict[str, Any]) -> str:
    """Command, commit, hardware and torch version in one line; trainings of a grid may have several of each."""
    made = [row["environment"] for row in content["rows"] if row.get("environment")] or [content["environment"]]
    commit, hardware, torch = (
        ", ".join(dict.fromkeys(each.get(key) or "unknown" for each in made)) for key in ("commit", "hardware", "torch")
    )
    return f"`{content['command']}`; commit {commit}; {hardware}; torch {torch}."


def filled(text: str, page: str, root: Path, problems: list[str]) -> str:
    """`text` of `page` with its marked places made anew; a place whose results cannot be read stays, with a problem."""

    def fill(place: re.Match[str]) -> str:
        try:
            content = load_results(root, place["file"])
            content = with_seeds(content, int(place["seeds"])) if place["seeds"] else content
            made = short_markdown(content) if place["short"] else results_markdown(content)
            return f"{place['start']}{made}\n{place['end']}"
        except InputError as error:
            problems.append(f"{page}: {error}")
            return place[0]

    places = {place.start() for place in PLACE.finditer(text)}
    for start in START.finditer(text):
        if start.start() not in places:
            problems.append(f"{page}: expected 'table: results/NAME.json' up to 'end table', found {start[0]!r} alone")
    return PLACE.sub(fill, text)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Fill every page under `root`; 0 when all is well, 1 when a place cannot be filled or, with --check, is stale."""
    parser = argparse.ArgumentParser(description="Make the tables of the README and the docs from results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when something would change")
    check: bool = parser.parse_args(arguments).check
    problems: list[str] = []
    for page in (path for pattern in PAGES for path in sorted(root.glob(pattern))):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        new = filled(text, name, root, problems)
        if new != text and check:
            problems.append(f"{name}: its tables are not those of results/; run: python benchmarks/tables.py")
        elif new != text:
            page.write_text(new, encoding="utf-8")
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
