"""What goes up and how often it is used: every, budget, replay, the store and `retrain`, micro-batches."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain import HandCut, equal
from runtimes import rows_of, train_in_both_runtimes
from safetensors.torch import load_file
from small import SGD, close, config, joined, one_cycle, plain_batches, plain_start, shards
from torch import nn
from torch.nn.functional import cross_entropy

from halfpass.commands.cli import main
from halfpass.commands.retrain import retrain
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, ServerConfig, TrainConfig, WireConfig
from halfpass.cut import CutBatch
from halfpass.data.batches import micro_batches
from halfpass.errors import InputError, RunError
from halfpass.files import alone_in
from halfpass.run import replay
from halfpass.run.local import LocalRun
from halfpass.run.network import build_network, identity
from halfpass.run.server_process import ServerRun
from halfpass.run.train import train
from halfpass.wire.store import UploadStore


def with_wire(settings, **values):
    return dataclasses.replace(settings, wire=dataclasses.replace(settings.wire, **values))


def with_server(settings, **values):
    return dataclasses.replace(settings, server=dataclasses.replace(settings.server, **values))


def run(settings, data, counts=(64,), store=None):
    network = build_network(settings, data.train.sample_shape, data.classes)
    local = LocalRun(settings, data, shards(data, list(counts)), network, store)
    local.tallies = [local.train(epoch, lambda: None) for epoch in range(settings.train.epochs)]
    return local


def used_by_server(monkeypatch):
    """(client, epoch, step, times used before) of every step that a server makes from now on."""
    steps, real = [], replay.server_step

    def spy(config, server, batch, number, total, tally, use):
        steps.append((batch.client, batch.epoch, batch.step, use))
        return real(config, server, batch, number, total, tally, use)

    monkeypatch.setattr(replay, "server_step", spy)
    return steps


# ------------------------------------------------------------------------------------------------- every and budget


def plain_halves(settings, data, trained_on):
    """By hand: the client learns from all batches, the server from those whose step in the epoch is in `trained_on`."""
    model, head = plain_start(settings, data)
    below = torch.optim.SGD([*model.below.parameters(), *head.parameters()], lr=0.05, fused=True, **SGD)
    above = [*model.above.parameters(), *model.classifier.parameters()]
    above = torch.optim.SGD(above, lr=0.05, fused=True, **SGD)
    for number, (x, y) in enumerate(plain_batches(data)):
        z = model.below(x)
        below.zero_grad()
        cross_entropy(head(z), y).backward()
        below.step()
        if number % 4 in trained_on:
            above.zero_grad()
            cross_entropy(model.classifier(model.above(z.detach())), y).backward()
            above.step()
    return model


def test_every_second_batch_goes_up_and_the_client_learns_from_all(data):
    settings = config(schedule="constant")
    local = run(with_wire(settings, every=2), data)
    assert equal(joined(local), plain_halves(settings, data, {0, 2}).state_dict())
    assert not equal(joined(local), plain_halves(settings, data, {0, 1, 2, 3}).state_dict())
    assert [(clients[0].uploads, server.steps) for clients, server in local.tallies] == [(2, 2), (2, 2)]


def test_skipped_uploads_keep_their_places_in_the_learning_rate_schedule(data):
    for every, last in ((1, (3, 7)), (2, (2, 6))):
        local = run(with_wire(config(), every=every), data)
        assert [server.learning_rate for _, server in local.tallies] == pytest.approx([one_cycle(n) for n in last])


def test_a_budget_is_kept_and_spread_over_the_run(data):
    everything = run(config(), data).wires[0].meter.up
    batch_bytes = (everything["activations"] + everything["labels"]) / 8
    budget = int(3.5 * batch_bytes)
    local = run(with_wire(config(), budget=budget), data)
    up = local.wires[0].meter.up
    assert 2 * batch_bytes < up["activations"] + up["labels"] <= budget
    uploads = [clients[0].uploads for clients, _ in local.tallies]
    assert uploads == [1, 2]  # not all of it in the first epoch
    assert [clients[0].withheld for clients, _ in local.tallies] == [3, 2]
    enough = run(with_wire(config(), budget=int(8.2 * batch_bytes)), data)
    assert [clients[0].uploads for clients, _ in enough.tallies] == [4, 4]


def test_clients_with_different_uploads_are_taken_in_turn(data, monkeypatch):
    steps = used_by_server(monkeypatch)
    run(with_wire(config(clients=2, epochs=1), every=2), data, (48, 16))  # three steps and one
    assert steps == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 2, 0)]


def test_a_budget_too_small_for_any_batch_is_refused(tmp_path, capsys):
    least = 128 * (4 * 32 * 8 * 8 + 1)  # values of the default cut, and a byte for a label
    said = rf"^wire.budget: expected at least (\d+) bytes, one batch at this cut, found {least}; raise it or choose smaller batches$"
    with pytest.raises(InputError, match=said) as refused:
        train(Config(train=TrainConfig(epochs=1, threads=1), wire=WireConfig(budget=least), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    budget = int(str(refused.value).split()[4])
    assert least < budget < least + 100
    train(Config(train=TrainConfig(epochs=1, threads=1), wire=WireConfig(budget=budget + 100), out=str(tmp_path / "run")))
    assert "client 0, epoch 1: 11 of 12 batches not uploaded, to stay within wire.budget" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "name"), [
    (["--wire.every", "2"], "wire.every"), (["--wire.budget", "9"], "wire.budget"),
    (["--server.replay", "2"], "server.replay"), (["--train.micro_batch", "8"], "train.micro_batch"),
    (["--train.feedback_every", "2"], "train.feedback_every"), (["--server.merge", "2"], "server.merge"),
])  # fmt: skip
def test_conventional_training_cannot_do_without_an_answer(capsys, words, name):
    assert main(["train", "--method", "conventional", *words]) == 2
    assert f"halfpass: {name}: expected its default with method conventional" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ replay


@pytest.fixture
def store(data, tmp_path):
    network = build_network(config(), data.train.sample_shape, data.classes)
    with UploadStore.open(tmp_path / "store", identity=identity(network), limit_bytes=2**24) as made:
        yield made


def test_every_upload_is_used_as_often_as_replay_says(data, store, monkeypatch):
    steps = used_by_server(monkeypatch)
    local = run(with_server(config(), replay=3), data, store=store)
    assert Counter(step[:3] for step in steps) == {(0, epoch, step): 3 for epoch in (0, 1) for step in range(4)}
    assert [s[:3] for s in steps[:4]] == [(0, 0, step) for step in range(4)]  # the first epoch has nothing to repeat
    assert [s[1] for s in steps[4:16]] == [1, 0, 0] * 4  # old uploads between new ones
    assert [s[1] for s in steps[16:]] == [1] * 8  # the server's own epochs, after the last upload
    assert [s[3] for s in steps[16:]] == [1] * 4 + [2] * 4
    again = [s[2] for s in steps[4:16] if s[1] == 0]
    assert sorted(again) == sorted([*range(4), *range(4)])
    assert again != [*range(4), *range(4)]  # in another order
    assert [server.steps for _, server in local.tallies] == [4, 20]


def test_a_replayed_step_is_the_step_on_what_was_decoded(data, store):
    """Two passes over one epoch's uploads, by hand; a lossy codec, so that the store must hold what the wire gave."""
    settings = with_server(config(epochs=1, schedule="constant", codec="bf16"), replay=2)
    local = run(settings, data, store=store)
    model, head = plain_start(settings, data)
    below = torch.optim.SGD([*model.below.parameters(), *head.parameters()], lr=0.05, fused=True, **SGD)
    above = [*model.above.parameters(), *model.classifier.parameters()]
    above = torch.optim.SGD(above, lr=0.05, fused=True, **SGD)
    uploads = []
    for x, y in plain_batches(data, 1):
        z = model.below(x)
        below.zero_grad()
        cross_entropy(head(z), y).backward()
        below.step()
        uploads.append((z.detach().to(torch.bfloat16).float(), y))
    for i in [*range(4), *replay.shuffled(range(4), 0, 0, 1)]:
        z, y = uploads[i]
        above.zero_grad()
        cross_entropy(model.classifier(model.above(z)), y).backward()
        above.step()
    assert equal(joined(local), model.state_dict())
    once = run(dataclasses.replace(settings, server=ServerConfig()), data)
    assert not equal(once.server.half.state_dict(), local.server.half.state_dict())
    assert equal(once.clients[0].half.state_dict(), local.clients[0].half.state_dict())


