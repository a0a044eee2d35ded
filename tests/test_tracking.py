"""`--track`: trackers get every row once, whatever becomes of the run, and the run is the same whatever becomes of them.

The libraries of `halfpass/run/trackers.py` are tried where they are installed. CI installs TensorBoard alone; the others
were tried with the versions of constraints.txt, by `pip install -c constraints.txt mlflow wandb trackio`.
"""

import dataclasses
import json
import struct
from collections import Counter
from pathlib import Path

import pytest

import halfpass.run.local
import halfpass.run.train
from halfpass.commands.cli import main
from halfpass.config import Config, TrackConfig, as_dict, flatten, from_dict, named_code, shared_settings
from halfpass.errors import InputError
from halfpass.files import write_json
from halfpass.run import tracking
from halfpass.run.records import RunFolder
from halfpass.run.tracking import Tracks, check, measures, outcome
from halfpass.run.train import compare, resume, tracked_together, train

SMALL = {
    "data.limit": 64, "train.batch_size": 32, "train.epochs": 3, "train.threads": 1, "clients.count": 2, "train.test_every": 3,
}  # fmt: skip
ROWS = [
    {"epoch": epoch, "process": process, "loss": 1 / epoch, "test": {"accuracy": 0.5, "f1": None}, "test_accuracy": 0.5, "metric": "accuracy"}
    for epoch in (1, 2, 3) for process in ("client-0", "server")
]  # fmt: skip


def settings(folder, to, **more):
    return from_dict({**SMALL, "track.to": to, "out": str(folder), **more})


def notes(folder):
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("runtime", ["local", "processes"])
def test_one_of_ones_own_gets_settings_rows_and_result(tmp_path, runtime, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)  # where a server's process finds it
    config = settings(tmp_path / "run", "own_trackers:Notes", runtime=runtime)
    result = train(config)
    (first, started), *told, (last, finished) = notes(tmp_path / "run")
    assert (first, last, finished) == ("start", "finish", json.loads(json.dumps(result)))
    assert started["train.lr"] == config.train.lr
    assert [row for _, row in told] == lines(tmp_path / "run")
    assert Counter(row["process"] for _, row in told) == {"client-0": 3, "client-1": 3, "server": 3}


def test_one_that_fails_is_said_once_and_changes_nothing(tmp_path, capsys):
    train(settings(tmp_path / "full", "own_trackers:FullDisk,own_trackers:Leaves,own_trackers:not_ready,own_trackers:Notes"))
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    assert sorted(said) == [
        "halfpass: tracker own_trackers:FullDisk: OSError: [Errno 28] No space left on device; the run goes on without it",
        "halfpass: tracker own_trackers:Leaves: SystemExit: no account; the run goes on without it",
        "halfpass: tracker own_trackers:not_ready: track.to: expected a function that can be called with (), found "
        "ConnectionError: nobody there; correct the function; the run goes on without it",
    ]
    train(settings(tmp_path / "none", None))
    assert [row["loss"] for row in lines(tmp_path / "full")] == [row["loss"] for row in lines(tmp_path / "none")]
    told = [row["epoch"] for what, row in notes(tmp_path / "full") if what == "log" and row["process"] == "server"]
    assert sorted(told) == [1, 1, 2, 3]  # the first epoch's by both
    assert not (tmp_path / "none" / "track.json").exists()


def test_one_that_hangs_is_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.3)
    train(settings(tmp_path / "run", "own_trackers:Hangs", **{"train.epochs": 1}))
    assert (
        "halfpass: tracker own_trackers:Hangs: expected it to have written all within 0.3 s, found it at work; the run goes on without it\n"
        in capsys.readouterr().err
    )


