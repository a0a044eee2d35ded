"""What is said while a run goes on: in lines with the time of day, or beside a bar that leaves the counts their room."""

import re

import pytest

from halfpass.config import Config, TrainConfig
from halfpass.run import setup
from halfpass.run.progress import EpochProgress

ROW = {"epoch": 1, "loss": 0.5, "test": {"accuracy": 0.25}, "metric": "accuracy", "metric_unit": "%", "busy_seconds": 1.0, "waiting_seconds": 0.5}


def test_a_line_has_the_time_of_day(capsys):
    with EpochProgress("decoupled", 2, 10) as progress:
        progress.epoch(ROW)
    assert re.fullmatch(r"\d\d:\d\d:\d\d decoupled: epoch 1/2: loss 0.5000, test 25.00 %, 1.5 s\n", capsys.readouterr().err)


@pytest.mark.parametrize("columns", [40, 60, 80, 140])
def test_counts_and_time_left_are_whole_in_every_width(capsys, monkeypatch, columns):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with EpochProgress("conventional", 100, 999) as progress:
        progress.skip(12345)
        progress.epoch(ROW)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "12345/99900" in said
    assert "-:--:--" in said
    assert ("━" in said) == (columns == 140)


@pytest.mark.parametrize(("value", "threads", "expected"), [
    ("3", None, 3), ("3", 2, 2), ("5,2", None, 5), ("none", None, 8), ("0", None, 8), ("99999", None, 8), (None, None, 8),
])  # fmt: skip
def test_omp_num_threads_counts_unless_threads_are_set(monkeypatch, value, threads, expected):
    monkeypatch.setattr(setup, "available_cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False) if value is None else monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert setup.threads_each(Config(train=TrainConfig(threads=threads)), 2) == expected
