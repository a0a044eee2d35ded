"""benchmarks/hostile.py in short: strangers are told why, memory stays bounded, and the run goes on."""

import json
import sys
from pathlib import Path

import commands

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import hostile


def started(run, name, words):
    with (run.folder / f"{name}.log").open("ab") as log:
        run.processes[name] = commands.start([*words, f"--out={run.folder / name}"], hostile.ROOT, log.fileno(), log.fileno())


hostile.Run._start = started  # forked, as all commands of tests


def test_a_run_goes_on_beside_a_stranger_whose_messages_are_none(tmp_path):
    assert hostile.main(["--quick", "--only", "garbage", "--out", str(tmp_path / "rows.json"), "--keep", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["got"][0] == "joining: expected a token that the server knows, found another; copy the token from the server"
    assert row["attempts_per_second"] > 0
    assert not row["ended_the_run"]
    assert row["rate_over_undisturbed"] > 0.2  # other tests run beside this one
    assert row["memory_mb_over_undisturbed"] < 100
    assert any("reset by peer" in got or "closed" in got for got in row["got"])  # it is kept out, after some
