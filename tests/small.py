"""A small network with a cut by hand, trained on the fixture `data`: through halfpass, and what the plain way needs."""

import copy
import dataclasses

import torch
from plain import HandCut
from torch import nn

from halfpass.config import ClientsConfig, Config, DataConfig, ModelConfig, TrainConfig, WireConfig
from halfpass.data.batches import train_batches
from halfpass.run import setup
from halfpass.run.local import LocalRun
from halfpass.run.network import build_network

RECIPE = TrainConfig(epochs=2, batch_size=16, lr=0.05, threads=1)
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def config(method="decoupled", clients=1, topology="splitfed", codec="none", model="plain:hand_cut", cut="below", **recipe):
    return Config(
        method=method,
        data=DataConfig("noise"),
        model=ModelConfig(model, cut, "linear"),
        clients=ClientsConfig(clients, topology),
        train=dataclasses.replace(RECIPE, **recipe),
        wire=WireConfig(codec=codec),
    )


def shards(data, counts):
    parts = torch.arange(sum(counts)).split(counts)
    return [data.train.take(part) for part in parts]


def run(settings, data, counts=(64,)):
    network = build_network(settings, data.train.sample_shape, data.classes)
    local = LocalRun(settings, data, shards(data, list(counts)), network)
    for epoch in range(settings.train.epochs):
        local.train(epoch, lambda: None)
        local.test(epoch)
    local.finish()
    return local


def joined(local, client=0):
    """Weights and buffers of client half and server half, by the names of the whole network."""
    return local.clients[client].half.state_dict() | local.server.half.state_dict()


def plain_start(settings, data, plain=HandCut):
    """The same initial network and head as ordinary modules."""
    network = build_network(settings, data.train.sample_shape, data.classes)
    model = plain()
    model.load_state_dict(network.halves.client.state_dict() | network.halves.server.state_dict())
    place = setup.build_server(settings, network).arithmetic.place
    return place(model).train(), None if network.head is None else place(copy.deepcopy(network.head)).train()


def plain_batches(data, epochs=2):
    for epoch in range(epochs):
        yield from train_batches(data, data.train, 16, seed=0, client=0, epoch=epoch)


def one_cycle(step, total=8, peak=0.05):
    """The oracle: PyTorch's own scheduler, asked for every step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=total, pct_start=0.15, anneal_strategy="linear", cycle_momentum=False
    )
    for _ in range(step):
        optimizer.step()
        schedule.step()
    return optimizer.param_groups[0]["lr"]


def close(one, other):
    return all(torch.allclose(one[name].double(), other[name].double(), rtol=1e-5, atol=1e-7) for name in one)
