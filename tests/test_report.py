"""The report and the tables: from run folders and results whose numbers are all different, worked out by hand."""

import importlib.util
import json
import re
import sys
from io import StringIO
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rich.console import Console

from halfpass.errors import InputError
from halfpass.report import tables
from halfpass.report.beside import beside
from halfpass.report.figures import legend, looks, panels
from halfpass.report.page import render, write_report
from halfpass.report.runs import by_epoch, make_series, mean_curve, read_run, summary

ROOT = Path(__file__).resolve().parents[1]


def example_result(**changes: Any) -> dict[str, Any]:
    """A result.json with a different number in every place."""
    result: dict[str, Any] = {
        "method": "decoupled", "runtime": "processes", "dataset": "digits", "validation": None, "model": "digits-cnn", "cut": "conv_2",
        "head": "linear", "codec": "none", "topology": "splitfed", "clients": 1, "rounds": 1, "lr_scale": 1.0,
        "epochs": 2, "seed": 5, "precision": "fp32", "device": "cpu", "compile": False, "every": 1, "budget": None, "replay": 1, "merge": 1, "micro_batch": None,
        "feedback_every": None, "edge_cut": None,
        "test_accuracy": 0.9731, "aux_test_accuracy": 0.9512, "train_seconds": 12.34,
        "bytes": {
            "up": {"activations": 41_000_000, "labels": 620_000, "weights": 83_000, "other": 7_000},
            "down": {"gradients": 0, "weights": 91_000, "other": 5_000},
            "socket_up": 42_345_000, "socket_down": 123_000,
        },
        "evaluation_bytes": {"up": 3_210_000, "down": 77_000},
        "peak_memory_bytes": {"client": [21_500_000], "server": 35_250_000, "colocated": 48_750_000},
        "seconds": {"client_busy": 9.5, "client_waiting": 1.25, "server_busy": 7.75, "server_waiting": 4.5},
        "environment": {
            "commit": "c0ffee1", "python": "3.12.9", "torch": "2.13.0", "hardware": "Sparrow 9000", "threads": 3,
        },
    }  # fmt: skip
    return result | changes


def row(epoch: int, process: str, **values: Any) -> dict[str, Any]:
    """A row of metrics.jsonl: the keys that are not given are null."""
    keys = (
        "loss", "test_accuracy", "aux_test_accuracy", "steps", "samples", "busy_seconds", "waiting_seconds",
        "learning_rate", "peak_memory_bytes", "bytes_up", "bytes_down", "socket_up", "socket_down",
    )  # fmt: skip
    return {"epoch": epoch, "process": process, **dict.fromkeys(keys), **values}


def example_metrics(accuracies: tuple[float, ...] = (0.61, 0.9731)) -> list[dict[str, Any]]:
    rows = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        client = {"bytes_up": 1_500_000, "bytes_down": 2_000, "socket_up": 1_600_000, "socket_down": 4_000}
        rows += [
            row(epoch, "server", loss=1.75 / epoch, test_accuracy=accuracy, busy_seconds=3.5, peak_memory_bytes=5e6),
            row(epoch, "client-0", loss=1.9 / epoch, aux_test_accuracy=0.4, peak_memory_bytes=epoch * 1e6, **client),
            row(epoch, "client-1", loss=2.1 / epoch, aux_test_accuracy=0.5, peak_memory_bytes=epoch * 2e6, **client),
        ]
    return rows


