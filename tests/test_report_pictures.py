"""Pictures and files of a report: readable in the dark and on a phone, and fit for a paper."""

import csv
import io
import re
from pathlib import Path

import pytest
from test_report import example_metrics, example_result, make_run, row

from halfpass.commands.report import find_runs, write_for_paper
from halfpass.errors import InputError
from halfpass.report import paper, theme
from halfpass.report.figures import lying_on, pictures
from halfpass.report.page import render, write_report
from halfpass.report.runs import make_series, read_run
from halfpass.report.verdict import verdict

DOCS = Path(__file__).resolve().parents[1] / "docs" / "results"


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def said(tmp_path: Path, *results: dict) -> list[str]:
    """The verdict on runs with these results."""
    place = tmp_path / f"v{len(list(tmp_path.iterdir()))}"
    place.mkdir()
    runs = [make_run(place / str(n), result, []) for n, result in enumerate(results)]
    return verdict(make_series([read_run(run) for run in runs]))


# Dark, narrow, on each other


@pytest.mark.parametrize("colour", theme.COLOURS)
def test_every_colour_stands_out_from_light_and_dark_paper(colour: str) -> None:
    assert contrast(colour, theme.WHITE) >= 3
    assert contrast(theme.DARK[colour], theme.DARK[theme.WHITE]) >= 3
    assert contrast(theme.DARK[theme.INK], theme.DARK[theme.WHITE]) >= 7


def test_all_that_is_drawn_has_a_dark_colour(tmp_path: Path) -> None:
    page = render([read_run(make_run(tmp_path / "a", example_result(), example_metrics()))])
    drawn = set(re.findall(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})", "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))))
    assert {theme.BLUE, theme.INK, theme.GRID} <= drawn <= theme.DARK.keys()
    assert "@media screen and (prefers-color-scheme: dark)" in page  # and so not on paper