def test_a_run_that_is_gone_on_with_has_each_row_once(tmp_path, monkeypatch):
    """Broken off behind the second epoch, which was logged and not kept: it is trained again, and not logged again."""
    config = settings(tmp_path / "run", "own_trackers:Notes")
    with monkeypatch.context() as broken:
        keep = halfpass.run.local.LocalRun.keep

        def once(run, folder, epochs):
            if epochs == 2:
                raise KeyboardInterrupt
            keep(run, folder, epochs)

        broken.setattr(halfpass.run.local.LocalRun, "keep", once)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert notes(tmp_path / "run")[-1] == ["finish", None]
    resume(tmp_path / "run")
    told = [row for what, row in notes(tmp_path / "run") if what == "log"]
    assert Counter((row["epoch"], row["process"]) for row in told) == dict.fromkeys(
        [(epoch, process) for epoch in (1, 2, 3) for process in ("client-0", "client-1", "server")], 1
    )
    assert [row["loss"] for row in told] == [row["loss"] for row in lines(tmp_path / "run")]
    assert [what for what, _ in notes(tmp_path / "run") if what != "log"] == ["start", "finish", "start", "finish"]


def test_rows_that_an_earlier_process_did_not_get_to_are_made_up_for(tmp_path):
    config = settings(tmp_path, "own_trackers:Notes")
    folder = RunFolder.create(tmp_path, config)
    folder.add_rows(ROWS)
    write_json(tmp_path / "track.json", {"own_trackers:Notes": {"run": None, "epoch": 1}})
    with folder.tracked(config):
        folder.rows(3)
    assert [row["epoch"] for what, row in notes(tmp_path) if what == "log"] == [2, 2, 3, 3]


