"""`pytest` in this folder: the cut network is the whole one, and a short training learns something."""

import copy
import dataclasses
from pathlib import Path

import halfpass
import pytest
import torch
import yaml
from halfpass.config import from_dict

from my_data import data
from my_network import network

CONFIG = from_dict(yaml.safe_load((Path(__file__).parent / "run.yaml").read_text()))
CLASSES = 10


def test_the_halves_compute_what_the_whole_network_does():
    train, _ = data()
    inputs = torch.stack([train[i][0] for i in range(16)])
    whole = network(tuple(inputs.shape[1:]), CLASSES)
    halves = halfpass.split(copy.deepcopy(whole), CONFIG.model.cut, inputs)
    for mode in (True, False):  # training, where BatchNorm uses the batch's own statistics, and evaluation
        for module in (whole, halves.client, halves.server):
            module.train(mode)
        assert torch.equal(halves.server(*halves.client(inputs)), whole(inputs))


@pytest.mark.parametrize("task", ["classification", "my_task:task"])
def test_a_short_training_is_better_than_guessing(tmp_path, task):
    short = dataclasses.replace(CONFIG.train, epochs=2)
    result = halfpass.train(
        dataclasses.replace(CONFIG, task=halfpass.TaskConfig(task), train=short, out=str(tmp_path / "run"))
    )
    assert result["test"]["accuracy"] > 3 / CLASSES  # guessing gives 1 / CLASSES
