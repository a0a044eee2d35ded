"""Small made-up data, networks and a task of one's own, one for each kind of target, for test_tasks.py.

Workers that draw import it: without torchmetrics, which takes seconds.
"""

import importlib

import numpy as np
import torch
from torch import nn
from torch.nn.functional import l1_loss
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset


def regression_metrics():
    return importlib.import_module("torchmetrics.regression")


def _split(inputs, targets, held=64):
    return TensorDataset(inputs[:-held], targets[:-held]), TensorDataset(inputs[-held:], targets[-held:])


def _pictures(count=192):
    """(N, 1, 8, 8): noise around a brightness of its own in each half."""
    draws = torch.Generator().manual_seed(3)
    halves = torch.randn(count, 1, 2, 1, generator=draws).repeat_interleave(4, 2)
    return halves + 0.3 * torch.randn(count, 1, 8, 8, generator=draws)


def multilabel():
    """Three labels, of bright parts; every ninth is not known, and none of the second in the first 16 samples."""
    x = _pictures()
    upper, lower = x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2))
    targets = torch.stack([upper > 0, lower > 0, upper + lower > 1], 1).float()
    targets.view(-1)[::10] = float("nan")
    targets[:16, 1] = float("nan")
    return _split(x, targets)


def regression():
    x = _pictures()
    return _split(x, torch.stack([x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2))], 1))


def column():
    """One number for each sample, (N,); some are not known."""
    x = _pictures()
    targets = x[:, 0].mean((1, 2))
    targets[::7] = float("nan")
    return _split(x, targets)


def segmentation():
    """Dark, middling and bright pixels; the first row is not labelled."""
    x = _pictures()
    masks = (x[:, 0] > -0.4).long() + (x[:, 0] > 0.4).long()
    masks[:, 0] = 255
    return _split(x, masks)


def tokens():
    """Whether a token is 10 or more; the first of each sample has no answer."""
    x = torch.randint(0, 20, (192, 12), generator=torch.Generator().manual_seed(4))
    targets = (x >= 10).long()
    targets[:, 0] = -100
    return _split(x, targets)


class Flat(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.above = nn.Sequential(nn.Flatten(), nn.Linear(6 * 64, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x):
        return self.above(self.below(x))


def flat(sample_shape, outputs):
    return Flat(outputs)


class Maps(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.above = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1))

    def forward(self, x):
        return self.above(self.below(x))


def maps(sample_shape, outputs):
    return Maps(outputs)


class Below(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.mix(self.embed(x.long()))


def per_token(sample_shape, outputs):
    """A pair of halves, (B, T) → (B, T, 8) → (B, T, outputs)."""
    return Below(), nn.Sequential(nn.ReLU(), nn.Linear(8, outputs))


class Answering(Flat):
    """With a dict, as many networks do."""

    def forward(self, x):
        return {"features": self.below(x), "logits": self.above(self.below(x))}


class Counting(nn.Module):
    """A loss with state: how often it was asked. A value for each sample."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, outputs, targets):
        self.asked += 1
        return l1_loss(outputs, targets, reduction="none").mean(1)


def counting(outputs):
    return Counting(), {"mae_of_mine": regression_metrics().MeanAbsoluteError(), "mse_of_mine": regression_metrics().MeanSquaredError()}


def one_value(outputs):
    return (lambda outputs, targets: outputs), {"mae_of_mine": regression_metrics().MeanAbsoluteError()}


class Blind(Flat):
    """Whose answers are NaN for half of a test's samples."""

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else torch.where(logits[:, :1] > logits[:, :1].mean(), logits, float("nan"))


def blind(sample_shape, outputs):
    return Blind(outputs)


def classes():
    """Ten of them, as the bright and the dark have."""
    x = _pictures()
    return _split(x, (4 + 2 * x[:, 0].mean((1, 2))).long().clamp(0, 9))


class Shaken(TorchDataset):
    """Points of two classes, moved at random each time that one is taken."""

    classes = ("left", "right")

    def __init__(self, count, first):
        self.count, self.first = count, first

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        label = (self.first + i) % 2
        return torch.randn(6) + label * 2 - 1, label


def shaken():
    return Shaken(96, 0), Shaken(32, 1)


def shaken_locally():
    """Of a class that no other process can import."""
    class Local(Shaken):
        pass

    return Local(96, 0), Local(32, 1)


def points(shape, outputs):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs))


def no_metric(outputs):
    return l1_loss, {}


def text_for_metric(outputs):
    return l1_loss, "mae"


def cut_off(outputs):
    return (lambda outputs, targets: l1_loss(outputs.detach(), targets)), {"mae_of_mine": regression_metrics().MeanAbsoluteError()}


def several_values(outputs):
    return l1_loss, {"mae_of_mine": regression_metrics().MeanAbsoluteError(num_outputs=2)}


def failing(outputs):
    return (lambda outputs, targets: 1 / 0), {"mae_of_mine": regression_metrics().MeanAbsoluteError()}


def unlabelled_test():
    x = _pictures()
    labels = (x.mean((1, 2, 3)) > 0).long()
    labels[-64:] = -1
    return _split(x, labels)


class Named(TensorDataset):
    """Says how its labels are called."""

    def __init__(self, data, classes):
        super().__init__(*data.tensors)
        self.classes = classes


def twice_named():
    train, test = multilabel()
    return Named(train, ["a", "a", "b"]), test


def two_of_three_named():
    train, test = multilabel()
    return Named(train, ["a", "b"]), test


def split_anew():
    """By a generator of its own, which has another seed each time."""
    items = [(torch.full((6,), i / 128), i % 2) for i in range(128)]
    order = np.random.default_rng().permutation(len(items))
    return [items[i] for i in order[:96]], [items[i] for i in order[96:]]


class Buffered(nn.Module):
    """Buffers of kinds that need care when they are handed over: infinities, and whole numbers of few bits that count."""

    def __init__(self, outputs):
        super().__init__()
        self.below, self.above = nn.Linear(6, 8), nn.Linear(8, outputs)
        self.register_buffer("mask", torch.tensor([0.0] * 6 + [float("-inf")] * 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int8))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int16))

    def forward(self, x):
        h = torch.softmax(self.below(x) + self.mask, 1)
        if self.training:
            self.seen += 1
            self.steps += torch.tensor([1, 300], dtype=torch.int16)
        return self.above(h * 4)


def buffered(shape, outputs):
    return nn.Sequential(Buffered(8), nn.Linear(8, outputs))
