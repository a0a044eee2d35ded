"""The dial between the methods: a gradient for every so-manieth batch of a decoupled run."""

import pytest
import torch
from plain import equal
from runtimes import rows_of, train_in_both_runtimes
from small import SGD, config, joined, plain_batches, plain_start, run
from torch.nn.functional import cross_entropy

from halfpass.commands.cli import main
from halfpass.config import ClientsConfig, Config, ServerConfig, TrainConfig, WireConfig


def test_a_gradient_for_every_batch_makes_it_conventional(data):
    every, conventional = run(config(feedback_every=1), data), run(config("conventional"), data)
    assert equal(joined(every), joined(conventional))
    assert not equal(joined(every), joined(run(config(), data)))
    up, down = every.wires[0].meter.up, every.wires[0].meter.down
    assert down["gradients"] == conventional.wires[0].meter.down["gradients"]
    assert 0.9 * up["activations"] < down["gradients"] <= up["activations"]


def test_a_gradient_now_and_then_by_hand(data):
    """Of four batches per epoch the first and the fourth; the head learns from the local loss of every batch."""
    settings = config(schedule="constant", feedback_every=3, label_smoothing=0.2)
    local = run(settings, data)
    model, head = plain_start(settings, data)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.05, fused=True, **SGD)
    for number, (x, y) in enumerate(plain_batches(data)):
        z, back = model.below(x), number % 4 in (0, 3)
        local_loss = cross_entropy(head(z.detach() if back else z), y, label_smoothing=0.2)
        loss = cross_entropy(model.classifier(model.above(z if back else z.detach())), y, label_smoothing=0.2)
        optimizer.zero_grad()
        (local_loss + loss).backward()
        optimizer.step()
    assert equal(joined(local), model.state_dict())
    assert equal(local.clients[0].head.state_dict(), head.state_dict())
    for other in (None, 1, 2, 4):
        assert not equal(joined(run(config(schedule="constant", feedback_every=other, label_smoothing=0.2), data)), model.state_dict())


def test_processes_do_what_local_does_and_replays_get_no_gradient(tmp_path):
    """Two clients with unequal shards; every second batch goes up, every fourth comes back, and all are used twice."""
    settings = Config(
        clients=ClientsConfig(2, "splitfed", "dirichlet", 1.0),
        train=TrainConfig(epochs=2, batch_size=64, threads=1, feedback_every=4),
        wire=WireConfig(every=2, codec="bf16", timeout=20), server=ServerConfig(replay=2),
    )  # fmt: skip
    for outcome in train_in_both_runtimes(settings, tmp_path).values():
        up, down = outcome["bytes"]["up"]["activations"], outcome["bytes"]["down"]["gradients"]
        assert 0.4 < down / up < 0.6
    rows = rows_of(tmp_path / "processes")
    uploads = sum(row["uploads"] for row in rows if row["process"] != "server")
    assert sum(row["steps"] for row in rows if row["process"] == "server") == 2 * uploads


@pytest.mark.parametrize(("words", "said"), [
    (["--wire.every", "2"], "train.feedback_every: expected a multiple of wire.every 2, for what is not uploaded has no gradient, found 3;"),
    (["--wire.budget", "9"], "wire.budget: expected its default with train.feedback_every, for whose gradients whole batches must go up, found 9;"),
    (["--train.micro_batch", "8"], "train.micro_batch: expected its default with train.feedback_every"),
    (["--train.feedback_every", "0"], "train.feedback_every: expected a number of at least 1, found 0"),
])  # fmt: skip
def test_what_leaves_no_gradient_to_return_is_refused(capsys, words, said):
    assert main(["train", "--train.feedback_every", "3", *words]) == 2
    assert said in capsys.readouterr().err