def test_local_and_processes_agree_on_what_goes_up_and_how_often_it_is_used(tmp_path):
    """Unequal shards, a budget, replay and a lossy codec with a size that depends on the values."""
    outcomes = train_in_both_runtimes(Config(
        clients=ClientsConfig(2, "splitfed", "dirichlet", 1.0),
        train=TrainConfig(epochs=2, batch_size=64, threads=1, micro_batch=40),
        wire=WireConfig(every=2, budget=150_000, codec="int4+zstd", timeout=20), server=ServerConfig(replay=2),
    ), tmp_path)  # fmt: skip
    assert outcomes["local"]["test_accuracy"] == outcomes["processes"]["test_accuracy"]
    assert 0 < outcomes["processes"]["bytes"]["up"]["activations"] < 2 * 150_000
    rows = rows_of(tmp_path / "processes")
    uploads = sum(row["uploads"] for row in rows if row["process"] != "server")
    assert sum(row["steps"] for row in rows if row["process"] == "server") == 2 * uploads


# ------------------------------------------------------------------------------------------------------------- merge


def test_a_merged_step_is_the_step_on_the_samples_of_all_its_uploads(data, monkeypatch):
    """What the clients send does not depend on the server, so a run without merging tells it: four uploads, the last
    of which is left over."""
    settings = config(clients=2, epochs=1, schedule="constant")
    uploads, real = [], replay.server_step

    def spy(config, server, batch, *rest):
        uploads.append((batch.client, batch.tensors[0].clone(), batch.targets))
        return real(config, server, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "server_step", spy)
        alone = run(settings, data, (48, 16))
    assert [client for client, _, _ in uploads] == [0, 1, 0, 0]
    model, _ = plain_start(settings, data)
    above = [*model.above.parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.SGD(above, lr=0.05, fused=True, **SGD)
    for first in (0, 3):
        _, z, labels = zip(*uploads[first : first + 3], strict=True)
        optimizer.zero_grad()
        cross_entropy(model.classifier(model.above(torch.cat(z))), torch.cat(labels)).backward()
        optimizer.step()
    merged = run(with_server(settings, merge=3), data, (48, 16))
    by_hand = {name: value for name, value in model.state_dict().items() if not name.startswith("below.")}
    assert equal({name: value for name, value in joined(merged).items() if name in by_hand}, by_hand)
    assert not equal(alone.server.half.state_dict(), merged.server.half.state_dict())
    ((_, tally),) = merged.tallies
    assert (tally.steps, tally.samples) == (2, 64)


def test_a_merged_step_has_the_place_of_its_last_upload_in_the_schedule(data):
    for size, steps in ((2, 2), (3, 2), (4, 1), (5, 1)):
        local = run(with_server(config(), merge=size), data)
        assert [server.steps for _, server in local.tallies] == [steps, steps]
        assert [server.learning_rate for _, server in local.tallies] == pytest.approx([one_cycle(3), one_cycle(7)])


def test_the_server_s_own_epochs_end_where_the_schedule_does(data, store, monkeypatch):
    numbers, real = [], replay.server_step
    monkeypatch.setattr(replay, "server_step", lambda *all: (numbers.append(all[3:5]), real(*all))[1])
    run(with_server(config(), replay=2, merge=3), data, store=store)
    places = [2, 3, 6, 6, 7, 7, 10, 11]  # of two epochs of four uploads and the server's own; a replay has its upload's
    assert numbers == [(place, 12) for place in places]


def test_merged_uploads_are_replayed_and_retrained_in_both_runtimes(tmp_path):
    settings = Config(
        clients=ClientsConfig(2, "splitfed", "dirichlet", 1.0, rounds=6), data=DataConfig(limit=640),
        train=TrainConfig(epochs=2, batch_size=64, threads=1), wire=WireConfig(codec="int8", timeout=20),
        server=ServerConfig(replay=2, merge=3),
    )  # fmt: skip
    train_in_both_runtimes(settings, tmp_path)
    uploads = [
        sum(row["uploads"] for row in rows_of(tmp_path / "local") if row["epoch"] == epoch and row["process"] != "server")
        for epoch in (1, 2)
    ]
    assert uploads[0] == uploads[1]
    assert uploads[0] % 3 > 0
    in_epoch = -(-uploads[0] // 3)
    assert [row["steps"] for row in rows_of(tmp_path / "local") if row["process"] == "server"] == [in_epoch, 3 * in_epoch]
    once = dataclasses.replace(settings, server=ServerConfig(merge=3, store=str(tmp_path / "store")), out=str(tmp_path / "once"))
    train(once)
    retrain(tmp_path / "once", dataclasses.replace(once, out=str(tmp_path / "again")))
    assert equal(server_half(tmp_path / "once"), server_half(tmp_path / "again"))


@pytest.mark.parametrize("words", [["--train.micro_batch", "8"], ["--train.feedback_every", "2"], ["--model.edge_cut", "block_3"]])
def test_merging_wants_whole_uploads_that_wait_for_nothing(capsys, words):
    assert main(["train", "--server.merge", "2", *words]) == 2
    said = capsys.readouterr().err
    assert f"halfpass: server.merge: expected its default with {words[0][2:]}" in said


# ----------------------------------------------------------------------------------------------------------- retrain


KEEPING = Config(
    train=TrainConfig(epochs=3, threads=1), wire=WireConfig(codec="bf16"), clients=ClientsConfig(2), data=DataConfig(limit=640),
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that kept its uploads."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    outcome = train(dataclasses.replace(KEEPING, out=str(folder), server=ServerConfig(store=str(folder / "store"))))
    return folder, outcome


def server_half(folder):
    return load_file(Path(folder) / "server.safetensors")


def test_retraining_with_the_run_s_own_settings_repeats_its_server_half(kept, tmp_path, capsys):
    folder, outcome = kept
    with alone_in(tmp_path / "again"):
        assert main(["retrain", str(folder), "--out", str(tmp_path / "again")]) == 2
    assert "again: expected no other training at work in it" in capsys.readouterr().err
    assert main(["retrain", str(folder), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert equal(server_half(folder), server_half(tmp_path / "again"))
    assert again["test_accuracy"] == outcome["test_accuracy"]
    assert again["retrained_from"] == str(folder)
    assert main(["retrain", str(folder), "--out", str(tmp_path / "other"), "--train.lr", "0.05"]) == 0
    assert not equal(server_half(folder), server_half(tmp_path / "other"))
    assert main(["export", str(tmp_path / "again")]) == 0
    assert f"{100 * again['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_retraining_another_network_for_longer(kept, tmp_path):
    folder, _ = kept
    settings = dataclasses.replace(
        KEEPING, out=str(tmp_path / "wide"), train=TrainConfig(epochs=5, threads=1),
        model=ModelConfig("test_uplink:wide", "below"), server=ServerConfig(store=str(folder / "store")),
    )  # fmt: skip
    outcome = retrain(folder, settings)
    assert outcome["test_accuracy"] > 0.8
    assert server_half(tmp_path / "wide")["server_half.above.1.weight"].shape == (200, 32 * 8 * 8)
    assert not list((tmp_path / "wide").glob("client-*"))  # those of the run belong to another network


def wide(sample_shape, classes):
    """Its cut has the shape of digits-cnn's at block_2: 32×8×8."""
    return Wide(classes)


class Wide(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU())
        self.above = nn.Sequential(nn.Flatten(), nn.Linear(32 * 8 * 8, 200), nn.ReLU(), nn.Linear(200, classes))

    def forward(self, x):
        return self.above(self.below(x))


@pytest.mark.parametrize(("words", "pattern"), [
    (["--model.cut", "block_3"], "model.cut: expected tensors of [[32, 8, 8]] per sample, as the store holds them, found [[64, 4, 4]] after block_3 of digits-cnn;"),
    (["--server.store", "nowhere"], "store nowhere: expected a store of uploads, found none;"),
    (["--server.stroe", "nowhere"], "server.store"),
    (["--model.head", "conv"], "model.head: expected linear, the run's, which its uploads are of, found conv;"),
    (["--data.name", "listops"], "data.name: expected digits, the run's, which its uploads are of, found listops; leave it out"),
    (["--wire.codec", "int2"], "wire.codec: expected bf16, the run's, which its uploads are of, found int2; leave it out"),
    (["--server.replay", "2"], "server.replay: expected 1, the run's, which its uploads are of, found 2; leave it out"),
    (["--out", "runs-own-folder"], "out: expected a folder without a run, found metrics.jsonl in"),
])  # fmt: skip
def test_what_cannot_be_retrained_gets_one_line(kept, tmp_path, capsys, words, pattern):
    words = [str(kept[0]) if word == "runs-own-folder" else word for word in words]
    assert main(["retrain", str(kept[0]), "--out", str(tmp_path / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert pattern in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_retraining_no_run(tmp_path, capsys):
    assert main(["retrain", str(tmp_path)]) == 2
    assert "retrain: expected the folder of a run, found no config.yaml in" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- bad stores


def test_a_store_of_another_cut_is_refused_before_anything_is_written(kept, tmp_path, capsys):
    words = ["train", "--data.limit", "640", "--model.cut", "block_3", "--server.store", str(kept[0] / "store")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "expected cut 'block_3' (the run's), found cut 'block_2' (the store's); choose another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["train", "--data.limit", "640", "--server.store", str(kept[0] / "store"), "--out", str(tmp_path / "out")]) == 2
    assert "expected an empty one for a new run, found 21 uploads of another run;" in capsys.readouterr().err


@pytest.mark.parametrize("runtime", ["local", "processes"])
def test_a_full_disk_ends_the_run_and_what_was_trained_is_saved(tmp_path, runtime):
    """The system refuses files of more than 1.5 MB to the run's processes: a real failure to write, as of a full disk."""
    words = ["train", "--runtime", runtime, "--server.store", str(tmp_path / "store"), "--out", str(tmp_path / "run"), "--train.threads", "1"]
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000,) * 2);"
        "from halfpass.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("halfpass: ")]
    assert lines == [f"halfpass: store {tmp_path / 'store'}: expected room on the disk, found File too large; free space, or lower server.store_limit"]
    for name in ("client-0", "server"):
        assert load_file(tmp_path / "run" / f"{name}.safetensors")
    assert not (tmp_path / "run" / "result.json").exists()


# ------------------------------------------------------------------------------------------------------ micro-batches


def test_micro_batches_are_as_few_and_as_even_as_can_be():
    assert [(s.start, s.stop) for s in micro_batches(128, 32)] == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert [(s.start, s.stop) for s in micro_batches(81, 32)] == [(0, 27), (27, 54), (54, 81)]
    assert [s.stop - s.start for s in micro_batches(65, 32)] == [21, 22, 22]  # not 32, 32 and a single one
    assert micro_batches(5, None) == [slice(0, 5)]
    assert micro_batches(5, 32) == [slice(0, 5)]


class LayerNormed(HandCut):
    """No statistics of a batch in it, so that the parts add up to the whole."""

    def __init__(self):
        super().__init__()
        self.below[1], self.above[1] = nn.GroupNorm(2, 6), nn.GroupNorm(2, 8)


def layer_normed(sample_shape, classes):
    return LayerNormed()


def test_micro_batches_learn_what_the_batch_teaches_unless_batchnorm_sees_them(data):
    for model, same in (("test_uplink:layer_normed", True), ("plain:hand_cut", False)):
        whole, parts = (run(config(model=model, micro_batch=size), data) for size in (None, 5))
        for half in (lambda local: local.clients[0].half, lambda local: local.server.half):
            assert close(half(whole).state_dict(), half(parts).state_dict()) == same
        assert parts.tallies[0][0][0].steps == parts.tallies[0][1].steps == 4
        assert [t.uploads for clients, _ in parts.tallies for t in clients.values()] == [4, 4]
        assert joined(parts).keys() == joined(whole).keys()


def test_a_step_of_micro_batches_is_accumulated_gradients_and_one_optimizer_step(data):
    settings = config(schedule="constant", micro_batch=5)
    model, head = plain_start(settings, data)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.05, fused=True, **SGD)
    for x, y in plain_batches(data):
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)):
            z = model.below(x[part])
            logits = model.classifier(model.above(z.detach()))
            ((cross_entropy(head(z), y[part]) + cross_entropy(logits, y[part])) / 4).backward()
        optimizer.step()
    assert equal(joined(run(settings, data)), model.state_dict())
    assert not equal(joined(run(config(schedule="constant", micro_batch=8), data)), model.state_dict())


def test_micro_batches_come_whole_and_in_their_order():
    server = SimpleNamespace(_last={0: (-1, -1, 0, 0)}, steps=[5])

    def take(step, before, samples, after):
        batch = CutBatch(0, 0, step, (torch.zeros(samples, 2),), torch.zeros(samples, dtype=torch.int64), before, after)
        ServerRun._check_order(server, 0, batch, False, 0)

    take(0, 0, 2, 3)
    for wrong in ((0, 0, 2, 3), (0, 2, 2, 2), (0, 3, 1, 1), (1, 0, 5, 0), (1, 2, 3, 0)):
        with pytest.raises(RunError, match="expected a batch of epoch 0 after step 0, of 5 steps, or 3 more samples of that one"):
            take(*wrong)
    take(0, 2, 3, 0)
    with pytest.raises(RunError, match="after step 0, of 5 steps, found epoch 0, step 1 from sample 2"):
        take(1, 2, 3, 0)
    take(2, 0, 5, 0)


def test_micro_batches_of_one_batch_stay_together_whatever_arrives(tmp_path):
    """Two clients, taken in any order: each one's weights are those of `local`, and the server steps once per batch."""
    settings = Config(
        clients=ClientsConfig(2, "independent"), train=TrainConfig(epochs=1, batch_size=64, threads=1, micro_batch=24),
        wire=WireConfig(order="arrival", timeout=20),
    )  # fmt: skip
    for runtime in train_in_both_runtimes(settings, tmp_path, ("client-0", "client-1")):
        assert [(row["process"], row["steps"], row["samples"]) for row in rows_of(tmp_path / runtime)] == [
            ("client-0", 12, 719), ("client-1", 12, 718), ("server", 24, 1437),
        ]  # fmt: skip


def test_micro_batches_that_batchnorm_cannot_take_are_refused(capsys):
    assert main(["train", "--train.micro_batch", "2"]) == 2
    assert "train.micro_batch: expected a number of at least 3, found 2;" in capsys.readouterr().err
