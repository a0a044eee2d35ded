"""What the client has, for `halfpass agreement` to look at: how many samples, of which shapes and classes. The values
that are uploaded are made up by client.js."""

import torch
from torch.utils.data import TensorDataset

TRAIN, TEST, CLASSES = 200, 50, 4


def data():
    return split(TRAIN), split(TEST)


def split(samples):
    return TensorDataset(torch.rand(samples, 8, 4, 4), torch.arange(samples) % CLASSES)
