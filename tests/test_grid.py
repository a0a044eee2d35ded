"""`paper`: a grid of trainings from one file, resumed where it stopped."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from runtimes import rows_of

from halfpass.commands.cli import main
from halfpass.commands.grid import choose, read_grid
from halfpass.errors import InputError, RunError
from halfpass.files import alone_in
from halfpass.run.records import RunFolder
from halfpass.run.train import train

ROOT = Path(__file__).resolve().parents[1]
GRID = """
settings: {data.limit: 200, train.epochs: 1, train.batch_size: 50, train.threads: 1, clients.topology: independent}
seeds: [3, 4]
axes:
  recipe:
    slow: {train.lr: 0.01}
    fast: {train.lr: 0.1, train.schedule: constant}
  clients:
    1: {}
    2: {clients.count: 2, seeds: [3]}
  method:
    decoupled: {method: decoupled}
    conventional: {method: conventional}
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    return tmp_path / "grid.yaml"


def test_every_combination_and_seed_once_seeds_outermost(grid, tmp_path):
    members = read_grid(grid, tmp_path, {"train.epochs": 7})
    assert [member.name for member in members[:3]] == [
        "slow-1-decoupled-seed_3", "slow-1-conventional-seed_3", "slow-2-decoupled-seed_3",
    ]  # fmt: skip
    assert len(members) == 8 + 4
    assert {member.choices["seed"] for member in members[8:]} == {"4"}
    assert {member.choices["clients"] for member in members[8:]} == {"1"}
    one = next(member for member in members if member.name == "fast-2-conventional-seed_3").config
    assert (one.train.lr, one.train.schedule, one.clients.count, one.method) == (0.1, "constant", 2, "conventional")
    assert (one.train.seed, one.train.epochs, one.data.limit) == (3, 7, 200)


def test_only_takes_any_choice_of_an_axis_that_comes_twice(grid, tmp_path):
    members = read_grid(grid, tmp_path, {})
    wanted = ["seed=3", "seed=4", "clients=1", "method=decoupled"]
    assert [m.name for m in choose(members, wanted)] == [
        "slow-1-decoupled-seed_3", "fast-1-decoupled-seed_3", "slow-1-decoupled-seed_4", "fast-1-decoupled-seed_4",
    ]  # fmt: skip
    assert [m.name for m in choose(members, wanted[1:])] == ["slow-1-decoupled-seed_4", "fast-1-decoupled-seed_4"]


def test_the_grids_that_halfpass_ships_are_the_paper_s():
    full = read_grid(ROOT / "examples/paper/full.yaml", Path("runs"), {})
    small = read_grid(ROOT / "examples/paper/small.yaml", Path("runs"), {})
    assert len(full) == 2 * 2 * 3 * 2 * (3 + 1 + 1)
    assert len(small) == 3 * 2 * (3 + 1)
    middle = {member.config.model.cut for member in full if member.choices["cut"] == "middle"}
    assert middle == {"stage_2.7"}  # 18 + 8 = 26 blocks below it
    authors = {(m.config.train.lr, m.config.train.epochs, m.config.train.schedule) for m in full if m.choices["recipe"] == "authors"}
    assert authors == {(0.001, 50, "constant")}


def test_a_grid_is_trained_resumed_and_reported(grid, tmp_path, capsys):
    out, results = tmp_path / "runs", tmp_path / "rows.json"
    words = ["paper", str(grid), "--out", str(out), "--results", str(results), "--only", "clients=1", "method=decoupled"]
    assert main([*words, "seed=3", "recipe=slow"]) == 0
    assert "0 of 1 trainings are there already" in capsys.readouterr().err
    kept = (out / "slow-1-decoupled-seed_3" / "result.json").stat().st_mtime_ns
    (out / "fast-1-decoupled-seed_3").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (out / "fast-1-decoupled-seed_3" / name).write_text("broken off")
    assert main([*words, "seed=3"]) == 0
    said = capsys.readouterr()
    assert "1 of 2 trainings are there already" in said.err
    assert "1 of 1: fast-1-decoupled-seed_3: " in said.err
    assert (out / "slow-1-decoupled-seed_3" / "result.json").stat().st_mtime_ns == kept
    for chosen in ([], ["recipe=fast"]):  # what was trained before stays in the file
        assert main([*words, "seed=3", *chosen]) == 0
        rows = json.loads(results.read_text())["rows"]
        assert [(row["seed"], row["settings"]) for row in rows] == [(3, {"recipe": "slow"}), (3, {"recipe": "fast"})]
    assert (out / "report.html").is_file()
    assert main([*words, "seed=3", "--set", "train.lr=0.5"]) == 2
    assert "expected a training with train.lr 0.5, found one with 0.01; choose another folder for the runs" in capsys.readouterr().err


