"""A training in one process that was broken off ends as one that was not."""

import dataclasses
import json

import pytest
import torch
from plain import equal
from runtimes import rows_of
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.data.datasets import load
from halfpass.errors import InputError, RunError
from halfpass.files import alone_in, replacing
from halfpass.run import local, records
from halfpass.run.epoch import Tally
from halfpass.run.records import RunFolder
from halfpass.run.train import resume, train
from halfpass.wire.store import UploadStore

MEASURED = ("busy_seconds", "waiting_seconds", "peak_memory_bytes")


def recipe(**changes):
    return TrainConfig(**{"epochs": 3, "batch_size": 64, "threads": 1} | changes)


def settings(method="decoupled", **parts):
    parts = {"model": ModelConfig("digits-cnn", "block_2", "conv"), "train": recipe()} | parts  # 4-D weights, momentum too
    return Config(method=method, data=DataConfig(limit=600), **parts)


TWO = ClientsConfig(2, "splitfed", "dirichlet", 1.0, rounds=3)
RUNS = {
    "replayed": settings(clients=TWO, server=ServerConfig(replay=3, merge=2), wire=WireConfig("int8", every=2)),
    "within a budget": settings(clients=TWO, train=recipe(micro_batch=24), wire=WireConfig(budget=2_000_000)),
    "relay": settings(clients=ClientsConfig(2, "relay"), train=recipe(optimizer="adamw", lr=0.01, test_every=2)),
    "independent": settings(clients=ClientsConfig(2, "independent")),
    "conventional": settings("conventional", clients=TWO),
    "feedback": settings(train=recipe(feedback_every=3)),
    "chain": settings(
        model=ModelConfig("digits-cnn", "block_1", edge_cut="block_3"), clients=TWO, server=ServerConfig(replay=2)
    ),
    "centralized": settings("centralized"),
}  # fmt: skip


