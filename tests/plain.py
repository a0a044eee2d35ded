"""The plain way of doing the same, for the tests to compare with: ordinary PyTorch, nothing of halfpass's."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


class HandCut(nn.Module):
    """A small network with BatchNorm and dropout-free layers whose cut, after `below`, is written by hand."""

    def __init__(self):
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.above = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(8 * 3 * 3, 10)

    def forward(self, x):  # (B, 1, 8, 8)
        return self.classifier(self.above(self.below(x)))


def hand_cut(sample_shape, classes):
    """For `model.name`; the process-wide seed is set by whoever builds it."""
    return HandCut()


class HalfFrozen(nn.Module):
    """Behind `frozen` two values are alive: first its own, which has no graph, then that of `trained`."""

    def __init__(self):
        super().__init__()
        self.trained, self.frozen = (nn.Sequential(nn.Flatten(), nn.Linear(64, 8)) for _ in range(2))
        self.frozen.requires_grad_(False)
        self.top = nn.Linear(8, 10)

    def forward(self, x):  # (B, 1, 8, 8)
        trained = self.trained(x)
        return self.top(self.frozen(x) * trained.tanh())


def half_frozen(sample_shape, classes):
    return HalfFrozen()


def train_decoupled(model, head, batches, lr_of_step, settings, loss_of=cross_entropy):
    """One ordinary module, `detach()` at the cut, one optimizer over everything, the sum of both losses."""
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1, fused=True, **settings)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr_of_step(step)
        z = model.below(x)
        loss = loss_of(head(z), y) + loss_of(model.classifier(model.above(z.detach())), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_end_to_end(model, batches, lr_of_step, settings, loss_of=cross_entropy):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True, **settings)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr_of_step(step)
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)