def test_a_training_that_was_broken_off_is_gone_on_with(grid, tmp_path, monkeypatch, capsys):
    """Unless its settings are others by now; then it is left alone. One without a whole epoch begins anew, its store
    too."""
    grid.write_text(GRID.replace("train.epochs: 1,", f"train.epochs: 3, server.store: {tmp_path / 'kept'},"))
    words = ["paper", str(grid), "--out", str(tmp_path / "runs"), "--only", "clients=1", "method=decoupled", "seed=3", "recipe=slow"]
    folder = tmp_path / "runs" / "slow-1-decoupled-seed_3"
    (member,) = choose(read_grid(grid, tmp_path / "runs", {}), words[5:])
    keep = RunFolder.save_checkpoint

    def broken_off(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    for has_state in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_checkpoint", broken_off)
            with pytest.raises(KeyboardInterrupt):
                train(member.config)
        first = [row["busy_seconds"] for row in rows_of(folder)]
        if has_state:
            assert main([*words, "--set", "train.momentum=0.8"]) == 2
            assert "expected a training with train.momentum 0.8, found one with 0.9" in capsys.readouterr().err
        else:
            (folder / "unfinished.pt").unlink()
        assert main(words) == 0
        rows = rows_of(folder)
        assert len(rows) == 2 * 3
        assert ([row["busy_seconds"] for row in rows[:2]] == first) == has_state
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "kept")


def test_settings_may_be_nested_and_choices_do_not_leak(grid, tmp_path):
    grid.write_text(GRID.replace("train.epochs: 1,", "train: {epochs: 1, weight_decay: 1e-3}, server.store: kept,").replace("{train.lr: 0.01}", "{train: {lr: 0.01}}"))
    slow, fast = (member.config for member in read_grid(grid, tmp_path, {"train": {"momentum": 0.5}}) if member.name.endswith("1-decoupled-seed_3"))
    assert (slow.train.lr, fast.train.lr, slow.train.schedule, fast.train.schedule) == (0.01, 0.1, "one-cycle", "constant")
    assert {(c.train.epochs, c.train.weight_decay, c.train.momentum) for c in (slow, fast)} == {(1, 0.001, 0.5)}
    assert slow.server.store == "kept/slow-1-decoupled-seed_3"


def test_a_training_that_fails_takes_nothing_from_the_others(grid, tmp_path, capsys):
    grid.write_text(GRID.replace("{train.lr: 0.01}", "{train.lr: 1e30}"))
    words = ["paper", str(grid), "--out", str(tmp_path / "runs"), "--jobs", "1", "--only", "clients=1", "method=decoupled", "seed=3"]
    assert main([*words, "recipe=fast"]) == 0
    (tmp_path / "runs" / "report.html").unlink()
    assert main(words) == 1
    said = capsys.readouterr()
    assert "expected a finite loss" in said.err
    assert (tmp_path / "runs" / "report.html").is_file()


def test_one_grid_at_a_time_in_a_folder(grid, tmp_path, capsys):
    with alone_in(tmp_path / "runs"):
        assert main(["paper", str(grid), "--out", str(tmp_path / "runs")]) == 2
    assert "runs: expected no other training at work in it, found one; wait for it" in capsys.readouterr().err
    with alone_in(tmp_path / "runs"):
        pass


def test_a_folder_that_holds_no_training_is_not_removed(grid, tmp_path):
    mine = tmp_path / "runs" / "slow-1-decoupled-seed_3" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert main(["paper", str(grid), "--out", str(tmp_path / "runs"), "--only", "clients=1", "method=decoupled", "seed=3", "recipe=slow"]) == 0
    assert mine.read_text() == "mine"


def test_a_folder_in_a_store_s_place_that_is_no_store_is_not_removed(grid, tmp_path, monkeypatch):
    """Though what is left of a training that began no epoch is, and its store with it; none is started here."""
    grid.write_text(GRID.replace("train.epochs: 1,", f"train.epochs: 1, server.store: {tmp_path / 'kept'},"))
    run, mine = (tmp_path / part / "slow-1-decoupled-seed_3" / name for part, name in (("runs", "config.yaml"), ("kept", "mine.txt")))
    for file in (run, mine):
        file.parent.mkdir(parents=True)
        file.write_text("mine")
    ended = SimpleNamespace(status=lambda: 1, failure=lambda: RunError("store", "an empty folder", "other files", "see there"))
    monkeypatch.setattr("halfpass.commands.grid.Child", lambda *arguments, **options: ended)
    assert main(["paper", str(grid), "--out", str(tmp_path / "runs"), "--only", "clients=1", "method=decoupled", "seed=3", "recipe=slow"]) == 1
    assert run.read_text() != "mine"
    assert mine.read_text() == "mine"