@pytest.mark.parametrize("file", ["frontier.svg", "overlap.svg", "scale.svg"])
def test_pictures_of_the_documentation_are_readable_on_a_phone_and_in_the_dark(file: str) -> None:
    svg = (DOCS / file).read_text(encoding="utf-8")
    (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', svg)
    sizes = [float(size) * 343 / float(width) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    assert len(sizes) > 10
    assert min(sizes) >= 11
    assert "prefers-color-scheme: dark" in svg
    drawn = set(re.findall(r"(?:fill|stroke)(?:: |=\")(#[0-9a-f]{6})(?! !)", svg)) - set(theme.DARK.values())
    assert drawn <= theme.DARK.keys()


def test_curves_that_lie_on_each_other_are_all_seen(tmp_path: Path) -> None:
    assert lying_on([{1: 0.0, 2: 5.0}, {1: 0.0, 2: 5.0}, {1: 9.0, 2: 1.0}], 9.0) == [1, 0, 0]
    assert lying_on([{1: 0.0}, {2: 0.0}], 1.0) == [0, 0]  # no epoch in common
    rows, others = ([r for r in example_metrics(a) if r["process"] == "server"] for a in ((0.6, 0.9), (0.3, 0.2)))
    same = [make_run(tmp_path / m, example_result(method=m), rows) for m in ("decoupled", "conventional")]
    other = [same[0], make_run(tmp_path / "x", example_result(method="conventional"), others)]
    for runs, expected in ((same, True), (other, False)):
        accuracy = pictures(make_series([read_run(run) for run in runs]))[0]
        svg = theme.draw("a", 3.45, accuracy.height(3.45), accuracy.paint)
        widths = {float(w) for w in re.findall(r"stroke: #0072b2; stroke-width: ([\d.]+)", svg)}
        assert (max(widths) > 3) == expected
        assert ("lie on each other" in accuracy.caption) == expected


def test_text_stays_within_its_picture(tmp_path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    long = {"codec": "int4+zstd", "model": "a-network-with-a-long-name", "cut": "encoder.layers.11.attention"}
    runs = [make_run(tmp_path / "a", example_result(), example_metrics())]
    runs += [make_run(tmp_path / "b", example_result(**long), example_metrics())]
    for picture in pictures(make_series([read_run(run) for run in runs])):
        for width in (3.45, 7.1):
            with rc_context(theme.STYLE):
                figure = Figure(figsize=(width, picture.height(width)))
                canvas = FigureCanvasAgg(figure)
                picture.paint(figure)
                canvas.draw()
            for text in figure.findobj(Text):
                box = text.get_window_extent()
                if text.get_text() and text.get_visible() and box.width:
                    inside = box.x0 >= -2 and box.x1 <= figure.bbox.x1 + 2 and box.y0 >= -2 and box.y1 <= figure.bbox.y1 + 2
                    assert inside or not figure.bbox.overlaps(box), (picture.title, width, text.get_text())


# In words


def test_one_run_in_words(tmp_path: Path) -> None:
    assert said(tmp_path, example_result()) == ["Decoupled reached 97.31 % test accuracy in 12 s, sending 41.81 MB.", "One seed."]
    held = said(tmp_path, example_result(validation=100))
    assert "97.31 % accuracy on samples held out of the training set" in held[0]
    error = {"metric": "rmse", "metric_unit": "", "higher_is_better": False, "test": {"rmse": 0.25}, "test_accuracy": None}
    assert "test rmse 0.2500 (lower is better)" in said(tmp_path, example_result(**error))[0]
    assert said(tmp_path, example_result(test_accuracy=None)) == ["No run has been tested yet."]
    assert said(tmp_path, example_result(aux_test_accuracy=0.9731 + 0.029)) == said(tmp_path, example_result())
    assert said(tmp_path, example_result(test_accuracy=0.5))[1] == (
        "Decoupled: the auxiliary head alone reached 95.12 %. The server half has learned less: train for longer, cut later, or try other heads."
    )


def test_a_comparison_in_words(tmp_path: Path) -> None:
    back = {**example_result()["bytes"], "down": {"gradients": 41_000_000, "weights": 91_000, "other": 5_000}}
    conventional = example_result(method="conventional", test_accuracy=0.9831, bytes=back, train_seconds=24.68)
    assert said(tmp_path, example_result(), conventional) == [
        "Decoupled reached 97.31 % test accuracy in 12 s, 1.00 points below conventional training (98.31 %), "
        "with 50 % of its bytes and 50 % of its time.",
        "One seed: how much of a difference is chance is not known.",
    ]


def test_what_is_smaller_than_its_spread_is_no_finding(tmp_path: Path) -> None:
    def runs(*accuracies: float) -> list[dict]:
        made = [example_result(seed=seed, test_accuracy=value) for seed, value in enumerate(accuracies)]
        return made + [example_result(method="conventional", seed=seed, test_accuracy=0.9) for seed in (0, 1)]

    close, apart = said(tmp_path, *runs(0.89, 0.92)), said(tmp_path, *runs(0.85, 0.86))
    assert "0.50 ± 2.12 points above" in close[0]
    assert close[-1] == "Smaller than its own spread over the seeds, so no finding: the difference of decoupled."
    assert "4.50 ± 0.71 points below" in apart[0]
    assert not any("spread" in sentence or "chance" in sentence for sentence in apart)


def test_sites_and_labels_have_numbers_of_their_own(tmp_path: Path) -> None:
    sites = [{"client": k, "samples": 10 + k, "test": {"accuracy": a, "auroc/ill": b}} for k, a, b in ((0, 0.9, 0.8), (1, 0.5, 0.7))]
    result = example_result(sites=sites, test={"accuracy": 0.9731, "auroc/ill": 0.75})
    page = render([read_run(make_run(tmp_path / "a", result, []))])
    assert "Sites range from 50.00 % (client 1, 11 test samples) to 90.00 % (client 0, 10)." in page
    for text in ("Sites and classes", "Test accuracy by site", "all: auroc", "0.7500", "client 1: auroc", "0.7000", "50.00 %"):
        assert text in page, text
    broken = make_run(tmp_path / "b", example_result(sites=[{"client": "x"}]), [])
    with pytest.raises(InputError, match="sites: expected rows with 'client' and 'samples'"):
        read_run(broken)


def test_settings_that_are_not_the_default_are_on_top(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", example_result(), [], data={"name": "digits", "limit": 640}, log={"level": "debug"})
    page = render([read_run(run)])
    assert "<h1>decoupled on digits, at most 640 training samples</h1>" in page
    top = page[: page.index("<h2>Results")]
    assert "<dt>data.limit</dt><dd>640</dd>" in top
    assert "<dt>train.lr</dt><dd>0.05</dd>" in top  # whose default is 0.2
    assert "log.level" not in top


def test_many_runs_are_folded_and_say_what_they_share_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{n}", example_result(cut=f"c{n}"), [row(1, "server", loss=1.0)], model={"cut": f"c{n}"}) for n in range(15)]
    read = [read_run(run) for run in runs]
    page = render(read)
    assert page == render(read)  # the same runs make the same page
    assert page.count("lr: 0.05") == 1
    assert "Of 15 settings, decoupled (cut c0) did best" in page
    assert '<details class="picture"><summary>Show the chart' in page
    assert "Each of the 15 runs" in page


def test_a_run_that_failed_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", None, example_metrics())
    (folder / "events.jsonl").write_text('{"event": "joined", "text": "a"}\n{"event": "failed", "text": "no <room>"}\n')
    assert "failed: no &lt;room&gt;" in render([read_run(folder)])
    (folder / "events.jsonl").write_text('{"event": "failed", "te')
    assert "failed" not in str(read_run(folder).notes)


# Files


def test_runs_are_found_in_folders_of_folders(tmp_path: Path) -> None:
    (tmp_path / "all" / "first").mkdir(parents=True)
    runs = [make_run(tmp_path / "all" / "first" / name, example_result(), []) for name in ("a", "b")]
    chain = make_run(tmp_path / "all" / "chain", example_result(), [])
    edge = make_run(chain / "edge", example_result(), [])
    client = make_run(tmp_path / "all" / "client-0", None, [])
    (client / "join.json").write_text("{}")
    assert find_runs([tmp_path / "all", runs[0]]) == [chain, edge, *runs]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: expected a run folder, or one with runs in it, at most 5 folders deep"):
        find_runs([tmp_path / "none"])


def test_nothing_but_a_report_is_overwritten(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", example_result(), example_metrics())
    with pytest.raises(InputError, match=r"out: expected a name that ends in \.html or \.htm, found .*x\.pdf; a page is HTML"):
        write_report([run], tmp_path / "x.pdf")
    mine = tmp_path / "mine.html"
    mine.write_text("<!DOCTYPE html><title>How to use halfpass report</title>")
    with pytest.raises(InputError, match="out: expected a new file, or one that halfpass report wrote, found another at"):
        write_report([run], mine)
    texts = {"csv": "a,b\n", "tex": "% my paper on halfpass report: a\n"}
    for ending, text in texts.items():
        (tmp_path / f"t.{ending}").write_text(text)
    for files in ({"csv": tmp_path / "t.csv"}, {"csv": tmp_path / "n.csv", "latex": tmp_path / "t.tex"}):
        asked = {"figures": tmp_path / "f", "csv": None, "latex": None} | files
        with pytest.raises(InputError, match="one that halfpass report wrote, found another at"):
            write_for_paper([run], tmp_path / "r.html", **asked)
    assert not (tmp_path / "f").exists()
    assert not (tmp_path / "n.csv").exists()
    assert [(tmp_path / f"t.{ending}").read_text() for ending in texts] == list(texts.values())
    for _ in range(2):  # its own are
        write_report([run], tmp_path / "r.html")
        write_for_paper([run], tmp_path / "r.html", None, tmp_path / "n.csv", tmp_path / "n.tex")


def test_figures_for_a_paper(tmp_path: Path) -> None:
    series = make_series([read_run(make_run(tmp_path / "a", example_result(), example_metrics()))])
    files = {file.name: file for file in paper.write_figures(series, tmp_path / "f")}
    assert {"test-accuracy.svg", "test-accuracy.pdf", "test-accuracy-wide.svg", "bytes-wide.pdf"} <= files.keys()
    svg, pdf = (files[f"test-accuracy.{ending}"].read_bytes() for ending in ("svg", "pdf"))
    assert b">test accuracy (%)</text>" in svg  # text, with its letters
    assert b"data:font/woff;base64," in svg
    assert b"prefers-color-scheme" not in svg
    assert b"/FontFile2" in pdf
    assert b"/MediaBox [ 0 0 248.4 " in pdf
    assert b"/MediaBox [ 0 0 511.2 " in files["test-accuracy-wide.pdf"].read_bytes()
    paper.write_figures(series, tmp_path / "f")  # takes the place of its own
    files["bytes.pdf"].write_bytes(b"%PDF-1.4 mine")
    with pytest.raises(InputError, match=r"--figures: expected a new file, or one .* found another at .*bytes\.pdf"):
        paper.write_figures(series, tmp_path / "f")


def test_tables_for_a_paper(tmp_path: Path) -> None:
    results = [example_result(seed=s, test_accuracy=a) for s, a in enumerate((0.90, 0.92, 0.97))]
    results.append(example_result(method="conventional", head=None, seed=0, cut="a_b & c% #1 {x} ~^\\ <y>"))
    runs = [make_run(tmp_path / f"{n}", result, []) for n, result in enumerate(results)]
    series = make_series([read_run(run) for run in runs])
    first, second = csv.DictReader(io.StringIO(paper.csv_text(series)))
    assert (first["n"], first["seeds"], first["cut"], first["method"]) == ("3", "0 1 2", "conv_2", "decoupled")
    assert float(first["test_accuracy_percent_mean"]) == pytest.approx(93.0)
    assert float(first["test_accuracy_percent_std"]) == pytest.approx(3.6055513)
    assert (second["test_accuracy_percent_std"], second["bytes_up_MB_mean"]) == ("", "41.71")
    text = paper.latex_text(series)
    assert r"93.00 \(\pm\) 3.61" in text
    assert r"a\_b \& c\% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} \textless{}y\textgreater{}" in text
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1  # as many cells in each
    (kinds,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert len(kinds) == 1 + len(re.findall(r"(?<!\\)&", lines[0]))
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
