"""`halfpass cuts`: what it draws was measured, and what it recommends follows the rule that its page states."""

import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest

from halfpass.commands import cuts
from halfpass.commands.cli import main
from halfpass.networks.cut_table import CutRow

ROW = CutRow("a", ((1,),), 0, 10, 100, 0, 0, 1, 0, 10)


def choice(layer, size, client, server, head=0):
    """FLOPs of a sample."""
    row = dataclasses.replace(ROW, layer=layer, activation_bytes_per_sample=size, client_flops=client,
                              server_flops=server, head_flops=head, head_parameters=None if head is None else 1)  # fmt: skip
    return cuts._choice(row)


CHOICES = [choice("one", 400, 10, 90), choice("two", 100, 30, 70), choice("two.1", 100, 40, 60),
           choice("no head", 50, 45, 55, None), choice("late", 10, 80, 20)]  # fmt: skip


@pytest.mark.parametrize(("afford", "with_head", "taken"), [
    (50, True, "two.1"), (50, False, "no head"), (35, True, "two"), (29, True, "one"), (100, True, "late"), (9, True, None),
])  # fmt: skip
def test_the_rule(afford, with_head, taken):
    found = cuts.recommended(CHOICES, afford, with_head=with_head)
    assert (found and found.row.layer) == taken


def test_what_the_head_computes_is_the_client_s():
    assert choice("x", 1, 30, 50, head=20).client_share == 50
    assert cuts.recommended([choice("x", 1, 30, 50, head=21)], 50, with_head=True) is None


def test_the_advice_says_why_in_numbers():
    taken = cuts.recommended(CHOICES, 50, with_head=True)
    assert cuts.advice(CHOICES, taken, 50) == (
        "take two.1: of the cuts at which the client computes at most 50 % (--afford), it sends the least, 0.1 kB a sample, "
        "and is the latest that does; the client computes 40 %"
    )
    assert cuts.advice(CHOICES, None, 9) == (
        "no cut leaves the client at most 9 % of the computing: the least is one, 10 %; give --afford 11, or another head"
    )
    assert cuts.advice([], None, 9).startswith("no layer can be cut")


def test_bars_are_as_long_as_what_they_show():
    assert cuts._bar(10, 10) == "█" * cuts.BAR + " "
    assert cuts._bar(5, 10).rstrip() == "█" * (cuts.BAR // 2)
    assert len({len(cuts._bar(value, 10)) for value in (0, 0.01, 1, 9.99, 10)}) == 1
    assert cuts._bar(0, 0).strip() == "▏"


def test_a_file_of_settings_is_enough_and_its_run_folder_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("{out: runs/x, train: {epochs: 3}, model: {head: mlp}, clients: {count: 3}}")
    assert main(["cuts", "--config", "run.yaml", "--numbers", "--out", "cuts.svg"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("digits-cnn on digits (1×8×8, 10 classes), head mlp")
    (marked,) = [line for line in said.splitlines() if line.startswith("→ ")]
    layer = re.search(r"take ([\w.]+):", said)[1]
    assert layer in marked
    assert "server MFLOP" in said
    assert [file.name for file in tmp_path.iterdir() if file.name != "run.yaml"] == ["cuts.svg"]
    svg = (tmp_path / "cuts.svg").read_text()
    assert ET.fromstring(svg).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in svg
    assert "block_3" in svg
    assert svg.count("#D55E00".lower()) >= 3  # the recommended row's bars


@pytest.mark.parametrize(("words", "said"), [
    (["--out", "cuts.txt"], "out: expected a file that ends in .svg, .pdf, .png, found cuts.txt; name it so"),
    (["--out", "nowhere.txt/x.svg"], "out: expected a folder, found a file at nowhere.txt; choose another name"),
    (["--afford", "0"], "--afford: expected per cent of the computing, above 0 and at most 100, found 0; correct it"),
    (["--afford", "much"], "afford: expected a number, found 'much'; change it"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_first(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere.txt").write_text("")
    assert main(["cuts", *words]) == 2
    assert capsys.readouterr() == ("", f"halfpass: {said}\n")
