"""Small made-up data, networks and a task of one's own, one for each kind of target, for test_tasks.py."""

import torch
from torch import nn
from torch.nn.functional import l1_loss
from torch.utils.data import TensorDataset
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError


def _split(inputs, targets, held=32):
    return TensorDataset(inputs[:-held], targets[:-held]), TensorDataset(inputs[-held:], targets[-held:])


def _pictures(count=96, side=8, channels=1):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(3)) + 1


def multilabel():
    """Three labels, each whether a part of the picture is bright; every ninth is not known."""
    x = _pictures()
    targets = torch.stack([x[:, 0, :4].mean((1, 2)) > 1, x[:, 0, 4:].mean((1, 2)) > 1, x[:, 0].mean((1, 2)) > 1.05], 1).float()
    targets.view(-1)[::9] = float("nan")
    return _split(x, targets)


def regression():
    x = _pictures()
    return _split(x, torch.stack([x[:, 0, :4].mean((1, 2)), x[:, 0, 4:].mean((1, 2))], 1))


def column():
    x = _pictures()
    return _split(x, x[:, 0].mean((1, 2)))


def segmentation():
    """Dark, middling and bright pixels; a border of 255 is not labelled."""
    x = _pictures()
    masks = (x[:, 0] > 0.7).long() + (x[:, 0] > 1.3).long()
    masks[:, 0] = 255
    return _split(x, masks)


def tokens():
    """Whether the token before was larger; the first has none."""
    x = torch.randint(0, 20, (96, 12), generator=torch.Generator().manual_seed(4))
    targets = torch.full_like(x, -100)
    targets[:, 1:] = (x[:, 1:] > x[:, :-1]).long()
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
        self.below = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.above = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, outputs, 1))

    def forward(self, x):
        return self.above(self.below(x))


def maps(sample_shape, outputs):
    return Maps(outputs)


class Below(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.mix(self.embed(x.long()).transpose(1, 2)).transpose(1, 2)


def per_token(sample_shape, outputs):
    return Below(), nn.Sequential(nn.ReLU(), nn.Linear(8, outputs))


class Counting(nn.Module):
    """A loss with state: how often it was asked. One value per sample."""

    def __init__(self):
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, outputs, targets):
        self.asked += 1
        return l1_loss(outputs, targets[:, None], reduction="none").squeeze(1)


def counting(outputs):
    return Counting(), {"mae_of_mine": MeanAbsoluteError(), "mse_of_mine": MeanSquaredError()}