def test_a_training_that_fails_does_not_stop_the_others(grid, tmp_path, capsys):
    text = grid.read_text().replace("train.lr: 0.1,", "train.lr: 1.0e+20,")
    grid.write_text(text)
    words = ["paper", str(grid), "--out", str(tmp_path / "runs"), "--only", "clients=1", "method=decoupled", "seed=3"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "fast-1-decoupled-seed_3: " in said
    assert "halfpass: grid: expected 2 trainings to their end, found 1 that failed: fast-1-decoupled-seed_3; see above" in said
    assert (tmp_path / "runs" / "slow-1-decoupled-seed_3" / "result.json").is_file()


@pytest.mark.parametrize(("change", "said"), [
    (("seeds: [3, 4]", ""), "expected settings, seeds and axes, found settings, axes;"),
    (("seeds: [3, 4]", "seeds: []"), "grid.yaml, seeds: expected a list of at least one, found []"),
    (("seeds: [3]", "seeds: 3"), "grid.yaml, clients 2, seeds: expected a list of at least one, found 3"),
    (("method:\n    decoupled: {method: decoupled}\n    conventional: {method: conventional}", "method: 3"), "grid.yaml, method: expected choices by name, found 3"),
    ((GRID[GRID.index("axes:"):], "axes: []"), "grid.yaml, axes: expected axes by name, found []"),
    (("slow: {train.lr: 0.01}", "slow: 0.01"), "grid.yaml, recipe slow: expected settings by name, found 0.01"),
    (("train.lr: 0.01", "train.rl: 0.01"), "slow-1-decoupled-seed_3: configuration: expected a known key, found 'train.rl'; did you mean 'train.lr'?"),
    (("train.lr: 0.01", "train.lr: -1"), "slow-1-decoupled-seed_3: train.lr: expected a number of at least 0, found -1"),
    (("settings:", "[settings:"), "grid.yaml: expected YAML, found"),
    (("train.lr: 0.01", "out: here"), "grid.yaml: expected settings other than the seed and the folder, found out;"),
    (("train.lr: 0.01", "train: {seed: 1}"), "grid.yaml: expected settings other than the seed and the folder, found train.seed;"),
    (("    2: {", "    a/1: {}\n    a_1: {"), "grid.yaml: expected another name for every training, found slow-a_1-decoupled-seed_3 twice;"),
    (("train.lr: 0.01", "train.epochs: 2.5"), "slow-1-decoupled-seed_3: train.epochs: expected a whole number, found 2.5"),
    (("train.lr: 0.01", "train.lr: fast"), "slow-1-decoupled-seed_3: train.lr: expected a number, found 'fast'"),
    (("train.lr: 0.01", "train.nesterov: 1"), "slow-1-decoupled-seed_3: train.nesterov: expected true or false, found 1"),
    (("train.lr: 0.01", "data.limit: true"), "slow-1-decoupled-seed_3: data.limit: expected a whole number or null, found True"),
    (("train.lr: 0.01", "model.cut: 2"), "slow-1-decoupled-seed_3: model.cut: expected text or null, found 2"),
])  # fmt: skip
def test_what_is_no_grid_is_refused(grid, tmp_path, change, said):
    grid.write_text(GRID.replace(*change))
    with pytest.raises(InputError) as caught:
        read_grid(grid, tmp_path, {})
    assert said in str(caught.value)


@pytest.mark.parametrize(("words", "said"), [
    (["nowhere.yaml"], "nowhere.yaml: expected a grid file, found No such file or directory"),
    (["{grid}", "--only", "cut=deep"], "--only: expected an axis of recipe, clients, method, seed, found cut; correct it"),
    (["{grid}", "--only", "recipe=quick"], "--only: expected recipe of fast, slow, found quick"),
    (["{grid}", "--only", "clients=2", "seed=4"], "--only: expected choices that the grid combines, found clients=2 seed=4"),
    (["{grid}", "--set", "train.lr"], "--set: expected NAME=VALUE, found 'train.lr'"),
    (["{grid}", "--set", "model.cut=nowhere"], "model.cut 'nowhere': expected"),
    (["{grid}", "--set", "out=runs"], "expected settings other than the seed and the folder, found out; use seeds, and --out"),
    (["{grid}", "--set", "train.lr=1", "train.lr=2"], "--set: expected train.lr once, found twice; leave one out"),
    (["{grid}", "--set", "data.path=["], "--set: expected a value for data.path, found '[' (while parsing a flow node"),
    (["{grid}", "--results", "{folder}"], "--results: expected a file, found a folder at"),
    (["{grid}", "--out", "{grid}"], "out: expected a folder that can be made, found"),
    (["{grid}", "--jobs", "0"], "--jobs: expected at least 1, found 0"),
])  # fmt: skip
def test_wrong_arguments_write_nothing(grid, tmp_path, capsys, words, said):
    assert main(["paper", "--out", str(tmp_path / "runs"), *(word.format(grid=grid, folder=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