@pytest.mark.parametrize(("to", "said"), [
    ("tensorbord", "track.to: expected one of tensorboard, mlflow, wandb, trackio, module:function, found 'tensorbord'; did you mean 'tensorboard'?"),
    ("nowhere:tracker", "track.to: expected a module 'nowhere' that can be imported, found ModuleNotFoundError: No module named 'nowhere'; run from the module's directory, or install it"),
    ("own_trackers:Note", "track.to: expected a function 'Note' in 'own_trackers', found none; did you mean 'Notes'?"),
    ("own_trackers:NoFinish", "track.to: expected own_trackers:NoFinish to make an object with start, log, finish, found no finish; write the method, even if it does nothing"),
])  # fmt: skip
def test_what_is_no_tracker_is_refused_before_anything_starts(tmp_path, to, said):
    with pytest.raises(InputError) as refused:
        train(settings(tmp_path / "run", f"own_trackers:Notes,{to}"))
    assert str(refused.value) == said
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_not_installed_is_refused_with_the_line_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    said = "halfpass: track.to: expected wandb, which is a library of its own, found it is not installed; pip install 'halfpass[wandb]', or pip install wandb\n"
    for command in (["train"], ["serve", "--bind", "127.0.0.1:0"], ["compare"]):
        assert main([*command, "--track", "wandb", "--data.limit", "64", "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == said
    assert list(tmp_path.iterdir()) == []


def test_a_function_whose_object_has_no_finish_is_said(tmp_path, capsys):
    check(settings(tmp_path, "own_trackers:no_finish"))  # nothing is called to find out
    Tracks(settings(tmp_path, "own_trackers:no_finish"), tmp_path).finish(None)
    assert "found no finish; write the method, even if it does nothing; the run goes on without it" in capsys.readouterr().err


def test_a_broken_note_of_how_far_a_tracker_is(tmp_path):
    (tmp_path / "track.json").write_text('{"wandb": 3}')
    with pytest.raises(InputError, match=r"track.json: expected 'run' and 'epoch' of each tracker, found .*; restore the file, or remove it"):
        Tracks(settings(tmp_path, "own_trackers:Notes"), tmp_path)


def test_a_comparison_is_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(halfpass.run.train, "_run_fresh", lambda run, debug: train(run))  # in no process of its own
    (run,) = compare(settings(tmp_path / "both", "own_trackers:Notes", **{"train.epochs": 1, "clients.count": 1}), ["decoupled"], [4])
    assert notes(run)[0][1]["track.folder"] == str(tmp_path / "both")
    place = tracking.Place(run, tmp_path / "both", "both")
    assert (place.name, tracking.Place(run, run, None).name) == ("decoupled-seed-4", "decoupled-seed-4")
    own = settings(tmp_path / "x", "wandb", **{"track.folder": "elsewhere"})
    assert tracked_together(tmp_path, own) is own


def test_settings_of_trackers_are_each_processs_own_and_name_code():
    config = Config(track=TrackConfig("wandb, mine:one,others:two", "~"))
    assert not any(key.startswith("track") for key in shared_settings(config))
    assert named_code(config) == {"track.to": "mine:one", "track.to (1)": "others:two"}
    assert not config.track.folder.startswith("~")


def test_numbers_of_rows_and_results_by_the_names_that_charts_have():
    assert measures(ROWS[1]) == {"server/loss": 1.0, "server/test/accuracy": 0.5}
    assert outcome({"bytes": {"up": {"labels": 3}}, "cut": "a", "done": True, "none": None, "peaks": [1]}) == {"bytes/up/labels": 3.0}


# ------------------------------------------------------------------------------------------------- the libraries


def follow(config, folder):
    """A run of three epochs, broken off behind the second, and gone on with; the third's rows come twice."""
    RunFolder.create(folder, config)
    for rows, result in ((ROWS[:4], None), (ROWS, {"test_accuracy": 0.5, "metric": "accuracy"})):
        tracks = Tracks(config, folder)
        tracks.log(rows)
        tracks.finish(result)
    assert json.loads((folder / "track.json").read_text())[config.track.to]["epoch"] == 3
    return json.loads((folder / "track.json").read_text())[config.track.to]["run"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "group" / "run"


def made(to, run):
    return dataclasses.replace(settings(run, to), track=TrackConfig(to, str(run.parent)))


LOSSES = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_tensorboard_reads_it_back(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    follow(made("tensorboard", run), run)
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("server/loss")] == LOSSES
    assert [event.value for event in read.Scalars("result/test_accuracy")] == [0.5]
    assert "settings/text_summary" in read.Tags()["tensors"]


def test_tensorboard_counts_an_epoch_once_that_was_written_and_not_noted(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = made("tensorboard", run)
    RunFolder.create(run, config)
    for result in (None, {}):
        tracks = Tracks(config, run)
        tracks.log(ROWS[:4])
        tracks.finish(result)
        write_json(run / "track.json", {"tensorboard": {"run": "run", "epoch": 1}})
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("server/loss")] == [1, 2]


def test_mlflow_reads_it_back(run):
    mlflow = pytest.importorskip("mlflow")
    known = follow(made("mlflow", run), run)
    client = mlflow.MlflowClient(f"sqlite:///{run.parent / 'mlflow.db'}")
    read = client.get_run(known)
    assert [(m.step, m.value) for m in client.get_metric_history(known, "server/loss")] == LOSSES
    assert (read.info.status, read.info.run_name, read.data.tags["group"]) == ("FINISHED", "run", "group")
    assert read.data.metrics["result/test_accuracy"] == 0.5
    assert read.data.params.keys() == flatten(as_dict(Config())).keys()
    assert client.get_experiment(read.info.experiment_id).name == "group"


def test_wandb_writes_it_offline(run):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as wandb

    known = follow(made("wandb", run), run)
    rows, summary = [], {}
    for file in sorted((run.parent / "wandb").glob(f"offline-run-*/run-{known}.wandb")):
        for data in _records(file.read_bytes()):
            record = wandb.Record.FromString(data)
            if record.HasField("run"):
                assert (record.run.run_id, record.run.display_name, record.run.run_group) == (known, "run", "group")
            if record.HasField("history"):
                values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
                rows.append((record.history.step.num, values["server/loss"]))
            summary |= {"/".join(item.nested_key) or item.key: item.value_json for item in record.summary.update}
    assert rows == LOSSES
    assert summary["result/test_accuracy"] == "0.5"


def _records(data):
    """Of a .wandb file, which the library itself reads in Go alone: LevelDB's log, behind a header of 7 bytes."""
    at, whole, block = 7, b"", 2**15
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_trackio_reads_it_back(run, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(run.parent / "trackio"))  # which is read when it is imported
    pytest.importorskip("trackio")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    follow(made("trackio", run), run)
    assert Path(utils.TRACKIO_DIR) == run.parent / "trackio"
    assert SQLiteStorage.get_runs("halfpass") == ["run"]
    read = SQLiteStorage.get_logs("halfpass", "run")
    assert [(row["step"], row["server/loss"]) for row in read if "server/loss" in row] == LOSSES
    assert [row["result/test_accuracy"] for row in read if "result/test_accuracy" in row] == [0.5]
