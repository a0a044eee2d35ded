"""Tasks: targets, losses and metrics against plain PyTorch or by hand, and a small training of each."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from own_tasks import Counting, Flat
from plain import equal
from runtimes import rows_of, train_in_both_runtimes
from torch import nn
from torch.nn import functional as F

from halfpass.algorithm import client as client_side
from halfpass.algorithm import server as server_side
from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TaskConfig, TrainConfig
from halfpass.cut import CutBatch, merge
from halfpass.errors import InputError, RunError
from halfpass.networks.heads import build_head
from halfpass.run.epoch import Score, Test
from halfpass.run.train import train
from halfpass.tasks.table import TASKS, build_task, classes, count_outputs
from halfpass.tasks.task import Options, spec_of
from halfpass.tree import prediction

NAN = math.nan


def task(name, targets, **options):
    options = Options(**options)
    return build_task(name, count_outputs(name, options, targets), spec_of(targets), options)


def values(made, outputs, targets):
    test = Test(made)
    for part in range(2):  # in two batches
        test.add(outputs[part::2], targets[part::2])
    return test.values()


# ------------------------------------------------------------------------------------------------ losses and metrics


def test_classification():
    draws = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(60, 7, generator=draws), torch.randint(0, 6, (60,), generator=draws)  # none of class 6
    made = build_task("classification", 7, spec_of(targets), Options())
    assert torch.equal(made.loss(outputs, targets), F.cross_entropy(outputs, targets))
    found = values(made, outputs, targets)
    assert found["accuracy"] == int((outputs.argmax(1) == targets).sum()) / 60
    top = (outputs.topk(5).indices == targets[:, None]).any(1)
    assert found["top_5_accuracy"] == int(top.sum()) / 60
    areas = [area(outputs.softmax(1)[:, k], targets == k) for k in range(6)]  # of what is there
    assert found["auroc_macro"] == pytest.approx(sum(areas) / 6, abs=1e-6)
    f1 = [f_1(outputs.argmax(1) == k, targets == k) for k in range(7)]
    assert found["f1_macro"] == pytest.approx(sum(f1) / 7, abs=1e-6)
    weights = [1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0]
    weighted = build_task("classification", 7, spec_of(targets), Options(class_weights=weights, label_smoothing=0.1))
    expected = F.cross_entropy(outputs, targets, torch.tensor(weights), label_smoothing=0.1)
    assert torch.equal(weighted.loss(outputs, targets), expected)
    assert not torch.equal(made.loss(outputs, targets), expected)


def area(scores, positive):
    """Of the ROC curve: the share of pairs that are in order."""
    above = scores[positive][:, None] - scores[~positive][None]
    return float(((above > 0).double() + (above == 0).double() / 2).mean())


def f_1(predicted, true):
    both = int((predicted & true).sum())
    return 2 * both / (int(predicted.sum()) + int(true.sum()))


def test_unlabelled_samples_have_no_part():
    outputs, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([2, -100, 0, -100])
    made = task("classification", targets, ignore_index=-100)
    assert torch.equal(made.loss(outputs, targets), F.cross_entropy(outputs[::2], targets[::2]))
    none = made.loss(outputs, torch.full((4,), -100))
    none.backward()
    assert (none.item(), outputs.grad.abs().sum()) == (0, 0)
    assert values(made, outputs.detach(), targets)["accuracy"] == int((outputs.argmax(1) == targets).sum()) / 2
    with pytest.raises(InputError, match=r"train, sample 1: expected a class in 0..2, found -100; set task.ignore_index"):
        task("classification", targets)


def test_multilabel_leaves_out_what_is_not_known():
    outputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    targets = (torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    targets[::4, 0], targets[:, 2] = NAN, NAN  # of the third none is known
    made = task("multilabel", targets, positive_weights=[1.0, 4.0, 1.0], class_weights=[1.0, 2.0, 1.0])
    each = F.binary_cross_entropy_with_logits(
        outputs, targets, torch.tensor([1.0, 2.0, 1.0]), reduction="none", pos_weight=torch.tensor([1.0, 4.0, 1.0])
    )
    assert torch.allclose(made.loss(outputs, targets), each.nanmean())
    assert made.loss(outputs, torch.full((40, 3), NAN)) == 0
    found = values(made, outputs, targets)
    known = ~targets.isnan()
    areas = [area(outputs[known[:, k], k], targets[known[:, k], k] == 1) for k in range(2)]
    assert [found["auroc/0"], found["auroc/1"]] == pytest.approx(areas, abs=1e-6)
    assert math.isnan(found["auroc/2"])
    assert found["auroc_macro"] == pytest.approx(sum(areas) / 2, abs=1e-6)
    f1 = [f_1(outputs[known[:, k], k] > 0, targets[known[:, k], k] == 1) for k in range(2)]
    assert found["f1_macro"] == pytest.approx(sum(f1) / 2, abs=1e-6)
    named = build_task("multilabel", 3, spec_of(targets), Options(names=("a", "b", "c")))
    assert {"auroc/a", "auroc/b", "auroc/c", "map"} <= values(named, outputs, targets).keys()


@pytest.mark.parametrize(("loss", "plain"), [(None, F.mse_loss), ("mae", F.l1_loss), ("huber", F.huber_loss)])
def test_regression(loss, plain):
    outputs, targets = torch.randn(30, 2), torch.randn(30, 2)
    targets[::5, 1] = NAN
    made, known = task("regression", targets, loss=loss), ~targets.isnan()
    assert torch.allclose(made.loss(outputs, targets), plain(outputs[known], targets[known]))
    found = values(made, outputs, targets)
    errors = (outputs - targets)[known]
    assert found["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)
    assert found["rmse"] == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-5)
    columns = [(outputs[known[:, k], k], targets[known[:, k], k]) for k in range(2)]
    r2 = [1 - float((x - y).square().sum() / (y - y.mean()).square().sum()) for x, y in columns]
    assert found["r2"] == pytest.approx(sum(r2) / 2, rel=1e-5)
    flat = task("regression", targets[:, 0], loss=loss)
    assert torch.allclose(flat.loss(outputs[:, :1], targets[:, 0]), plain(outputs[:, 0], targets[:, 0]))


def test_segmentation():
    outputs, masks = torch.randn(6, 3, 4, 4), torch.randint(0, 2, (6, 4, 4))  # of class 2 none, but some answers
    masks[:, 0] = 255
    made = build_task("segmentation", 3, spec_of(masks), Options())
    assert torch.equal(made.loss(outputs, masks), F.cross_entropy(outputs, masks, ignore_index=255))
    assert made.shape == (3, 4, 4)
    found, labelled = values(made, outputs, masks), masks != 255
    answers, true = outputs.argmax(1)[labelled], masks[labelled]
    overlaps = [(int(((answers == k) & (true == k)).sum()), int(((answers == k) | (true == k)).sum())) for k in range(3)]
    assert found["mean_iou"] == pytest.approx(sum(both / either for both, either in overlaps) / 3, abs=1e-6)
    assert found["dice"] == pytest.approx(sum(f_1(answers == k, true == k) for k in range(3)) / 3, abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx((answers == true).double().mean().item())


def test_tokens():
    outputs, targets = torch.randn(6, 5, 4), torch.randint(0, 4, (6, 5))
    targets[:, 3:] = -100
    made = task("tokens", targets)
    expected = F.cross_entropy(outputs[:, :3].reshape(18, 4), targets[:, :3].reshape(18))
    assert torch.allclose(made.loss(outputs, targets), expected)
    found = values(made, outputs, targets)
    assert found["accuracy"] == pytest.approx((outputs.argmax(-1) == targets)[:, :3].double().mean().item())
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)
    assert made.shape == (5, 4)


@pytest.mark.parametrize(("name", "targets", "text"), [
    ("classification", torch.zeros(4, dtype=torch.int32), r"expected class numbers, int64 \(N,\), found torch.int32 \(4,\); convert"),
    ("classification", torch.zeros(4, 2), r"found torch.float32 \(4, 2\); choose another task: multilabel"),
    ("multilabel", torch.zeros(4), r"expected labels \(N, labels\) of 0, 1 and, where unknown, NaN, found torch.float32 \(4,\)"),
    ("multilabel", torch.tensor([[0.0, 1.0], [1.0, 0.5]]), "train, sample 1, label 1: expected 0, 1 or NaN, found 0.5"),
    ("regression", torch.zeros(4, dtype=torch.int64), r"expected floating point \(N,\) or \(N, columns\), found torch.int64"),
    ("regression", torch.tensor([0.0, math.inf]), "sample 1: expected a number, or NaN where it is not known, found infinity"),
    ("segmentation", torch.zeros(4, 1, 8, 8, dtype=torch.int64), r"expected a class for each pixel, .* found torch.int64 \(4, 1, 8, 8\)"),
    ("segmentation", torch.full((1, 2, 2), -1), "sample 0: expected a class in 0..-1, found -1"),
    ("tokens", torch.zeros(4, 8), r"expected a class for each token, int64 \(N, T\), found torch.float32"),
    ("classification", (torch.zeros(4), torch.zeros(4)), "found 2 tensors; return one tensor, or give a task of your own"),
    ("clasification", torch.zeros(4), "expected one of classification, .*, found 'clasification'; did you mean 'classification'"),
])  # fmt: skip
def test_targets_that_are_not_the_task_s_are_refused(name, targets, text):
    with pytest.raises(InputError, match=text):
        count_outputs(name, Options(), targets)


def test_settings_that_are_not_the_task_s_are_refused():
    with pytest.raises(InputError, match=r"task.positive_weights: expected its default in task classification, found"):
        count_outputs("classification", Options(positive_weights=[1.0]), torch.arange(3))
    with pytest.raises(InputError, match=r"task.metric: expected one of r2, mae, rmse, found 'rsme'; did you mean 'rmse'"):
        count_outputs("regression", Options(metric="rsme"), torch.rand(3))
    with pytest.raises(InputError, match=r"task.loss: expected one of mse, mae, huber, found 'hubert'; did you mean 'huber'"):
        task("regression", torch.rand(3), loss="hubert")
    with pytest.raises(InputError, match=r"task.class_weights: expected 3 weights, one for each output, found 2; give"):
        task("classification", torch.arange(3), class_weights=[1.0, 2.0])
    with pytest.raises(InputError, match=r"train.label_smoothing: expected its default in task regression, found 0.1"):
        task("regression", torch.rand(3), label_smoothing=0.1)


def test_the_leading_metric_says_which_way_is_better():
    chosen = task("regression", torch.rand(3), metric="rmse")
    assert (chosen.lead, chosen.higher_is_better, chosen.unit) == ("rmse", False, "")
    usual = {name: (row.metrics[0]) for name, row in TASKS.items()}
    assert usual["classification"] == classes(3).lead == "accuracy"
    assert (classes(3).higher_is_better, classes(3).unit) == (True, "%")


# ------------------------------------------------------------------------------------------------------- what crosses


def test_what_a_network_predicts():
    logits = torch.rand(2, 3)

    class Output:
        def __init__(self):
            self.loss, self.logits = None, logits

    for output in (logits, (logits, None), {"out": logits, "aux": 0}, {"features": 0, "logits": logits}, Output()):
        assert prediction(output) is logits


def test_batches_of_trees_are_merged():
    def batch(k):
        return CutBatch(k, 0, 0, (torch.full((2, 3), float(k)),), {"a": torch.full((2,), k), "b": (torch.zeros(2, 4),)})

    both = merge([batch(0), batch(1)])
    assert both.targets["a"].tolist() == [0, 0, 1, 1]
    assert both.targets["b"][0].shape == (4, 4)
    assert len(both) == 4
    with pytest.raises(InputError, match=r"targets b: expected those of 2 samples, at least one, found \(3,\) of torch.float32"):
        CutBatch(0, 0, 0, (torch.zeros(2, 3),), {"a": torch.zeros(2), "b": torch.zeros(3)})


# ------------------------------------------------------------------------------------------------------- small trainings


def config(name, data, model, cut, method="decoupled", clients=2, topology="splitfed", partition="iid", epochs=8, **task):
    return Config(
        method=method, data=DataConfig(f"own_tasks:{data}"), task=TaskConfig(name, **task),
        model=ModelConfig(f"own_tasks:{model}", cut, "linear"), clients=ClientsConfig(clients, topology, partition),
        train=TrainConfig(epochs=epochs, batch_size=16, lr=0.05, threads=1, weight_decay=0.0),
    )  # fmt: skip


SETS = {
    "multilabel": ("multilabel", "multilabel", "flat", "below"), "regression": ("regression", "regression", "flat", "below"),
    "column": ("regression", "column", "flat", "below"), "segmentation": ("segmentation", "segmentation", "maps", "below"),
    "tokens": ("tokens", "tokens", "per_token", ""),
}  # fmt: skip
LEARNED = {"multilabel": 0.9, "regression": 0.6, "column": 0.6, "segmentation": 0.6, "tokens": 0.65}


@pytest.mark.parametrize("method", ["decoupled", "conventional", "centralized"])
@pytest.mark.parametrize("name", SETS)
def test_every_task_is_learned(tmp_path, name, method):
    outcome = train(dataclasses.replace(config(*SETS[name], method), out=str(tmp_path / "run")))
    lead = outcome["metric"]
    assert outcome["test"][lead] > LEARNED[name]
    assert outcome["higher_is_better"]
    assert outcome["test_accuracy"] is None  # which is that of classes
    assert rows_of(tmp_path / "run")[-1]["test"] == outcome["test"]
    if method == "decoupled":
        assert lead in outcome["aux_test"]
        assert (outcome["joint_test"] is not None) == (name == "multilabel")
    if method != "centralized":
        expected = {"multilabel": 3 * 4, "regression": 2 * 4, "column": 4, "segmentation": 64 * 8, "tokens": 12 * 8}[name]
        assert 1 < outcome["bytes"]["up"]["labels"] / (128 * 8 * expected) < 1.8


def test_between_processes_as_in_one(tmp_path, monkeypatch):
    """Masks cross, and each client tests on its own data."""
    monkeypatch.chdir(Path(__file__).parent)  # where the processes find own_tasks
    settings = config(*SETS["segmentation"], epochs=2, partition="own")
    one, other = train_in_both_runtimes(settings, tmp_path).values()
    for key in ("metric", "test", "aux_test", "joint_test", "sites"):
        assert one[key] == other[key], key
    assert one["bytes"]["up"]["labels"] == other["bytes"]["up"]["labels"]
    assert [(site["client"], site["samples"]) for site in one["sites"]] == [(0, 64), (1, 64)]
    assert one["sites"][0]["test"] == one["sites"][1]["test"] == one["test"]  # in one command they have the same data


def test_a_task_of_one_s_own_with_state(tmp_path):
    settings = config("own_tasks:counting", "regression", "flat", "below")
    outcome = train(dataclasses.replace(settings, out=str(tmp_path / "run")))
    assert (outcome["metric"], outcome["higher_is_better"], outcome["metric_unit"]) == ("mae_of_mine", False, "")
    assert outcome["test"]["mae_of_mine"] < 0.35
    bad = dataclasses.replace(config("own_tasks:one_value", "regression", "flat", "below"), out=str(tmp_path / "bad"))
    with pytest.raises(InputError, match=r"one_value', loss: expected a tensor: a mean, or one value per sample, found \(4, 2\); return one"):
        train(bad)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(("name", "said"), [
    ("no_metric", "metrics: expected at least one metric of torchmetrics, found {}; return a metric, a list or a dict of them"),
    ("text_for_metric", "metrics: expected at least one metric of torchmetrics, found 'mae'; return a metric, a list or a dict of them"),
    ("cut_off", "loss: expected a loss that depends on the outputs, found one without a gradient; compute it of them, without detach() or argmax()"),
    ("several_values", "metric 'mae_of_mine': expected one number, found one of several values (mae_of_mine/0, mae_of_mine/1); average it, or lead with another"),
    ("failing", "loss: expected one that takes outputs (4, 2) and targets float32 (2,) of 4 samples, found ZeroDivisionError: division by zero; mend it"),
])  # fmt: skip
def test_a_task_of_one_s_own_is_tried_before_anything_is_written(tmp_path, name, said):
    settings = config(f"own_tasks:{name}", "regression", "flat", "below")
    with pytest.raises(InputError) as refused:
        train(dataclasses.replace(settings, out=str(tmp_path / "run")))
    assert str(refused.value) == f"task.name 'own_tasks:{name}', {said}"
    assert not (tmp_path / "run").exists()


def test_a_test_set_without_a_label_has_no_score(tmp_path):
    """The run goes on to its end: a site may have none."""
    settings = config("classification", "unlabelled_test", "flat", "below", ignore_index=-1, epochs=2)
    outcome = train(dataclasses.replace(settings, out=str(tmp_path / "run")))
    assert outcome["test"]["accuracy"] is None
    assert outcome["test_accuracy"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["aux_test_accuracy"] is None


def test_as_many_names_as_outputs(tmp_path):
    for data, said in (
        ("twice_named", "data own_tasks:twice_named, classes: expected a name of its own for each, found 'a' twice; rename them"),
        ("two_of_three_named", "data own_tasks:two_of_three_named, targets for task multilabel, names: expected 3, one for each output, found 2 (a, b); name all of them, or none"),
    ):  # fmt: skip
        with pytest.raises(InputError) as refused:
            train(dataclasses.replace(config("multilabel", data, "flat", "below"), out=str(tmp_path / "run")))
        assert str(refused.value) == said


def test_the_scores_of_sites_and_of_all_together(data):
    """Two sites with other test sets: pooled is of all samples, not the mean of the sites."""
    score = Score(classes(2), [0, 1])
    for client, right in ((0, [1, 1, 1]), (1, [0])):
        labels = torch.ones(len(right), dtype=torch.int64)
        outputs = F.one_hot(torch.tensor(right), 2).float()
        score.add(CutBatch(client, 0, 0, (torch.zeros(len(right), 1),), labels), outputs, None)
    assert score.values()["accuracy"] == 0.75
    assert [score.sites[k].values()["accuracy"] for k in (0, 1)] == [1, 0]


# ------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("name", "cut", "outputs"), [
    ("linear", (8, 4, 4), (3, 8, 8)), ("mlp", (8, 4, 4), (3, 4, 4)), ("conv-2", (8, 5, 4), (3, 10, 9)),
    ("tail", (8, 4, 4), (3, 8, 8)), ("linear", (6, 8), (6, 5)), ("mlp", (6, 8), (6, 5)),
])  # fmt: skip
def test_dense_heads(name, cut, outputs):
    assert build_head(name, cut, outputs, seed=0)(torch.randn(2, *cut)).shape == (2, *outputs)


def test_heads_that_cannot_be_dense_are_refused():
    with pytest.raises(InputError, match=r"'pooled-linear': expected a head with outputs \(3, 8, 8\) per sample \(linear, mlp, conv"):
        build_head("pooled-linear", (8, 4, 4), (3, 8, 8), seed=0)
    with pytest.raises(InputError, match=r"'linear': expected a cut \(6 tokens, features\), found \(7, 8\)"):
        build_head("linear", (7, 8), (6, 5), seed=0)


# ------------------------------------------------------------------------------------------------------- not finite


def halves(outputs=10):
    torch.manual_seed(0)
    model, head = Flat(outputs), nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, outputs))

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.below = model.below

        def forward(self, x):
            return (self.below(x),)

    half = First()
    client = client_side.Client(half, head, torch.optim.SGD([*half.parameters(), *head.parameters()], lr=0.1))
    server = server_side.Server(model.above, torch.optim.SGD(model.above.parameters(), lr=0.1))
    return client, server


@pytest.mark.parametrize("value", [NAN, math.inf, 3e38])
def test_a_step_that_is_not_finite_touches_no_weight(value):
    client, server = halves()
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    batch, _ = client_side.decoupled_step(client, x, y, 0, 0)
    server_side.decoupled_step(server, batch)
    before = [{n: v.clone() for n, v in side.named_parameters()} for side in (client.half, client.head, server.half)]
    with pytest.raises(RunError, match=r"^client 0.*, epoch 3, step 5.*: expected (a )?finite .*lower train.lr"):
        client_side.decoupled_step(client, x.index_fill(0, torch.tensor([3]), value), y, 2, 4)
    bad = dataclasses.replace(batch, client=1, tensors=(batch.tensors[0].index_fill(0, torch.tensor([3]), value),))
    with pytest.raises(RunError, match=r"^server, batch of client 1, epoch 1, step 1.*: expected (a )?finite"):
        server_side.decoupled_step(server, bad)
    for side, kept in zip((client.half, client.head, server.half), before, strict=True):
        assert equal(kept, dict(side.named_parameters()))


def test_gradients_that_are_not_finite_touch_no_weight():
    client, _ = halves()
    client.head = None
    client.optimizer = torch.optim.SGD(client.half.parameters(), lr=0.1)
    pending = client_side.conventional_forward(client, torch.randn(8, 1, 8, 8), torch.arange(8), 0, 0)
    before = {n: v.clone() for n, v in client.half.named_parameters()}
    with pytest.raises(RunError, match=r"^client 0, epoch 1, step 1, gradients: expected finite numbers, found NaN or infinity"):
        client_side.conventional_backward(client, pending, (torch.full((8, 6, 8, 8), NAN),))
    assert equal(before, dict(client.half.named_parameters()))


@pytest.mark.parametrize("method", ["conventional", "decoupled", "centralized"])
def test_answers_that_are_nan_in_a_test_are_an_error(tmp_path, method):
    settings = config("classification", "classes", "blind", "below", method, clients=1)
    side = "whole network" if method == "centralized" else "server, batch of client 0"
    with pytest.raises(RunError, match=rf"^{side}, test after epoch 1, step 1: expected finite outputs, found NaN or infinity"):
        train(dataclasses.replace(settings, out=str(tmp_path / "run")))


# ------------------------------------------------------------------------------------------------- loops of one's own


def test_what_a_loop_of_one_s_own_may_get_wrong_is_said():
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)

    def step(client, x=x, y=y):
        client_side.decoupled_step(client, x, y, 0, 0)

    client, server = halves()
    with pytest.raises(InputError, match=r"targets: expected a tensor of targets, or a tuple or dict of them, found a list; make"):
        step(client, y=y.tolist())
    with pytest.raises(InputError, match=r"targets: expected those of 8 samples, found 7; give one per sample"):
        step(client, y=y[:7])
    with pytest.raises(InputError, match=r"the loss: expected one that takes outputs \(8, 10\) of float32 and targets \(8,\) of int32"):
        step(client, y=y.int())
    client_side.set_training(client, False)
    with pytest.raises(InputError, match=r"client.half: expected training mode, found evaluation mode; call client_steps.set_training"):
        step(client)
    client_side.set_training(client, True)
    batch, _ = client_side.decoupled_step(client, x, y, 0, 0)
    with pytest.raises(InputError, match=r"server.half: expected training mode, found evaluation mode; call server.half.train"):
        server_side.decoupled_step(dataclasses.replace(server, half=server.half.eval()), batch)
    without = client_side.Client(client.half, client.head, torch.optim.SGD(client.half.parameters(), lr=0.1))
    with pytest.raises(InputError, match=r"client.optimizer: expected every parameter of client half and head, found none of 1.weight, 1.bias of the head"):
        step(without)


def test_a_loss_with_one_value_per_sample_is_its_mean():
    client, _ = halves(2)
    client.loss = Counting()
    x, y = torch.randn(8, 1, 8, 8), torch.randn(8, 2)
    _, found = client_side.decoupled_step(client, x, y, 0, 0)
    assert found > 0
    assert client.loss.asked == 1


def test_published_keys_of_classification(tmp_path):
    """Old keys mean what they did, and the new ones say the same."""
    settings = config("classification", "classes", "flat", "below", epochs=2)
    outcome = train(dataclasses.replace(settings, out=str(tmp_path / "run")))
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    for part in ("test", "aux_test", "joint_test"):
        assert outcome[f"{part}_accuracy"] == outcome[part]["accuracy"] == written[part]["accuracy"]
    assert (outcome["metric"], outcome["metric_unit"], outcome["sites"]) == ("accuracy", "%", [])
