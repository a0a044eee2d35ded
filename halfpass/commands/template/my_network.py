"""Your network: halfpass calls `network(...)` and cuts what it returns behind the layer that `model.cut` names."""

from torch import nn


class Network(nn.Module):
    """Two convolutions, which the client computes, and two layers above them, which the server does."""

    def __init__(self, channels, outputs):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, 2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.answer = nn.Linear(64, outputs)

    def forward(self, x):  # (B, 1, 8, 8)
        x = self.second(self.first(x))  # (B, 16, 4, 4): what goes to the server, where model.cut is `second`
        x = self.third(x)  # (B, 64, 4, 4)
        return self.answer(x.mean((2, 3)))  # (B, outputs)


def network(sample_shape, outputs):
    """`sample_shape` is that of one input, here (1, 8, 8); `outputs` is the number of classes."""
    return Network(sample_shape[0], outputs)