def break_off(monkeypatch, config, calls):
    """Ctrl-C in the middle of an epoch, at so many-th loss."""
    seen = []
    add = Tally.add

    def interrupted(*arguments, **named):
        seen.append(arguments)
        if len(seen) == calls:
            raise KeyboardInterrupt
        add(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def weights(folder):
    return {str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}


def told(folder):
    """What the run's files say, but for seconds and memory."""
    results = [json.loads(file.read_text()) for file in sorted(folder.rglob("result.json"))]
    rows = [row for file in sorted(folder.rglob("metrics.jsonl")) for row in rows_of(file.parent)]
    left = {"train_seconds", "seconds", "peak_memory_bytes", *MEASURED}
    return [{key: value for key, value in one.items() if key not in left} for one in [*results, *rows]]


@pytest.mark.parametrize("name", RUNS)
def test_a_training_broken_off_ends_as_one_that_was_not(tmp_path, monkeypatch, name):
    whole, broken = (dataclasses.replace(RUNS[name], out=str(tmp_path / out)) for out in ("whole", "broken"))
    losses = []
    add = Tally.add
    with monkeypatch.context() as patch:
        patch.setattr(Tally, "add", lambda *a, **named: (losses.append(a), add(*a, **named))[1])
        train(whole)
    break_off(monkeypatch, broken, round(0.6 * len(losses)))
    kept = len({row["epoch"] for row in rows_of(tmp_path / "broken")})
    assert 1 <= kept <= 2
    at_break = weights(tmp_path / "broken")
    torch.set_num_threads(2)  # the caller's, not the training's
    resume(tmp_path / "broken")
    done, expected = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert done.keys() == expected.keys()
    for file, tensors in expected.items():
        assert equal(done[file], tensors), file
        assert file not in at_break or not equal(at_break[file], tensors), file
    assert told(tmp_path / "broken") == told(tmp_path / "whole")
    assert not list((tmp_path / "broken").rglob("unfinished*"))


def test_broken_off_twice_and_killed_between_rows_and_state(tmp_path, monkeypatch):
    """The rows of an epoch whose state was not kept are written again."""
    whole, broken = (dataclasses.replace(RUNS["replayed"], out=str(tmp_path / out)) for out in ("whole", "broken"))
    train(whole)
    keep = local.RunFolder.save_checkpoint

    def killed(folder, config, epochs, state):
        if epochs == 2:
            raise KeyboardInterrupt
        keep(folder, config, epochs, state)

    break_off(monkeypatch, broken, 20)
    with monkeypatch.context() as patch:
        patch.setattr(local.RunFolder, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "broken")
    assert rows_of(tmp_path / "broken")[-1]["epoch"] == 2
    resume(tmp_path / "broken")
    assert told(tmp_path / "broken") == told(tmp_path / "whole")
    for file, tensors in weights(tmp_path / "whole").items():
        assert equal(weights(tmp_path / "broken")[file], tensors), file
    stored = []
    for run in ("whole", "broken"):
        with UploadStore.open_existing(tmp_path / run / "store") as store:
            stored.append([(key, store.read(key)) for test in (False, True) for key in store.keys(test=test)])
    assert stored[0] == stored[1]


@pytest.mark.parametrize(("method", "calls"), [("decoupled", 5), ("centralized", 3)])
def test_the_peak_of_memory_is_that_of_both_parts(tmp_path, monkeypatch, method, calls):
    peaks = iter([9, 5])
    monkeypatch.setattr("halfpass.run.memory.PeakMemory.peak_bytes", lambda memory: next(peaks))
    config = Config(method=method, data=DataConfig(limit=128), train=recipe(epochs=2), out=str(tmp_path / "run"))
    break_off(monkeypatch, config, calls)
    resume(tmp_path / "run")
    assert [row["peak_memory_bytes"] for row in rows_of(tmp_path / "run") if row["process"] != "client-0"] == [9, 9]


def test_commits_that_made_one_run_are_all_named(tmp_path, monkeypatch):
    for commit, named in (("a", "a"), ("b", "a; b"), ("a", "a; b")):
        monkeypatch.setattr(records, "environment", lambda commit=commit: {"commit": commit, "threads": 1})
        folder = RunFolder(tmp_path)
        folder.load_checkpoint(Config(), lambda state: None)
        assert folder.environment == {"commit": named, "threads": 1}
        folder.save_checkpoint(Config(), 0, {})


def test_what_cannot_be_gone_on_with_is_said(tmp_path, monkeypatch, capsys):
    def refused():
        status, err = main(["resume", str(tmp_path / "run")]), capsys.readouterr().err
        return status, err.removeprefix("halfpass: ").strip().replace(str(tmp_path), "")

    assert refused() == (2, "resume: expected the folder of a run, found no config.yaml in /run; check the path")
    config = dataclasses.replace(settings(train=recipe(epochs=2)), out=str(tmp_path / "run"))
    break_off(monkeypatch, config, 1)
    assert refused() == (2, "resume: expected a training that has kept a state, in one process behind its first epoch, found none in /run; train anew")
    (tmp_path / "run" / "metrics.jsonl").unlink(missing_ok=True)
    train(dataclasses.replace(config, out=str(tmp_path / "done")))
    (tmp_path / "done").rename(tmp_path / "run-done")
    (tmp_path / "run" / "unfinished.pt").write_bytes(b"PK\x03\x04 torn")
    assert refused()[0] == 2
    assert "unfinished.pt: expected the state of a run, found " in str(refused()[1])
    with pytest.raises(InputError, match=r"expected a training that was broken off, found .*run-done, which is finished"):
        resume(tmp_path / "run-done")


def test_rows_that_were_lost_are_missed(tmp_path, monkeypatch):
    """Beside the state behind two epochs; going on from the rows that are left would train too long."""
    config = dataclasses.replace(RUNS["replayed"], out=str(tmp_path / "run"))
    break_off(monkeypatch, config, 20)
    file = tmp_path / "run" / "metrics.jsonl"
    kept = len({row["epoch"] for row in rows_of(tmp_path / "run")})
    for left in ("", None):
        file.unlink() if left is None else file.write_text(left)
        with pytest.raises(InputError, match=rf"metrics.jsonl: expected rows of the {kept} epochs that were trained, found those of 0"):
            resume(tmp_path / "run")


def test_other_settings_and_a_lost_store_are_refused(tmp_path, monkeypatch):
    """Either would end as another training than the one that was begun."""
    config = dataclasses.replace(RUNS["replayed"], out=str(tmp_path / "run"))
    break_off(monkeypatch, config, 20)
    file = tmp_path / "run" / "config.yaml"
    begun = file.read_text()
    file.write_text(begun.replace("epochs: 3", "epochs: 5"))
    with pytest.raises(InputError, match=r"run: expected train.epochs 3, with which it began, found 5; go on with those settings, or train anew"):
        resume(tmp_path / "run")
    file.write_text(begun)
    (tmp_path / "run" / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"store .*run/store: expected the run's \d+ uploads, found 0; go on in the directory"):
        resume(tmp_path / "run")


def test_damaged_notes_of_a_run_are_said(tmp_path, capsys):
    """Where a server listened and a client joined, and which samples there were."""
    for name, said in (("serve.json", '{"bind": 7465, "insecure": false}'), ("client-1/join.json", '{"address": "127.0.0.1:7465"}')):
        folder = (tmp_path / name).parent
        RunFolder.create(folder, Config(runtime="processes"))
        (tmp_path / name).write_text(said)
        assert main(["resume", str(tmp_path)]) == 2
        assert f"{name}: expected '{'bind' if name == 'serve.json' else 'address'}', 'above' and 'insecure' as they were written, found" in capsys.readouterr().err
        (folder / "config.yaml").rename(tmp_path / "before.yaml")
    folder, data = RunFolder(tmp_path), load("digits")
    for noted in ('{"sites": [1]}', '{"sites": {}}', "{}"):
        (tmp_path / "data.json").write_text(noted)
        with pytest.raises(InputError, match=r"expected the run's training samples \(digest None\)"):
            folder.check_digests([data])


def test_a_damaged_row_is_said(tmp_path, monkeypatch):
    config = dataclasses.replace(RUNS["replayed"], out=str(tmp_path / "run"))
    break_off(monkeypatch, config, 20)
    for line in ("junk\n", '{"epohc": 1}\n', "[]\n"):
        (tmp_path / "run" / "metrics.jsonl").write_text(line)
        with pytest.raises(InputError, match=r"metrics.jsonl: expected a row in each line, found .*; train anew"):
            resume(tmp_path / "run")


def test_a_file_that_cannot_be_written_is_said_and_the_old_one_stays(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("{}")

    def written_to_a_full_disk(error):
        with replacing(file) as partial:
            partial.write_text("half of")
            try:
                raise OSError(28, "No space left on device")
            except OSError:
                raise error  # noqa: B904  # as torch.save does

    for error in (OSError(28, "No space left"), SafetensorError("I/O error: No space left"), RuntimeError("unexpected pos 1984 vs 1878")):
        with pytest.raises(RunError, match=r"result.json: expected a file that can be written, found .*No space left.*; make room there"):
            written_to_a_full_disk(error)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "{}")]


def test_a_folder_takes_one_training_at_a_time(tmp_path, monkeypatch):
    config = dataclasses.replace(RUNS["replayed"], out=str(tmp_path / "run"))
    with alone_in(tmp_path / "run"), pytest.raises(InputError, match=r"run: expected no other training at work in it"):
        train(config)
    assert not list((tmp_path / "run").iterdir())
    break_off(monkeypatch, config, 20)
    with alone_in(tmp_path / "run"), pytest.raises(InputError, match=r"run: expected no other training at work in it"):
        resume(tmp_path / "run")
    resume(tmp_path / "run")
