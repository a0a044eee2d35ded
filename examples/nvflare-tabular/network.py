"""A perceptron for the rows of a table, which travels with the job."""

from collections import OrderedDict

from torch import nn


def network(sample_shape, outputs):
    (columns,) = sample_shape
    return nn.Sequential(OrderedDict(
        below=nn.Sequential(nn.Linear(columns, 64), nn.ReLU()), middle=nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
        last=nn.Linear(64, outputs),
    ))  # fmt: skip