def make_run(folder: Path, result: dict[str, Any] | None, metrics: list[dict[str, Any]], **config: Any) -> Path:
    folder.mkdir()
    settings = {
        "method": "decoupled" if result is None else result["method"],
        "data": {"name": "digits"},
        "train": {"epochs": 2, "lr": 0.05, "seed": 5},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


def cells(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table by heading."""
    headings, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in markdown.splitlines())
    return [dict(zip(headings, line, strict=True)) for line in rows]


def terminal(results: list[dict[str, Any]], width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(tables.rich_table(results))
    return console.export_text()


# Tables


def test_every_cell_of_a_row() -> None:
    assert cells(tables.markdown_table([example_result()])) == [
        {
            "method": "decoupled",
            "test accuracy %": "97.31",
            "aux accuracy %": "95.12",
            "bytes up MB": "41.71",
            "bytes down MB": "0.096",
            "socket up MB": "42.34",  # 42.345 is a little less in binary
            "socket down MB": "0.123",
            "client peak memory MB": "21.50",
            "server peak memory MB": "35.25",
            "one process peak memory MB": "48.75",
            "training time s": "12.3",
        }
    ]


def test_seeds_become_mean_and_standard_deviation() -> None:
    seeds = [example_result(seed=seed, test_accuracy=a) for seed, a in enumerate((0.90, 0.92, 0.97))]
    seeds[1]["aux_test_accuracy"] = None
    (line,) = cells(tables.markdown_table(seeds))
    assert line["seeds"] == "0–2"
    assert line["test accuracy %"] == "93.00 ± 3.61"  # √((9 + 1 + 16) / 2) = 3.606; divided by 3 it were 2.94
    assert line["aux accuracy %"] == "95.12 ± 0.00 (n=2)"


def test_seeds_are_listed() -> None:
    """In the rows, where one is not for all, else with what all rows share."""
    one, two = [example_result(seed=0)], [example_result(method="conventional", seed=s) for s in (5, 1, 0, 3, 2)]
    assert [line["seeds"] for line in cells(tables.markdown_table(one + two))] == ["0", "0–3, 5"]
    assert [line["seeds"] for line in cells(tables.markdown_table(one + two[:1]))] == ["0", "5"]
    assert "seeds" not in cells(tables.markdown_table(one + two[2:3]))[0]
    assert tables.settings_line(one + two[2:3]).endswith(", seed 0")
    assert "seed" not in tables.settings_line(one + two)


def test_settings_that_differ_are_rows_and_columns() -> None:
    many = example_result(clients=3, codec="fp16", peak_memory_bytes={"client": [4e6, 9e6, 5e6], "server": None})
    lines = cells(tables.markdown_table([example_result(), many, example_result(cut="conv_1")]))
    assert [(line["cut"], line["clients"], line["codec"]) for line in lines] == [
        ("conv_2", "1", "none"), ("conv_2", "3", "fp16"), ("conv_1", "1", "none"),
    ]  # fmt: skip
    assert lines[1]["client peak memory MB"] == "9.000"  # the largest client
    assert lines[1]["server peak memory MB"] == "–"


def test_centralized_has_no_cut_clients_or_codec() -> None:
    nothing = {"up": {"activations": 0}, "down": {"gradients": 0}, "socket_up": None, "socket_down": None}
    memory: dict[str, Any] = {"client": [], "server": None, "colocated": 66e6}
    central = example_result(method="centralized", bytes=nothing, peak_memory_bytes=memory, aux_test_accuracy=None)
    line = cells(tables.markdown_table([example_result(clients=2), example_result(), central]))[2]
    assert {key: line[key] for key in ("clients", "bytes up MB", "socket up MB", "aux accuracy %")} == {
        "clients": "–", "bytes up MB": "0", "socket up MB": "–", "aux accuracy %": "–",
    }  # fmt: skip
    assert (line["client peak memory MB"], line["one process peak memory MB"]) == ("–", "66.00")


def test_terminal_table_fits_and_takes_no_markup() -> None:
    results = [example_result(method=m, seed=s, clients=2) for m in ("decoupled", "conventional") for s in (1, 2)]
    big = {"up": {"activations": 81_920_000_000}, "down": {"gradients": 81_920_000_000}}
    results[2]["bytes"] = results[3]["bytes"] = big | {"socket_up": 82_000_000_000, "socket_down": 82_000_000_000}
    text = terminal([*results, example_result(method="[red]", clients=2)])
    assert max(map(len, text.splitlines())) <= 80
    words = text.split()
    for word in ("conventional", "81,920", "97.31", "[red]", "12.3", "accuracy"):
        assert word in words
    assert "clients 2," in text  # one round of an epoch is usual, and not said


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (12.344, "12.34"), (81920.4, "81,920"), (0.0123449, "0.01234"), (None, "–"), (float("nan"), "nan")],
)
def test_significant(value: float | None, text: str) -> None:
    assert tables.significant(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (0.0001, "<0.001"), (0.25, "0.250"), (1638.4, "1,638")])
def test_amount(value: float, text: str) -> None:
    assert tables.amount(value) == text


def test_rows_of_a_benchmark() -> None:
    rows = [{"case": "a|b", "decoupled_over_bound": 1.04567, "n": 5}, {"case": "<b>", "n": 12_000, "exact": True}]
    assert tables.markdown_rows(rows).splitlines() == [
        "| case | decoupled over bound | n | exact |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 1.046 | 5 | – |",
        "| &lt;b> | – | 12,000 | yes |",
    ]


# Reading run folders


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", example_result(), example_metrics()))
    assert run.result == example_result() | {"task": None}  # which it did not have yet
    assert (len(run.metrics), run.notes) == (6, [])
    assert run.settings["train.lr"] == 0.05
    assert by_epoch(run, "server", "test") == {1: 0.61, 2: 0.9731}
    assert by_epoch(run, "client", "aux_test") == {1: pytest.approx(0.45), 2: pytest.approx(0.45)}


def test_unfinished_and_cut_off(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "killed", None, example_metrics(), runtime="processes")
    text = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(text[:-9])
    run = read_run(folder)
    assert run.notes == [
        "line 6 of metrics.jsonl is cut off and was left out",
        "unfinished: there is no result.json; the last epoch in metrics.jsonl is 2",
    ]
    (line,) = cells(tables.markdown_table([summary(run)]))
    assert line == {"method": "decoupled (unfinished)", "test accuracy %": "97.31", "aux accuracy %": "40.00"}
    page = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "killed</strong>: unfinished: there is no result.json" in page


@pytest.mark.parametrize("key", ["method", "seconds.server_waiting", "bytes.up.weights", "environment.torch"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    result = example_result()
    *outer, last = key.split(".")
    inside = result
    for name in outer:
        inside = inside[name]
    folder = make_run(tmp_path / "a", result, [])
    del inside[last]
    (folder / "result.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match=re.escape(f"result.json: expected the key '{key}', found none; remove the")):
        read_run(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "expected a run folder, found no config.yaml in it; give a folder written by"),
        ("config.yaml", "a: [", "config.yaml: expected YAML, found "),
        ("config.yaml", "- a", "config.yaml: expected keys and values, found list; restore"),
        ("result.json", '{"method": ', "result.json: expected JSON, found "),
        ("result.json", '{"test_accuracy": NaN}', "result.json: expected JSON, found NaN, which is not a JSON number"),
        ("metrics.jsonl", '{"epoch"\n{"epoch": 1, "process": "server"}\n', "metrics.jsonl:1: expected a JSON row"),
        ("metrics.jsonl", '{"epoch": 1}\n', "metrics.jsonl:1: expected 'epoch' (a whole number) and 'process'"),
        ("metrics.jsonl", '{"epoch": 1, "process": "server", "loss": "low"}\n', "loss: expected a number or null"),
    ],
)
def test_bad_folders(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = make_run(tmp_path / "a", example_result(), example_metrics())
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_word_in_the_place_of_a_number(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", example_result(train_seconds="long"), [])
    with pytest.raises(InputError, match="train_seconds: expected a number or null, found 'long'"):
        read_run(folder)


# Decoupled beside conventional


class Runs:
    """Run folders with what `beside` looks at: 60 MB up, and for conventional as much down."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, list[Path]()

    def add(self, method: str, seed: int, accuracy: float, *, cut: str = "a", lr: float = 0.05, memory: float = 50e6,
            hardware: str = "Sparrow 9000", **changes: Any) -> None:  # fmt: skip
        back = 60_000_000 if method == "conventional" else 0
        result = example_result(
            method=method, seed=seed, test_accuracy=accuracy, cut=cut,
            bytes={
                "up": {"activations": 60_000_000, "labels": 0, "weights": 0, "other": 0},
                "down": {"gradients": back, "weights": 0, "other": 0}, "socket_up": None, "socket_down": None,
            },
            peak_memory_bytes={"client": [], "server": None, "colocated": memory},
        ) | changes  # fmt: skip
        result["environment"] = result["environment"] | {"hardware": hardware}
        self.paths.append(make_run(self.folder / str(len(self.paths)), result, [], train={"lr": lr, "seed": seed}))

    def cells(self) -> list[dict[str, str]]:
        return [row.cells for row in beside(make_series([read_run(path) for path in self.paths]))]


def test_decoupled_stands_beside_conventional_seed_by_seed(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.add("conventional", 2, 0.50, cut="elsewhere")  # comes first, and yields to the same cut
    for seed, accuracy in ((1, 0.90), (2, 0.92)):
        runs.add("conventional", seed, accuracy, memory=80e6, train_seconds=10.0)
    for seed, accuracy, joint in ((1, 0.91, 0.93), (2, 0.925, 0.94), (3, 0.1, 0.1)):  # conventional has no seed 3
        own = {"replay": 3, "head": "tail", "micro_batch": 32, "every": 2, "budget": 9, "merge": 2}
        runs.add("decoupled", seed, accuracy, joint_test_accuracy=joint, train_seconds=12.0, **own)
    assert runs.cells() == [
        {
            "accuracy": "+0.75 ± 0.35", "accuracy with its head": "+2.50 ± 0.71", "bytes": "−50.0 %",
            "one process memory": "−37.5 %", "time": "+20.0 %",
        },
    ]  # fmt: skip
    page = write_report(runs.paths, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("Decoupled beside conventional", "<td>+2.50 ± 0.71</td>", "<td>up to −58 %</td>"))
    alone = write_report(runs.paths[3:], tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "Decoupled beside conventional" not in alone


def test_runs_of_one_seed_count_as_one(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for accuracy in (0.90, 0.80):
        runs.add("conventional", 1, accuracy)
    for accuracy in (0.91, 0.93):
        runs.add("decoupled", 1, accuracy)
    assert runs.cells()[0]["accuracy"] == "+7.00"


def test_other_settings_are_not_compared(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.add("conventional", 1, 0.90)
    runs.add("decoupled", 2, 0.95, epochs=2)  # no such seed
    runs.add("decoupled", 1, 0.95, lr=0.1)
    runs.add("decoupled", 1, 0.95, epochs=3)
    runs.add("decoupled", 1, 0.95, retrained_from="0")
    runs.add("decoupled", 1, 0.95, edge_cut="b")  # a chain's lower link
    unfinished = make_run(tmp_path / "killed", None, example_metrics(), train={"lr": 0.05, "seed": 1, "epochs": 2},
                          data={"name": "digits"}, model={"name": "digits-cnn", "cut": "a"})  # fmt: skip
    runs.paths.append(unfinished)
    assert runs.cells() == []


def test_a_conventional_training_that_was_cut_elsewhere_has_its_accuracy_only_where_the_cut_does_not_matter(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings: list[dict[str, Any]] = [{}, {"codec": "none+zstd"}, {"codec": "int8"}, {"clients": 2}, {"lr_scale": 2.0}]
    for same in settings:
        runs.add("conventional", 1, 0.90, cut="a", **same)
        runs.add("decoupled", 1, 0.92, cut="b", **same)
    assert runs.cells() == 2 * [{"accuracy": "+2.00"}]


def test_memory_and_time_are_of_one_kind_of_machine(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    apart: dict[str, Any] = {"client": [40e6, 10e6], "server": 30e6, "colocated": None}
    runs.add("conventional", 1, 0.90, peak_memory_bytes=apart)
    runs.add("decoupled", 1, 0.91, peak_memory_bytes=apart | {"client": [10e6, 20e6]})
    runs.add("conventional", 1, 0.90, epochs=3)
    runs.add("decoupled", 1, 0.91, epochs=3, hardware="Wren 1")
    assert runs.cells() == [
        {"accuracy": "+1.00", "bytes": "−50.0 %", "client memory": "−50.0 %", "server memory": "+0.0 %", "time": "+0.0 %"},
        {"accuracy": "+1.00", "bytes": "−50.0 %"},
    ]


def test_retrained_and_older_centralized_runs_in_tables() -> None:
    """A retrained server half is no further seed; what centralized training has not does not tell its runs apart."""
    again = example_result(retrained_from="runs/first")
    assert [line["method"] for line in cells(tables.markdown_table([example_result(), again]))] == ["decoupled", "decoupled (retrained)"]
    old = example_result(method="centralized", runtime="local", clients=0, cut=None, seed=1)
    new = example_result(method="centralized", runtime=None, clients=None, cut=None, seed=2)
    assert len(cells(tables.markdown_table([old, new]))) == 1


# The report


def test_data_that_only_the_clients_know_have_no_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", example_result(dataset=None), example_metrics())
    page = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>decoupled on the clients&#39; own data</h1>" in page
    assert terminal([summary(read_run(run))])


def test_runs_with_the_same_name_are_all_drawn(tmp_path: Path) -> None:
    accuracies = {"killed-1": (0.1234, 0.5), "killed-2": (0.2345, 0.5)}
    runs = [make_run(tmp_path / name, None, example_metrics(found)) for name, found in accuracies.items()]
    assert [one.label for one in make_series([read_run(run) for run in runs])] == 2 * ["decoupled (unfinished)"]
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<th scope="row"[^>]*>decoupled \(unfinished\)</th>', text)) == 2
    assert "Means over the seeds" not in text
    assert all(f"<td>{percent}</td>" in text for percent in ("12.34", "23.45"))


def test_many_series_have_a_panel_for_each_setting(tmp_path: Path) -> None:
    """Nine series: two methods at four cuts, and one without a cut, which is beside all of them."""
    runs = []
    for number, (cut, method) in enumerate(product("abcd", ("decoupled", "conventional"))):
        result = example_result(method=method, cut=cut)
        runs.append(make_run(tmp_path / f"{number}", result, example_metrics(), model={"cut": cut}))
    runs.append(make_run(tmp_path / "whole", example_result(method="centralized"), example_metrics()))
    series = make_series([read_run(run) for run in runs])
    assert panels(series) == [(f"cut {cut}", [2 * n, 2 * n + 1, 8]) for n, cut in enumerate("abcd")]
    assert panels(series[:7]) == [("", list(range(7)))]
    assert [name for name, _ in legend(series)] == ["decoupled", "conventional", "centralized"]
    assert len(set(looks(series))) == 3
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f">cut {cut}</text>" in text for cut in "abcd")


def test_a_report_needs_no_setting_that_came_later(tmp_path: Path) -> None:
    result = example_result()
    del result["validation"], result["micro_batch"]
    run = read_run(make_run(tmp_path / "old", result, example_metrics(), train={"micro_batch": 32}))
    assert run.result is not None
    assert (run.result["validation"], run.result["micro_batch"]) == (None, 32)
    del result["merge"]
    older = read_run(make_run(tmp_path / "older", result, example_metrics()))
    groups = [[read.result] for read in (older, run) if read.result is not None]
    groups[1][0]["merge"] = 4
    assert tables.names(groups)[1] == ("decoupled", {"merge": "4", "micro_batch": "32"})
    assert "merge" not in tables.shared_settings(groups)


def test_an_axis_may_be_called_like_a_field_of_a_result() -> None:
    rows = [example_result(training=f"a-{name}-seed_0", settings={"training": name}) for name in ("x", "y")]
    assert [settings for _, settings in tables.names([[row] for row in rows])] == [{"training": "x"}, {"training": "y"}]


def test_a_setting_that_is_off_in_one_run_tells_it_from_another() -> None:
    runs = [example_result(), example_result(micro_batch=32), example_result(validation=100), example_result(method="conventional")]
    groups = tables.group_seeds(runs, lambda result: result)
    assert [tables.label(*name) for name in tables.names(groups)] == ["decoupled", "decoupled · micro_batch 32", "decoupled · validation 100", "conventional"]
    line = tables.settings_line(runs)
    assert not any(word in line for word in ("validation", "micro_batch", "budget", "off"))
    assert "| decoupled | off | 32 |" in tables.markdown_table(runs)
    alone = tables.settings_line([example_result(micro_batch=32), example_result(method="conventional")])
    assert "micro_batch 32" in alone  # conventional training has none


def test_small_losses_are_drawn_on_a_logarithmic_axis(tmp_path: Path) -> None:
    losses = (1.5, 0.1, 0.01)
    metrics = [
        row(epoch, "server", loss=loss, test_accuracy=0.01 * epoch**4) for epoch, loss in enumerate(losses, start=1)
    ]
    text = write_report([make_run(tmp_path / "a", None, metrics)], tmp_path / "r.html").read_text(encoding="utf-8")
    assert all(f">{tick}</text>" in text for tick in ("0.01", "0.1", "1"))
    assert all(f">{tick}</text>" in text for tick in ("20", "40", "60", "80"))  # accuracies are not


def test_seeds_make_one_curve_and_other_settings_do_not(tmp_path: Path) -> None:
    accuracies = [(0.5, 0.90), (0.6, 0.92), (0.7, 0.97)]
    folders = [
        make_run(tmp_path / f"s{seed}", example_result(seed=seed, test_accuracy=a[-1]), example_metrics(a))
        for seed, a in enumerate(accuracies)
    ]
    other = {"train": {"epochs": 2, "lr": 0.3, "seed": 9}}
    one, two = make_series([read_run(p) for p in [*folders, make_run(tmp_path / "lr", example_result(), [], **other)]])
    assert (one.label, len(one.runs)) == ("decoupled · train.lr 0.05", 3)
    assert (two.label, len(two.runs)) == ("decoupled · train.lr 0.3", 1)
    table = tables.rich_table([*one.results, *two.results])
    assert [str(cell) for cell in table.columns[0].cells] == ["decoupled\ntrain.lr 0.05", "decoupled\ntrain.lr 0.3"]
    first, last = mean_curve(one.runs, "server", "test")
    assert first == (1, pytest.approx(0.6), pytest.approx(0.1))
    assert last == (2, pytest.approx(0.93), pytest.approx(0.0360555))


def test_the_report_holds_every_number(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    page = write_report([make_run(tmp_path / "first", example_result(), example_metrics())], out)
    text = page.read_text(encoding="utf-8")
    claimed = "97.31 95.12 61.00 45.00 41.00 0.620 0.083 0.007 41.71 0.091 0.005 0.096 42.34 0.123"
    claimed += " 21.50 35.25 48.75 9.500 1.250 7.750 4.500 12.3 1.750 0.8750 1.000"
    outside_figures = re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    for number in claimed.split():
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", outside_figures), number
    for word in ("digits-cnn", "conv_2", "c0ffee1", "3.12.9", "2.13.0", "Sparrow 9000", "threads: 3", "lr: 0.05"):
        assert word in text
    assert page == out


def test_the_report_stands_alone_and_escapes(tmp_path: Path) -> None:
    evil = '<script>alert("$x$")</script>'
    null = {"client_busy": None, "client_waiting": None, "server_busy": None, "server_waiting": None}
    runs = [
        make_run(tmp_path / "plain", example_result(seconds=null), example_metrics()),
        make_run(tmp_path / "evil", example_result(method=evil, aux_test_accuracy=None), example_metrics()),
        make_run(tmp_path / "empty", None, []),
    ]
    text = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert set(re.findall(r'\S*https?://[^\s"<>]*', text)) == {
        'xmlns="http://www.w3.org/2000/svg', 'xmlns:xlink="http://www.w3.org/1999/xlink',
    }  # fmt: skip
    assert not re.search(r"@import|@font-face|url\((?!#)|\bsrc=|<link", text)
    assert len(re.findall(r'<div role="img" aria-label="[^"]{50,}"><svg', text)) == text.count("<svg") == 6
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_local_and_centralized_runs_are_drawn(tmp_path: Path) -> None:
    none: dict[str, Any] = {"up": {"activations": 0, "labels": 0, "weights": 0, "other": 0}}
    none |= {"down": {"gradients": 0, "weights": 0, "other": 0}, "socket_up": None, "socket_down": None}
    memory: dict[str, Any] = {"client": [], "server": None, "colocated": 17_250_000}
    result = example_result(method="centralized", runtime="local", bytes=none, peak_memory_bytes=memory)
    result |= {"cut": None, "head": None, "codec": None, "topology": None, "aux_test_accuracy": None}
    metrics = [row(1, "whole", loss=0.625, test_accuracy=0.8125, aux_test_accuracy=None)]
    text = write_report([make_run(tmp_path / "c", result, metrics)], tmp_path / "r.html").read_text(encoding="utf-8")
    for number in ("17.25", "0.6250", "81.25"):
        assert number in text
    assert "Dashed" not in text


def test_report_refuses_nothing_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="report: expected at least one run folder, found none; name a folder"):
        write_report([], tmp_path / "r.html")
    folder = make_run(tmp_path / "a", example_result(), [])
    with pytest.raises(InputError, match=r"out: expected a file, found a folder at .*; name a file"):
        write_report([folder], tmp_path)


# The README's tables


@pytest.fixture(scope="module")
def fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill_tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A small repository: a README with two marked places, and results for them."""
    (tmp_path / "results").mkdir()
    environment = {"commit": "c0ffee1", "hardware": "Sparrow 9000", "torch": "2.13.0"}
    for name, rows in (("train", [example_result()]), ("step", [{"case": "local", "local_over_bare": 1.0312}])):
        content = {"environment": environment, "command": f"make {name}", "rows": rows}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))
    place = "<!-- table: results/{}.json -->\n{}<!-- end table -->\n"
    (tmp_path / "README.md").write_text("# A\n" + place.format("train", "old\n") + "\nB\n" + place.format("step", ""))
    return tmp_path


def test_marked_places_are_filled(fill: ModuleType, pages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill.main(["--check"], root=pages) == 1
    assert "README.md: its tables are not those of results/" in capsys.readouterr().err
    assert "old" in (pages / "README.md").read_text()
    assert fill.main([], root=pages) == 0
    text = (pages / "README.md").read_text(encoding="utf-8")
    assert tables.markdown_table([example_result()]) in text
    assert "| case | local over bare |\n| --- | ---: |\n| local | 1.031 |\n" in text
    assert "`make train`; commit c0ffee1; Sparrow 9000; torch 2.13.0." in text
    assert "old" not in text
    assert text.count("<!-- end table -->") == 2
    assert fill.main(["--check"], root=pages) == 0


def test_a_place_may_ask_for_trainings_with_several_seeds(fill: ModuleType, pages: Path) -> None:
    rows = [example_result(seed=seed, settings={"training": name}) for name, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 0))]
    file = pages / "results" / "train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": rows}))
    (pages / "README.md").write_text("<!-- table: results/train.json, trained with 2 seeds or more -->\n<!-- end table -->\n")
    assert fill.main([], root=pages) == 0
    assert tables.markdown_table(rows[:2]) in (pages / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "<!-- table: results/none.json -->\n<!-- end table -->\n",
            "results/none.json: expected a results file, found none; run the benchmark that writes it",
        ),
        (
            "<!-- table: results/step.json -->\nno end\n",
            "expected 'table: results/NAME.json' up to 'end table', found '<!-- table: results/step.json -->' alone",
        ),
    ],
)
def test_places_that_cannot_be_filled(
    fill: ModuleType, pages: Path, capsys: pytest.CaptureFixture[str], page: str, message: str
) -> None:
    (pages / "docs").mkdir()
    (pages / "docs" / "a.md").write_text(page)
    assert fill.main([], root=pages) == 1
    assert f"docs/a.md: {message}" in capsys.readouterr().err
    assert (pages / "docs" / "a.md").read_text() == page
    assert "1.031" in (pages / "README.md").read_text(encoding="utf-8")


def test_the_pages_of_this_repository_are_up_to_date(fill: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert fill.main(["--check"]) == 0, capsys.readouterr().err


def test_a_metric_that_is_no_share_leads_tables_and_curves(tmp_path: Path) -> None:
    told: dict[str, Any] = {
        "task": "regression", "metric": "rmse", "metric_unit": "", "higher_is_better": False, "test_accuracy": None,
        "aux_test_accuracy": None, "test": {"rmse": 0.4321, "r2": 0.5}, "aux_test": {"rmse": 0.5, "r2": 0.4},
        "sites": [{"client": 0, "samples": 64, "test": {"rmse": 0.25}}, {"client": 1, "samples": 9, "test": {"rmse": None}}],
    }  # fmt: skip
    line = {"metric": "rmse", "metric_unit": "", "test": {"rmse": 0.4321}}
    make_run(tmp_path / "a", example_result(**told), [row(1, "server", loss=0.5, **line)])
    page = render([read_run(tmp_path / "a")])
    for words in ("test rmse", "0.4321", "Test rmse", "rmse 0.4321", "<th scope=\"row\">client 0</th><td>64</td><td>0.2500</td>", "client 1</th><td>9</td><td>–</td>"):
        assert words in page, words
    assert "test accuracy" not in page
    del told["metric"]
    assert tables.score(told) is None
