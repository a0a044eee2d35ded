"""The tutorials say what their code prints: each notebook's cells run in a fresh process, in an empty folder.

Words and whole numbers must be as they were kept. Numbers with a point may differ a little, as other processors and
libraries round otherwise. Cells with the tag `varies` print seconds: there, words alone are compared.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs/tutorials").glob("*.ipynb"))
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
MOST_SECONDS = 600
RUN = """
import contextlib, io, json, sys
said = []
for number, cell in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(cell, f"cell {number}", "exec"), globals())
    said.append(out.getvalue())
print(json.dumps(said))
"""


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def kept(cell):
    """What a cell printed when the notebook was made."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def assert_alike(found, expected, *, numbers=True):
    assert re.sub(r" +", " ", NUMBER.sub("#", found)) == re.sub(r" +", " ", NUMBER.sub("#", expected))
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True) if numbers else ():
        if "." in other:
            assert float(one.replace(",", "")) == pytest.approx(float(other.replace(",", "")), rel=0.04, abs=0.05)
        else:
            assert one == other, found


LONG = {"two-sites-one-server"}  # whose processes take a minute
MARKED = [pytest.param(path, id=path.stem, marks=[pytest.mark.long] if path.stem in LONG else []) for path in NOTEBOOKS]


@pytest.mark.parametrize("notebook", MARKED)
def test_the_cells_print_what_is_kept(notebook, tmp_path):
    cells = code_cells(notebook)
    run = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(["".join(cell["source"]) for cell in cells]), cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}, capture_output=True, text=True,
        timeout=MOST_SECONDS, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for found, cell in zip(json.loads(run.stdout), cells, strict=True):
        assert_alike(found, kept(cell), numbers="varies" not in cell["metadata"].get("tags", ()))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_executed_and_clean(notebook):
    cells, text = code_cells(notebook), notebook.read_text(encoding="utf-8")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not {output.get("name", output["output_type"]) for cell in cells for output in cell["outputs"]} - {"stdout", "display_data"}
    assert all(set(cell["metadata"]) <= {"tags"} for cell in cells)  # no times of execution
    assert len(text.encode()) <= 150_000
    assert not re.search(r"/tmp|/home|/root|site-packages|Warning", re.sub(r'"image/png": "[^"]*"', "", text))
    assert "## Something to try" in text
    for link in re.findall(r"\]\(([^)#]+)", "".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")):
        assert (notebook.parent / link).exists(), link


def test_there_are_three_and_a_changed_number_is_seen():
    assert len(NOTEBOOKS) == 3
    assert_alike("a 94.7 %, 1,024 bytes", "a  94.5 %, 1,024 bytes")
    for found in ("a 84.7 %, 1,024 bytes", "a 94.7 %, 1,025 bytes", "b 94.7 %, 1,024 bytes"):
        with pytest.raises(AssertionError):
            assert_alike(found, "a 94.5 %, 1,024 bytes")
