"""The network of examples/node-client, as the server builds it: two halves that are given, of which the client's is
elsewhere, in another language. Here it hands on what it gets: what the client calls its inputs, when it joins, is what
it uploads."""

from torch import nn


def network(sample_shape, classes):  # sample_shape: (8, 4, 4), of what is uploaded
    channels = sample_shape[0]
    server = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )  # fmt: skip
    return nn.Identity(), server
